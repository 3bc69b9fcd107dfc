"""Ports for the servers."""

import random
import socket
from contextlib import suppress
from pathlib import Path

from dev.stack.errors import StackError


def free_port(besides: frozenset[int] = frozenset()) -> int:
    """A TCP port of 127.0.0.1 that nothing listens on.

    It lies below the range that the kernel takes outgoing ports from, where there is room: a client
    that keeps calling a server that is down may otherwise be given the server's own port, be
    connected to itself, and keep the server from starting again.
    """
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except FileNotFoundError:
        first = 49152  # where IANA's dynamic range, and that of macOS, begins
    below = range(max(first - 12_000, 10_000), first)
    candidates = random.sample(below, 100) if len(below) > 1000 else []
    for candidate in [*candidates, 0]:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", candidate))
            port: int = probe.getsockname()[1]
            if port not in besides:
                return port
    raise StackError("no free port on 127.0.0.1; end some servers")
