"""`flashsalectl` finds the servers of a checkout, and completes words in a shell."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashsale_operator.ctl import local_env
from flashsale_operator.ctl.commands import run
from tests.support.ctl import NOWHERE, SAMPLE, Ctl


@pytest.fixture
def checkout(tmp_path: Path, environ: dict[str, str]) -> Path:
    """A checkout in which `make up` runs."""
    (tmp_path / ".local").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "pyproject.toml").touch()
    lines = "".join(f"{name}={value}\n" for name, value in environ.items())
    (tmp_path / ".local" / "env").write_text(f"{lines}PATH=/nowhere\nFLASHSALE_KAFKA_PASSWORD=s3\n")
    return tmp_path


def in_folder(folder: Path, *arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
    own = {name: value for name, value in os.environ.items() if not name.startswith("FLASHSALE_")}
    return subprocess.run(
        [Path(sys.executable).with_name("flashsalectl"), *arguments],
        cwd=folder,
        env=own | changes,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_servers_of_the_checkout_are_found(ctl: Ctl, checkout: Path) -> None:
    ctl("apply", "-f", str(SAMPLE))
    for folder in (checkout, checkout / "docs"):
        done = in_folder(folder, "get")
        assert (done.returncode, done.stderr) == (0, "")
        assert "iphone_15" in done.stdout


def test_the_environment_wins_over_the_file_of_the_checkout(ctl: Ctl, checkout: Path) -> None:
    ctl("apply", "-f", str(SAMPLE))
    done = in_folder(checkout, "get", FLASHSALE_REDIS_URL=f"redis://{NOWHERE}/0")
    [error, origin] = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert error.startswith("flashsalectl: Redis is unavailable: ")
    assert origin == (
        f"flashsalectl: addresses that are not in the environment come from {checkout}/.local/env"
    )
    assert "s3" not in done.stderr


def test_an_error_without_servers_names_the_missing_file(tmp_path: Path) -> None:
    (tmp_path / ".local").mkdir()
    (tmp_path / ".local" / "env").write_text("FLASHSALE_REDIS_URL=redis://elsewhere\n")
    done = in_folder(tmp_path, "get")  # the folder is no checkout
    [error, advice] = done.stderr.splitlines()
    assert done.returncode == 2
    assert error.startswith("flashsalectl: FLASHSALE_REDIS_URL is not set: expected redis://")
    assert "`make up`" in advice


def test_a_folder_that_cannot_be_entered_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root can enter every folder, so the error is simulated."""
    (tmp_path / "pyproject.toml").touch()
    stat = Path.stat

    def refused(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if ".local" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", refused)
    environ, advice = local_env.environment({}, tmp_path)
    assert environ == {}
    assert advice.endswith(f"no checkout with .local/env contains {tmp_path}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_has_a_completion_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell], {}) == 0
    assert f"_FLASHSALECTL_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("flashsalectl reb", "rebuild"),
        ("flashsalectl get --wa", "--watch"),
        ("flashsalectl get -o y", "yaml"),
        ("flashsalectl close ip", "iphone_15"),
    ],
)
def test_commands_options_and_items_are_completed(
    ctl: Ctl, environ: dict[str, str], words: str, completed: str
) -> None:
    ctl("apply", "-f", str(SAMPLE))
    done = subprocess.run(
        [Path(sys.executable).with_name("flashsalectl")],
        env=os.environ
        | environ
        | {
            "_FLASHSALECTL_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (f"plain,{completed}\n", "")
