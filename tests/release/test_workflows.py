"""The workflows: actionlint accepts them, and they have no more rights than they need."""

import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.support.paths import ROOT

FOLDER: Final = ROOT / ".github" / "workflows"
PATHS: Final = sorted(FOLDER.glob("*.yml"))
WRITES: Final = {
    ("release.yml", "images"): {"packages", "id-token"},
    ("release.yml", "chart"): {"packages", "id-token"},
    ("release.yml", "release"): {"contents"},
}
"""The only jobs that may write, and their rights."""


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["jobs"]
    return found


def shell_commands() -> list[str]:
    return [
        step["run"]
        for path in PATHS
        for job in jobs(path).values()
        for step in job.get("steps", [])
        if "run" in step
    ]


def test_actionlint_accepts_every_workflow(release_tools: Path) -> None:
    done = subprocess.run(
        [release_tools / "actionlint", *PATHS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_actionlint_finds_an_unknown_job(release_tools: Path, tmp_path: Path) -> None:
    broken = tmp_path / "release.yml"
    text = (FOLDER / "release.yml").read_text()
    broken.write_text(text.replace("needs: [check, chart]", "needs: [check, charts]"))
    done = subprocess.run(
        [release_tools / "actionlint", broken], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert '"charts"' in done.stdout


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_the_commit_of_a_named_version(path: Path) -> None:
    used = re.findall(r"uses: (.+)$", path.read_text(), re.MULTILINE)
    assert used or path.name != "release.yml"
    pinned = r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+"
    assert [each for each in used if not re.fullmatch(rf"{pinned}|\./\S+", each)] == []


def test_one_action_has_one_version_in_all_workflows() -> None:
    used = {
        tuple(each)
        for path in PATHS
        for each in re.findall(r"uses: ([\w./-]+)@([0-9a-f]{40})", path.read_text())
    }
    assert len({name for name, _ in used}) == len(used)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_job_writes_only_if_it_publishes(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {}
    for name, job in jobs(path).items():
        rights = job["permissions"]
        writes = {scope for scope, right in rights.items() if right == "write"}
        assert writes == WRITES.get((path.name, name), set())
        assert set(rights) <= writes | {"contents"}


def test_no_shell_command_contains_an_expression() -> None:
    """An expression in a command could run the text of a branch name or of a title."""
    assert [each for each in shell_commands() if "${{" in each] == []


def test_shell_commands_are_make_targets_and_scripts_of_the_repository() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in shell_commands():
        program, *words = command.split()
        if program == "make":
            target = next(word for word in words if not word.startswith("-"))
            assert target in targets, command
        elif program not in {"cosign", "gh", "oras"}:
            assert (ROOT / program).is_file(), command
