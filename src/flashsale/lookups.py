"""The threads in which a process with uvloop looks up the names of hosts."""

import os
from typing import Final

THREADS: Final = 16
"""Half of them look up names. A client gives up after some seconds, and its look-up goes on."""


def share_threads() -> None:
    """Lets look-ups that no DNS server answers delay no other ones. Call it before the first one.

    By default, uvloop has two threads for look-ups. A look-up takes half a minute if its DNS server
    is silent, and each client begins another one after some seconds. So the names of brokers could
    take both threads, and no client could connect to Redis.
    """
    os.environ.setdefault("UV_THREADPOOL_SIZE", str(THREADS))
