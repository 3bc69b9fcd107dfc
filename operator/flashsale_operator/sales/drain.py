"""Wait until the ledger has every event of a fenced sale that was not lost.

The order of the waits makes this a proof:

1. The outbox is empty, and every living pod has reported that it has no unacknowledged event. The
   report is later than the last call that the pod can have had in flight.
2. No new event can appear, so the topic's end offsets now cover all events.
3. The ledger has read the topic up to these offsets.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from flashsale import events, heartbeat, ledger
from flashsale.errors import FlashsaleError
from flashsale.inventory import Inventory
from flashsale_operator.sales.decision import counted
from flashsale_operator.sales.offsets import UNSEEN, Span, Spans, faults

SAMPLED_AFTER_MS: Final = 1_500
"""Longer than an API pod waits for a script. A heartbeat that is sampled this long after the sale
was fenced covers every event that the pod accepted before the fence."""
CLOCK_STEP_MS: Final = 1_000 * (heartbeat.EXPIRY_SECONDS - heartbeat.INTERVAL_SECONDS)
"""After a larger step of Redis' clock, the last heartbeat of a living pod can look expired, or be
from the future. It is then left out until the pod sends the next one."""

Progress = Callable[[str], None]


class NotDrained(FlashsaleError):
    """Events of the sale may still be on their way to the ledger. `why` has a phrase per cause."""

    def __init__(self, *why: str) -> None:
        super().__init__("; ".join(why))
        self.why = why


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds.

    - `seeding`: for another process to seed the keys of a new sale.
    - `unseen`: for the heartbeat of a living pod. A flush of Redis deletes all heartbeats.
    - `quiet`: for pods to publish their events.
    - `recorded`: for the ledger to read the topic.
    - `between`: between two looks.
    """

    seeding: float = 1.0
    unseen: float = heartbeat.EXPIRY_SECONDS
    quiet: float = 30.0
    recorded: float = 60.0
    between: float = 0.2


class Drain:
    """Waits until no event of a sale is in flight."""

    def __init__(
        self,
        inventory: Inventory,
        pool: ledger.Pool,
        spans: Spans,
        *,
        patience: Patience = Patience(),
    ) -> None:
        self._inventory = inventory
        self._topic = events.topic(inventory.engine)
        self._pool = pool
        self._spans = spans
        self.patience = patience

    async def wait(
        self,
        item_id: str,
        keep_fenced: Callable[[], Awaitable[None]],
        progress: Progress = lambda _: None,
    ) -> dict[int, int]:
        """Waits until no event is in flight. Returns the topic's end offsets.

        The ledger has reached these offsets. Calls `keep_fenced` at each look, and `progress` with
        each new cause. Raises `NotDrained` at the deadline, `RedisUnavailable`,
        `LedgerUnavailable`, `KafkaUnavailable`, and the errors of `keep_fenced`.
        """
        began_ms, began = (await self._inventory.server(item_id)).now_ms, time.monotonic()

        async def unpublished() -> tuple[str, ...]:
            await keep_fenced()
            found = await self._unpublished(item_id, began_ms + SAMPLED_AFTER_MS)
            now_ms = (await self._inventory.server(item_id)).now_ms
            if abs(now_ms - began_ms - 1000 * (time.monotonic() - began)) > CLOCK_STEP_MS:
                raise NotDrained("Redis' clock was set during the wait for events")
            return found

        patience = self.patience
        await self._until(unpublished, progress, patience.quiet, at_least=patience.unseen)
        topic = await self._spans()
        if not topic:
            # It may have events that the ledger has not read. It would refuse them later.
            raise NotDrained(UNSEEN)

        async def unread() -> tuple[str, ...]:
            await keep_fenced()
            stored = await ledger.stored_offsets(self._pool, self._topic)
            if late := _unread(topic, stored):
                return late
            # The ledger has reached the ends, and other sales go on. Only ends that were read after
            # the ledger's offsets can prove that records are missing.
            if any(stored.get(number, 0) > topic[number].end for number in topic):
                return faults(await self._spans(), stored)
            return faults(topic, stored)

        await self._until(unread, progress, patience.recorded)
        return {number: span.end for number, span in topic.items()}

    async def _unpublished(self, item_id: str, sampled_from_ms: int) -> tuple[str, ...]:
        """Returns why events may be missing from the topic."""
        found = []
        sale = (await self._inventory.sales([item_id])).get(item_id)
        if sale is not None and sale.outbox_length:
            events_left = counted(sale.outbox_length, "event")
            found.append(f"the outbox has {events_left} that Kafka has not acknowledged")
        server = await self._inventory.server(item_id)
        engine = self._inventory.engine
        for pod in await heartbeat.living(self._inventory.redis, item_id, server, engine):
            if pod.sampled_ms < sampled_from_ms:
                found.append(f"pod {pod.pod_id} has not reported its unacknowledged events yet")
            elif pod.unacknowledged:
                unacknowledged = counted(pod.unacknowledged, "unacknowledged event")
                found.append(f"pod {pod.pod_id} has {unacknowledged}")
        return tuple(dict.fromkeys(found))

    async def _until(
        self,
        look: Callable[[], Awaitable[tuple[str, ...]]],
        progress: Progress,
        seconds: float,
        *,
        at_least: float = 0.0,
    ) -> None:
        """Looks until nothing is found, for at least `at_least` and at most `seconds`.

        Raises `NotDrained` if something is still found then.
        """
        began, reported = time.monotonic(), ""
        while True:
            # Read before the look. A process can stand still after it has read the heartbeats. If
            # a pod sends one meanwhile, only the next look finds it.
            waited = time.monotonic() - began
            found = await look()
            if not found and waited >= at_least:
                return
            if waited >= max(seconds, at_least):
                raise NotDrained(*found)
            cause = found[0] if found else "waiting for heartbeats of API pods"
            if cause != reported:
                progress(cause)
                reported = cause
            await asyncio.sleep(self.patience.between)


def _unread(topic: Mapping[int, Span], stored: Mapping[int, int]) -> tuple[str, ...]:
    """Returns the partitions that the ledger has not read up to their end."""
    return tuple(
        f"the ledger has read partition {number} to offset {stored.get(number, 0)} of {span.end}"
        for number, span in sorted(topic.items())
        if stored.get(number, 0) < span.end
    )
