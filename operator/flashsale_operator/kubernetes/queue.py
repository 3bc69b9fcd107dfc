"""The work queue: which FlashSale is reconciled next, and when it is reconciled again."""

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Final, NamedTuple

RECONCILE_SECONDS: Final = 5.0
"""Between two reconciles of a quiet FlashSale. Each repairs drift and samples the counts."""
JITTER: Final = 0.2
FIRST_BACKOFF_SECONDS: Final = 0.5
LAST_BACKOFF_SECONDS: Final = 8.0
AFTER_BOUND_SECONDS: Final = 0.2
"""Delay after startsAt or endsAt, because Redis' clock differs from the operator's."""


class Key(NamedTuple):
    """A FlashSale's namespace and name."""

    namespace: str
    name: str

    @classmethod
    def of(cls, sale_id: str) -> "Key":
        return cls(*sale_id.split("/", 1))

    @property
    def sale_id(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Requeue:
    """When a reconciled FlashSale is due again.

    - `gone`: never, because it was deleted and its sale is closed.
    - `failed`: after a back-off.
    - `changes_ms`: soon after these times, at which the state may change. Unix milliseconds.
    """

    gone: bool = False
    failed: bool = False
    changes_ms: tuple[int, ...] = ()


def pause(requeue: Requeue, failures: int, now_ms: int, chance: float) -> float:
    """Returns the seconds until the next reconcile. `chance` is from 0 to 1."""
    jitter = 1 + JITTER * (2 * chance - 1)
    if failures:
        backoff = FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 10)
        return min(backoff, LAST_BACKOFF_SECONDS) * jitter
    seconds = RECONCILE_SECONDS * jitter
    for bound_ms in requeue.changes_ms:
        away = (bound_ms - now_ms) / 1000 + AFTER_BOUND_SECONDS
        if away > 0:
            seconds = min(seconds, away)
    return seconds


@dataclass(slots=True)
class _Entry:
    """A FlashSale in the queue.

    `waiting`: it is due, or due again after its reconcile. `changed`: it is due because it changed.
    """

    waiting: bool = False
    changed: bool = False
    taken: bool = False
    failures: int = 0
    timer: asyncio.TimerHandle | None = None


class Queue:
    """FlashSales in the order in which they are due. Each is taken by one worker at a time.

    Changed FlashSales go first. So the thousand quiet ones of one namespace do not delay the pause
    of a sale in another.
    """

    def __init__(self) -> None:
        self._changed: dict[Key, None] = {}
        self._due: dict[Key, None] = {}
        self._number = asyncio.Semaphore(0)
        self._entries: dict[Key, _Entry] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def wake(self, key: Key, *, changed: bool = False) -> None:
        """Makes a FlashSale due now, or again after the reconcile that is running."""
        entry = self._entries.setdefault(key, _Entry())
        if entry.timer is not None:
            entry.timer.cancel()
        entry.changed = entry.changed or changed
        entry.waiting = True
        if not entry.taken:
            self._put(key, entry)

    async def take(self) -> Key:
        """Waits for a FlashSale that is due. The worker gives it back after its reconcile."""
        await self._number.acquire()
        first = self._changed or self._due
        key = next(iter(first))
        del first[key]
        entry = self._entries[key]
        entry.waiting, entry.changed, entry.taken = False, False, True
        return key

    def give_back(self, key: Key, requeue: Requeue) -> None:
        """Queues a FlashSale again after its reconcile, unless it is gone."""
        entry = self._entries[key]
        entry.taken = False
        entry.failures = entry.failures + 1 if requeue.failed else 0
        if entry.waiting:
            self._put(key, entry)
        elif requeue.gone:
            del self._entries[key]
        else:
            chance = random.random()  # noqa: S311 - no secret
            seconds = pause(requeue, entry.failures, time.time_ns() // 1_000_000, chance)
            entry.timer = asyncio.get_running_loop().call_later(seconds, self.wake, key)

    def _put(self, key: Key, entry: _Entry) -> None:
        if key in self._changed:
            return
        if key in self._due:
            if not entry.changed:
                return
            del self._due[key]
        else:
            self._number.release()
        (self._changed if entry.changed else self._due)[key] = None
