"""The descriptors of a process. Its clients must leave some to its own connections."""

import contextlib
import resource
from typing import Final

SPARE: Final = 512
"""Descriptors that connections of clients leave to Redis, Kafka, metrics and the order port."""
MOST: Final = 65_536
"""Descriptors that a process asks for. Many container runtimes start it with 1,024."""


def raise_limit() -> None:
    """Raises this process' limit as far as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    with contextlib.suppress(ValueError):  # the kernel of macOS has another limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """Returns how many clients may be connected to a port."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(limit - SPARE, limit // 2)
