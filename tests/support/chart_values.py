"""`python -m tests.support.chart_values` writes the tables of values into the chart's README."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any, Final

from tests.support.manifests import documents
from tests.support.paths import CHART

README: Final = CHART / "README.md"
_MARKS: Final = ("<!-- values -->\n", "<!-- end of values -->\n")


@dataclass(frozen=True, slots=True)
class Value:
    """A leaf of values.yaml."""

    path: str
    """The path that `helm --set` takes, such as "api.replicas"."""
    default: Any
    description: str

    @property
    def section(self) -> str:
        """The first part of the path, or "" for a value at the top."""
        section, dot, _ = self.path.partition(".")
        return section if dot else ""


def defaults() -> dict[str, Any]:
    """Return the chart's default values."""
    (loaded,) = documents(CHART / "values.yaml")
    return loaded


def values() -> Iterator[Value]:
    """Yield each value with the comment above it, in the order of values.yaml."""
    nested = defaults()
    parents: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        if found := re.match(r"( *)# (.*)", line):
            comment.append(found[2])
        elif found := re.match(r"( *)(\w+):(.*)", line):
            indent, key, rest = len(found[1]), found[2], found[3]
            while parents and parents[-1][0] >= indent:
                parents.pop()
            path = ".".join([*(name for _, name in parents), key])
            if rest:
                yield Value(path, reduce(getitem, path.split("."), nested), " ".join(comment))
            else:
                parents.append((indent, key))
            comment = []
        else:
            comment = []


def tables() -> str:
    """Return the values as one Markdown table per section of values.yaml."""
    sections: dict[str, list[Value]] = {}
    for value in values():
        sections.setdefault(value.section, []).append(value)
    lines: list[str] = []
    for section, group in sections.items():
        lines += [f"### {section or 'general'}", ""]
        lines += ["| value | default | description |", "|---|---|---|"]
        lines += [
            f"| `{value.path}` | `{json.dumps(value.default)}` | {value.description} |"
            for value in group
        ]
        lines.append("")
    return "\n".join(lines)


def readme() -> str:
    """Return the README with current tables."""
    before, rest = README.read_text().split(_MARKS[0])
    after = rest.split(_MARKS[1])[1]
    return f"{before}{_MARKS[0]}{tables()}{_MARKS[1]}{after}"


if __name__ == "__main__":
    README.write_text(readme())
