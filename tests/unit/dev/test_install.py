"""`make setup` with Pythons that are too old, too new, incomplete, or replaced."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from dev.install import NEWEST, OLDEST, advice, made_by, refusal
from tests.support.paths import ROOT

RANGE = ["{}.{}".format(*pair) for pair in (OLDEST, NEWEST)]
NO_WHEEL = "ERROR: Could not find a version that satisfies the requirement a (from versions: none)"
OFFLINE = "WARNING: Retrying (…) after connection broken by 'NameResolutionError(…)': /simple/a/"


def test_an_old_python_can_read_the_program_that_refuses_it() -> None:
    ast.parse((ROOT / "dev" / "install.py").read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("version", [(3, 6), (3, 10), (3, 15)])
def test_a_python_out_of_the_range_is_refused_with_one_that_works(version: tuple[int, int]) -> None:
    assert refusal(version, has_pip=True) == (
        f"Python {RANGE[0]} to {RANGE[1]} is needed, this is {version[0]}.{version[1]}. "
        f"Name another one: make setup PYTHON=python{RANGE[1]}"
    )


@pytest.mark.parametrize("version", [OLDEST, NEWEST, sys.version_info[:2]])
def test_a_python_within_the_range_needs_pip(version: tuple[int, int]) -> None:
    assert refusal(version, has_pip=True) == ""
    package = "python{}.{}-venv".format(*version)
    assert refusal(version, has_pip=False).endswith(f"apt-get install {package}")


def test_the_documents_and_the_project_name_the_same_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={RANGE[0]},<{NEWEST[0]}.{NEWEST[1] + 1}"
    for document in (ROOT / "README.md", ROOT / "docs" / "development.md"):
        assert re.findall(r"Python (3\.\d+) to (3\.\d+)", document.read_text()) == [tuple(RANGE)]


def test_a_package_without_a_wheel_is_no_outage_of_the_network() -> None:
    assert "has no file of this package for Python 3." in advice(NO_WHEEL)
    assert "needs the network" in advice(f"{OFFLINE}\n{NO_WHEEL}")
    assert advice("ERROR: No space left on device") == "The packages cannot be installed"


def test_an_environment_of_another_python_is_recognised(tmp_path: Path) -> None:
    folder = tmp_path / ".venv"
    assert not made_by(sys.executable, folder)
    venv.create(folder, symlinks=True)
    assert made_by(sys.executable, folder)
    other = tmp_path / "python3"
    other.touch()
    assert not made_by(str(other), folder)
    (folder / "lib" / "python{}.{}".format(*sys.version_info)).rename(folder / "lib" / "python3.0")
    assert not made_by(sys.executable, folder)


@pytest.mark.parametrize(
    ("command", "python"),
    [
        ("demo", ""),
        ("setup", ""),
        ("setup PYTHON=python3.0", "python3.0"),
        ("demo --assume-new=pyproject.toml", str(Path(sys.executable).resolve())),
    ],
)
def test_make_keeps_the_python_of_the_environment_until_another_one_is_named(
    command: str, python: str, checkout: Path
) -> None:
    assert installing(checkout, command) == python


def test_make_installs_again_if_the_python_of_the_environment_is_gone(checkout: Path) -> None:
    (checkout / ".venv" / "bin" / "python").unlink()
    (checkout / ".venv" / "bin" / "python").symlink_to("removed")
    assert installing(checkout, "demo") == "python3"


def test_a_newer_python_locks_the_packages_of_the_oldest_one_too(checkout: Path) -> None:
    commands = re.findall(r"uv pip compile .*", printed(checkout, "lock"))
    assert len(commands) == 2
    assert all(f"--universal --python-version {RANGE[0]} " in command for command in commands)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder in which everything is installed."""
    (tmp_path / "dev").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "dev/requirements.txt"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / ".ready").touch()
    for number, name in enumerate(("pyproject.toml", "dev/requirements.txt", ".venv/.ready")):
        os.utime(tmp_path / name, (2_000_000_000 + number,) * 2)
    return tmp_path


def printed(checkout: Path, command: str) -> str:
    """Return the commands that `make` would run."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["make", "--dry-run", *command.split()],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def installing(checkout: Path, command: str) -> str:
    """Return the Python that `make` would run dev/install.py with, or "" if with none."""
    found = re.search(r"^(\S+) dev/install\.py$", printed(checkout, command), re.MULTILINE)
    return found[1] if found else ""
