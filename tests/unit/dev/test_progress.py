"""Programs of a checkout end with a line and an exit code, and without a traceback."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dev.paths import ROOT
from dev.progress import ending_quietly
from dev.stack.errors import StackError


def _interrupted() -> int:
    raise KeyboardInterrupt


def _without_a_server() -> int:
    raise StackError("redis: cannot run")


def _without_a_folder() -> int:
    return len((ROOT / "no-such-folder" / "file").read_bytes())


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (lambda: None, 0, ""),
        (lambda: 7, 7, ""),
        (_interrupted, 130, "Interrupted."),
        (_without_a_server, 1, "redis: cannot run"),
        (_without_a_folder, 1, f"{ROOT / 'no-such-folder' / 'file'}: No such file or directory"),
    ],
)
def test_a_program_ends_with_a_code_and_a_line(
    main: Callable[[], int | None], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending_quietly(main) == code
    assert capsys.readouterr().err.strip() == line


def test_a_file_elsewhere_is_a_bug_and_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ending_quietly(lambda: len((tmp_path / "file").read_bytes()))


def test_every_program_that_starts_servers_ends_so() -> None:
    programs = {
        path: text
        for folder in ("bench", "dev", "tests/faults")
        for path in (ROOT / folder).glob("*.py")
        if "def main(" in (text := path.read_text()) and "argparse" in text
    }
    assert len(programs) >= 12
    ending = "sys.exit(ending_quietly(main))"
    assert [path for path, text in programs.items() if ending not in text] == []
