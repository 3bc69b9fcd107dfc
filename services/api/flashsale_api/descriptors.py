"""The descriptors of a process. Its clients must leave some to its own connections."""

import contextlib
import resource
from typing import Final

SPARE: Final = 2_048
"""Descriptors that buyers leave. Half are for the order port, half for Redis, Kafka and metrics."""
MOST: Final = 65_536
"""Descriptors that a process asks for. Many container runtimes start it with 1,024."""


def raise_limit() -> None:
    """Raises this process' limit as far as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    with contextlib.suppress(ValueError):  # the kernel of macOS has another limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """Returns how many buyers may be connected."""
    limit = _limit()
    return max(limit - SPARE, limit // 2)


def most_order_connections() -> int:
    """Returns how many clients may be connected to the order port, however many buyers are."""
    return (_limit() - most_connections()) // 2


def _limit() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit
