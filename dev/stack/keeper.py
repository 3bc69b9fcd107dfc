"""This process's end of the lifeline, which knows the servers that end with this process."""

import atexit
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

from dev.stack import lifeline


class _Keeper:
    """Tells the lifeline which servers to end. The lifeline starts with the first server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._servers: dict[int, str] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def add(self, pid: int, identity: str, first: signal.Signals) -> None:
        with self._lock:
            if self._owner != os.getpid():  # a fork has servers of its own, and none at first
                self._owner, self._child, self._servers = os.getpid(), None, {}
            self._servers[pid] = f"+ {pid} {first.value} {identity}\n"
            try:
                self._tell(self._servers[pid])
            except BrokenPipeError:  # the lifeline was killed: a new one takes over all servers
                if self._child is not None:
                    self._child.communicate()
                self._child = None
                self._tell("".join(self._servers.values()))

    def remove(self, pid: int) -> None:
        with self._lock:
            if self._owner == os.getpid() and pid in self._servers:
                del self._servers[pid]
                with suppress(BrokenPipeError):
                    self._tell(f"- {pid}\n")

    def close(self) -> None:
        """End the servers that are left, and wait until they have ended."""
        with self._lock:
            if self._child is not None and self._owner == os.getpid():
                self._child.communicate()
            self._child = None

    def _tell(self, lines: str) -> None:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", lifeline.__file__, str(self._owner)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                bufsize=0,
            )
        if self._child.stdin is not None:
            self._child.stdin.write(lines.encode())


_keeper = _Keeper()
add = _keeper.add
remove = _keeper.remove
atexit.register(_keeper.close)
