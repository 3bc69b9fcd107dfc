"""The changelog's sections, in the format of Keep a Changelog."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dev.stack.errors import StackError

_HEADING: Final = re.compile(r"^## (?P<name>\S+)(?: - (?P<date>\S+))?$", re.MULTILINE)
_KINDS: Final = ("added", "changed", "deprecated", "removed", "fixed", "security")
"""The kinds of changes, in the words of both Keep a Changelog and Artifact Hub."""


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    """A version, or "Unreleased"."""
    date: str | None
    text: str
    """The Markdown below the heading."""

    def changes(self) -> Iterator[tuple[str, str]]:
        """Yield the kind and the description of each change. Raises StackError for other kinds."""
        for part in re.split(r"^### ", self.text, flags=re.MULTILINE)[1:]:
            heading, _, lines = part.partition("\n")
            if (kind := heading.strip().lower()) not in _KINDS:
                raise StackError(
                    f"CHANGELOG.md: {heading.strip()!r} is not one of {', '.join(_KINDS)}"
                )
            for line in lines.splitlines():
                if line.startswith("- "):
                    yield kind, line.removeprefix("- ")


def sections(root: Path) -> list[Section]:
    """Return the sections of CHANGELOG.md from the newest to the oldest."""
    text = (root / "CHANGELOG.md").read_text()
    found = list(_HEADING.finditer(text))
    ends = [each.start() for each in found[1:]] + [len(text)]
    return [
        Section(each["name"], each["date"], text[each.end() : end].strip())
        for each, end in zip(found, ends, strict=True)
    ]


def section(root: Path, version: str) -> Section:
    """Return the section of a version. Raises StackError if there is none."""
    if not version:
        raise StackError("VERSION is empty: name a version, such as 0.1.0")
    for each in sections(root):
        if each.name == version:
            return each
    raise StackError(f"CHANGELOG.md has no section `## {version} - YYYY-MM-DD`")


def notes(root: Path, version: str) -> str:
    """Return the Markdown of a version's changes."""
    return section(root, version).text
