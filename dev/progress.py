"""Progress on stderr of programs that take minutes, and their quiet end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dev.paths import ROOT
from dev.stack import keeper, lifeline
from dev.stack.errors import StackError


def run(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    show: Callable[[list[str]], None],
) -> tuple[int, list[str]]:
    """Run a program to its end. Returns its exit code and the lines of its output.

    The output goes to `log`. `show` gets the lines so far twice per second.
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
    # If this process is killed, the program must not continue for minutes.
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
    """Wait for half a second, and return whether the program has ended."""
    try:
        child.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return False
    return True


def say(line: str) -> None:
    """Print a line on stderr, unbuffered."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def ending_quietly(main: Callable[[], int | None]) -> int:
    """Run a command and return its exit code, without a traceback if it is interrupted.

    Ctrl-C is 130 and a reader that closes the output is 141, as a shell reports them. A server that
    does not start, and a file of the checkout that cannot be used, are 1 and a line. The command's
    own `with` blocks have stopped what it started.
    """
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        say("\nInterrupted.")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except StackError as error:
        say(f"\n{error}")
        return 1
    except OSError as error:
        if error.filename is None or not Path(str(error.filename)).is_relative_to(ROOT):
            raise
        say(f"\n{error.filename}: {error.strerror}")
        return 1
    return code or 0


class Progress:
    """Progress as one changing line on a terminal, otherwise as a line every 15 s."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown = self._began

    def show(self, line: str) -> None:
        """Show a line. `{seconds}` in it becomes the time since the start."""
        terminal = sys.stderr.isatty()
        now = time.monotonic()
        if now - self._shown < (0.2 if terminal else 15.0):
            return
        self._shown = now
        text = line.replace("{seconds}", f"{now - self._began:.0f}")
        sys.stderr.write(f"\r\x1b[K{text}" if terminal else f"{text}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Erase the changing line."""
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")

    def end(self, line: str) -> None:
        """Show the last line, which stays."""
        self.clear()
        say(line.replace("{seconds}", f"{time.monotonic() - self._began:.0f}"))
