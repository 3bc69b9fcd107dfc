"""Ctrl-C while a program imports its modules, reads its input or runs."""

import fcntl
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import IO

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


def test_ctrl_c_ends_the_wait_for_manifests() -> None:
    with subprocess.Popen(
        [FLASHSALECTL, "apply", "-f", "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as reading:
        assert reading.stdin is not None
        assert reading.stderr is not None
        try:
            reading.stdin.write(b"#")
            reading.stdin.flush()
            _wait_until_read(reading.stdin, reading.pid)
            reading.send_signal(signal.SIGINT)
            assert reading.wait(60) == 130
            assert reading.stderr.read().strip() == b""
        finally:
            reading.kill()


def _wait_until_read(pipe: IO[bytes], pid: int) -> None:
    """Wait until the process has read the pipe and sleeps in the next read."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        [unread] = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"0000"))
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if not unread and state == "S":
            return
        time.sleep(0.01)
    raise AssertionError("the pipe is not being read")
