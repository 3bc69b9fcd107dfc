"""The descriptors of a process. Its clients must leave some to its own connections.

Each client also takes memory, so a container with less memory has fewer descriptors.
"""

import contextlib
import resource
import sys
from pathlib import Path
from typing import Final

SPARE: Final = 2_048
"""Descriptors that buyers leave. Half are for the order port, half for Redis, Kafka and metrics."""
MOST: Final = 65_536
"""Descriptors that a process asks for. Many container runtimes start it with 1,024."""
CLIENT_BYTES: Final = 8 * 1024
"""The memory of an idle client. The process and the kernel, which counts too, need half each."""

_MEMORY_LIMITS: Final = (  # of a container, with control groups of version 2 and 1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def set_limit() -> None:
    """Sets this process' limit as high as it may, with half of the memory for idle clients."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(MOST, SPARE + _memory() // 2 // CLIENT_BYTES)
    if hard != resource.RLIM_INFINITY:
        wanted = min(hard, wanted)
    with contextlib.suppress(ValueError):  # the kernel of macOS has another limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """Returns how many buyers may be connected."""
    limit = _limit()
    return max(limit - SPARE, limit // 2)


def most_order_connections() -> int:
    """Returns how many clients may be connected to the order port, however many buyers are."""
    return (_limit() - most_connections()) // 2


def _memory() -> int:
    """Returns the memory limit of the container in bytes, or a very large number."""
    for limit in _MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says `max`
            return int(limit.read_text("ascii"))
    return sys.maxsize


def _limit() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit
