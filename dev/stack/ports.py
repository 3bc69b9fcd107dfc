"""Ports for the servers."""

import random
import socket
from contextlib import suppress
from pathlib import Path

from dev.stack.errors import StackError


def free_port(besides: frozenset[int] = frozenset()) -> int:
    """Return a TCP port of 127.0.0.1 that is free, and not one of `besides`.

    The port lies below the range of outgoing ports if there is room. Otherwise a client that keeps
    calling a stopped server could get the server's own port as its outgoing port. It would then be
    connected to itself, and the server could not start again.
    """
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except FileNotFoundError:
        first = 49152  # the start of the dynamic range of IANA and of macOS
    below = range(max(first - 12_000, 10_000), first)
    candidates = random.sample(below, 100) if len(below) > 1000 else []
    for candidate in [*candidates, 0]:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", candidate))
            port: int = probe.getsockname()[1]
            if port not in besides:
                return port
    raise StackError("no free port on 127.0.0.1; stop some servers")
