"""Ports for the servers."""

import os
import random
import socket
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Final

from dev.stack.errors import StackError

_PARTS: Final = 8
"""Parts of the range. The number of pytest's worker selects its part, otherwise the process id."""
_given: Final[deque[int]] = deque(maxlen=500)
"""The ports that this process got last. Their servers may start later."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free.

    Nothing listens on it until its server starts, so this function does not return it again soon.
    Up to eight workers of one pytest choose from different parts of the range. Other processes that
    run side by side mostly do, too.

    The port lies below the range of outgoing ports if there is room. Otherwise a client that keeps
    calling a stopped server could get the server's own port as its outgoing port. It would then be
    connected to itself, and the server could not start again.
    """
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except FileNotFoundError:
        first = 49152  # the start of the dynamic range of IANA and of macOS
    below = range(max(first - 12_000, 10_000), first)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    own = below[int(worker or os.getpid()) % _PARTS :: _PARTS]
    # Tests seed the generator of the module `random`.
    candidates = random.SystemRandom().sample(own, 100) if len(below) > 1000 else [0] * 100
    for candidate in candidates:
        with socket.socket() as probe, suppress(OSError):
            # Otherwise a server could not take the port while another process probes it.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", candidate))
            port: int = probe.getsockname()[1]
            if port not in _given:
                _given.append(port)
                return port
    raise StackError("no free port on 127.0.0.1; stop some servers")


def check_free(port: int, name: str) -> None:
    """Raise StackError if another program listens on the port of a server that is about to start.

    The message names the program if the system tells which one it is.
    """
    with socket.socket() as probe:
        # As the servers do, so that the connections of a former server do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError:
            raise StackError(f"{name}: port {port} needs root; choose a port above 1023") from None
        except OSError:
            owner = listener(port)
            taken = "another program" if owner is None else f"process {owner} ({_program(owner)})"
            raise StackError(
                f"{name}: {taken} listens on port {port}; stop it, or choose another port, "
                "for example `make up PORT=9000`"
            ) from None


def listener(port: int) -> int | None:
    """Return the id of the process that listens on a TCP port, or None if the system hides it."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    if not sockets:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        # Processes end in the meantime, and those of other users are hidden.
        with suppress(OSError):
            for open_file in (process / "fd").iterdir():
                with suppress(OSError):
                    if str(open_file.readlink()) in sockets:
                        return int(process.name)
    return None


_LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp."""


def _program(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "unknown program"
