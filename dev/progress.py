"""Programs that take minutes, with their progress on stderr."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dev.stack import keeper, lifeline


def run(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    show: Callable[[list[str]], None],
) -> tuple[int, list[str]]:
    """Runs a program to its end and returns its exit code and the lines of its output.

    Twice a second `show` is given the lines so far. They go to `log`.
    """
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    # A session that is killed must not leave minutes of work behind.
    if (identity := lifeline.identity(child.pid)) is not None:
        keeper.add(child.pid, identity, signal.SIGKILL)
    try:
        while not _ended(child):
            show(log.read_text(errors="replace").splitlines())
    finally:
        if child.poll() is None:
            lifeline.destroy(child.pid)
            child.wait()
        keeper.remove(child.pid)
    return child.returncode, log.read_text(errors="replace").splitlines()


def _ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether it ended, now or in the next half a second."""
    try:
        child.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return False
    return True


def say(line: str) -> None:
    """A line on stderr, at once."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class Progress:
    """How far it is: one line that changes on a terminal, else a line every 15 s."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown = self._began

    def show(self, line: str) -> None:
        """Shows a line, in which "{seconds}" stands for the time since the beginning."""
        terminal = sys.stderr.isatty()
        now = time.monotonic()
        if now - self._shown < (0.2 if terminal else 15.0):
            return
        self._shown = now
        text = line.replace("{seconds}", f"{now - self._began:.0f}")
        sys.stderr.write(f"\r\x1b[K{text}" if terminal else f"{text}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Takes the line back that would have changed."""
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")

    def end(self, line: str) -> None:
        """Shows the last line, which stays."""
        self.clear()
        say(line.replace("{seconds}", f"{time.monotonic() - self._began:.0f}"))
