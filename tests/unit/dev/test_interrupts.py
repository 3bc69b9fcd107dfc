"""Ctrl-C while a program still imports its modules."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FLASHSALECTL = str(Path(sys.executable).with_name("flashsalectl"))


@pytest.mark.parametrize("program", [[FLASHSALECTL], ["-m", "dev.local"]], ids=["ctl", "local"])
def test_ctrl_c_during_the_imports_has_no_traceback(program: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", *program, "--help"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as importing:
        assert importing.stderr is not None
        while "asyncio" not in importing.stderr.readline():
            assert importing.poll() is None
        importing.send_signal(signal.SIGINT)
        errors = importing.stderr.read()
    assert importing.returncode == 130
    assert "Traceback" not in errors
