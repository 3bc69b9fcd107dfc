"""The work queue: which FlashSale is reconciled next, and when it is reconciled again."""

import asyncio
import random
import time
from dataclasses import dataclass
from enum import IntEnum
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


class Urgency(IntEnum):
    """Why a FlashSale is due. The first one goes first."""

    CHANGED = 0
    """It was changed or deleted, such as paused."""
    NEW = 1
    """It was created."""
    DUE = 2
    """It exists and may need a repair."""


@dataclass(frozen=True, slots=True)
class Requeue:
    """When a reconciled FlashSale is due again.

    - `gone`: never, because it was deleted and its sale is closed.
    - `again`: after the shortest back-off, whatever failed before.
    - `failed`: after a back-off.
    - `changes_ms`: soon after these times, at which the state may change. Unix milliseconds.
    """

    gone: bool = False
    again: bool = False
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


class _Line:
    """FlashSales of one urgency. Namespaces take turns, and each has its own order of arrival."""

    def __init__(self) -> None:
        self._namespaces: dict[str, dict[Key, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._namespaces)

    def put(self, key: Key) -> None:
        self._namespaces.setdefault(key.namespace, {})[key] = None

    def remove(self, key: Key) -> None:
        keys = self._namespaces[key.namespace]
        del keys[key]
        if not keys:
            del self._namespaces[key.namespace]

    def take(self) -> Key:
        """Removes the first FlashSale of the first namespace, which then goes last."""
        namespace = next(iter(self._namespaces))
        keys = self._namespaces.pop(namespace)
        key = next(iter(keys))
        del keys[key]
        if keys:
            self._namespaces[namespace] = keys
        return key


@dataclass(slots=True)
class _Entry:
    """A FlashSale in the queue.

    - `urgency`: why it is due, or due again after its reconcile. None means that it is not.
    - `line`: the urgency of the line in which it waits for a worker, if it does.
    """

    urgency: Urgency | None = None
    line: Urgency | None = None
    taken: bool = False
    failures: int = 0
    timer: asyncio.TimerHandle | None = None


class Queue:
    """FlashSales in the order of their urgency. Each is taken by one worker at a time.

    A thousand FlashSales that one namespace creates at once delay neither a change anywhere nor a
    FlashSale of another namespace.
    """

    def __init__(self) -> None:
        self._lines = {urgency: _Line() for urgency in Urgency}
        self._waiting = asyncio.Semaphore(0)
        self._entries: dict[Key, _Entry] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def wake(self, key: Key, urgency: Urgency = Urgency.DUE) -> None:
        """Makes a FlashSale due now, or again after the reconcile that is running."""
        entry = self._entries.setdefault(key, _Entry())
        if entry.timer is not None:
            entry.timer.cancel()
        entry.urgency = urgency if entry.urgency is None else min(entry.urgency, urgency)
        if not entry.taken:
            self._put(key, entry, entry.urgency)

    async def take(self) -> Key:
        """Waits for a FlashSale that is due. The worker gives it back after its reconcile."""
        await self._waiting.acquire()
        key = next(line for line in self._lines.values() if line).take()
        entry = self._entries[key]
        entry.urgency, entry.line, entry.taken = None, None, True
        return key

    def give_back(self, key: Key, requeue: Requeue) -> None:
        """Queues a FlashSale again after its reconcile, unless it is gone."""
        entry = self._entries[key]
        entry.taken = False
        if requeue.again:
            entry.failures = 1
        else:
            entry.failures = entry.failures + 1 if requeue.failed else 0
        if entry.urgency is not None:
            self._put(key, entry, entry.urgency)
        elif requeue.gone:
            del self._entries[key]
        else:
            chance = random.random()  # noqa: S311 - no secret
            seconds = pause(requeue, entry.failures, time.time_ns() // 1_000_000, chance)
            entry.timer = asyncio.get_running_loop().call_later(seconds, self.wake, key)

    def _put(self, key: Key, entry: _Entry, urgency: Urgency) -> None:
        if entry.line is urgency:
            return
        if entry.line is None:
            self._waiting.release()
        else:
            self._lines[entry.line].remove(key)
        self._lines[urgency].put(key)
        entry.line = urgency
