"""Limits the time that a turn of the event loop spends on the requests of clients.

In one turn, uvloop reads from all clients that have sent something, and again from those that were
answered meanwhile. With thousands of busy clients, or after the process stood still, such a turn
takes seconds. Until it ends, no call is sent to Redis, no reply of Redis is read in time, and no
client can connect.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Final
from weakref import WeakKeyDictionary

TURN_SECONDS: Final = 0.01
"""Time of a turn for requests, which suffices for hundreds of them.

With 8,000 clients that send requests as fast as they are answered, a pod accepts 5,700 requests per
second, but 1,500 with five times as much, and none without a limit.
"""


class Turns:
    """Postpones work to later turns of a loop, and keeps its order."""

    def __init__(self) -> None:
        self._postponed: deque[Callable[[], None]] = deque()
        self._until: float | None = None
        """When the time of this turn ends. None before the first work of a turn."""

    def has_time(self) -> bool:
        """Returns whether this turn has time for more work."""
        if self._until is None:
            self._until = monotonic() + TURN_SECONDS
            asyncio.get_running_loop().call_soon(self._next)
        return monotonic() < self._until

    def postpone(self, work: Callable[[], None]) -> None:
        """Does `work` after all that was postponed before, in a later turn."""
        self.has_time()  # schedules the next turn
        self._postponed.append(work)

    def _next(self) -> None:
        self._until = None
        has_time = True
        while self._postponed and has_time:
            # Before the work, so that a further turn follows even if the work fails.
            has_time = self.has_time()
            self._postponed.popleft()()


_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()


def of_loop(loop: asyncio.AbstractEventLoop) -> Turns:
    """Returns the turns of a loop. All its connections share them."""
    return _of_loops.setdefault(loop, Turns())
