"""A copy of the files of a release, as they are when its tag is made."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dev.images.building import DEPLOYABLES
from tests.support.paths import ROOT

VERSION: Final = "0.1.0"
_FILES: Final = ("pyproject.toml", "README.md", "src/flashsale/__init__.py")


@dataclass(frozen=True, slots=True)
class Tree:
    root: Path

    def replace(self, name: str, old: str, new: str) -> None:
        """Replace text that a file has once."""
        path = self.root / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
        path.write_text(text.replace(old, new))


def released(folder: Path) -> Tree:
    """Copy the sources of a release, and give all changes of the changelog its version."""
    for name in (*_FILES, *(f"{each}/Dockerfile" for each in DEPLOYABLES.values())):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "charts", folder / "charts")
    shutil.copytree(ROOT / "k8s", folder / "k8s")
    own = re.search(r'^version = "(.+)"$', (folder / "pyproject.toml").read_text(), re.MULTILINE)
    assert own is not None
    assert own[1] == VERSION
    (folder / "CHANGELOG.md").write_text(
        "# Changelog\n\n## Unreleased\n\n"
        f"## {VERSION} - 2026-11-30\n\n"
        "### Added\n\n- API: `POST /reserve`.\n\n"
        "### Security\n\n- Chart: restricted pods.\n"
    )
    return Tree(folder)
