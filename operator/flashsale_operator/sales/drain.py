"""Waits until the ledger has everything of a fenced sale that was not lost.

The order is what makes it a proof. First nobody may hold an event that Kafka lacks: the outbox is
empty, and every pod that lives has said, after the last call that it can have had in flight, that
it holds nothing. Then the topic's ends cover every event there will be. Then the ledger has read
that far.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import asyncpg
from redis.asyncio import Redis

from flashsale import events, heartbeat, ledger
from flashsale.errors import FlashsaleError
from flashsale.inventory import Inventory
from flashsale_operator.sales.offsets import Span, faults

CALL_DEADLINE_MS: Final = 1_500
"""Longer than an API pod waits for a script, so that what it may have accepted before the sale
was fenced is in its heartbeat that much later."""

Progress = Callable[[str], None]
Spans = Callable[[], Awaitable[Mapping[int, Span]]]


class Unsettled(FlashsaleError):
    """Something of a sale may still be on its way to the ledger; `why` says what, in words."""

    def __init__(self, *why: str) -> None:
        super().__init__("; ".join(why))
        self.why = why


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds.

    `seeding`: for another operator to make the keys of a new sale. `unseen`: after a flush a
    living pod is not in the pods' set until it beats again. `quiet`: for pods to publish what they
    hold. `recorded`: for the ledger to read what is on the topic.
    """

    seeding: float = 1.0
    unseen: float = heartbeat.EXPIRY_SECONDS
    quiet: float = 30.0
    recorded: float = 60.0
    between: float = 0.2


class Barrier:
    """Waits for sales; `progress` is told for what, when that changes."""

    def __init__(
        self,
        redis: "Redis",
        pool: "asyncpg.Pool[asyncpg.Record]",
        spans: Spans,
        *,
        patience: Patience = Patience(),
        progress: Progress = lambda _: None,
    ) -> None:
        self._redis = redis
        self._inventory = Inventory(redis)
        self._pool = pool
        self._spans = spans
        self.patience = patience
        self._progress = progress

    async def settled(
        self, sale_id: str, item_id: str, look_after: Callable[[], Awaitable[None]]
    ) -> dict[int, int]:
        """The offsets that the ledger has read to, when nothing of the sale is before them unread
        and nothing comes after them.

        `look_after` is called at each look, to keep the sale fenced meanwhile. Raises `Unsettled`
        at the deadline, `RedisUnavailable`, `LedgerUnavailable`, `KafkaUnavailable` and whatever
        `look_after` raises.
        """
        sampled_from_ms = (await self._inventory.server()).now_ms + CALL_DEADLINE_MS

        async def held() -> tuple[str, ...]:
            await look_after()
            return await self._held(item_id, sampled_from_ms)

        patience = self.patience
        await self._until(sale_id, held, patience.quiet, at_least=patience.unseen)
        topic = await self._spans()

        async def unread() -> tuple[str, ...]:
            await look_after()
            return await self._unread(topic)

        await self._until(sale_id, unread, patience.recorded)
        return {number: span.end for number, span in topic.items()}

    async def _held(self, item_id: str, sampled_from_ms: int) -> tuple[str, ...]:
        """What may not be on the topic yet."""
        found = []
        sale = (await self._inventory.sales([item_id])).get(item_id)
        if sale is not None and sale.outbox_length:
            found.append(f"the outbox has {sale.outbox_length} events that Kafka has not")
        for pod in await heartbeat.living(self._redis):
            if pod.sampled_ms < sampled_from_ms:
                found.append(f"pod {pod.pod_id} has not said what it holds")
            elif events_held := pod.unacknowledged.get(item_id, 0):
                found.append(f"pod {pod.pod_id} holds {events_held} events")
        return tuple(found)

    async def _unread(self, topic: Mapping[int, Span]) -> tuple[str, ...]:
        """What of the topic the ledger has not read."""
        stored = await ledger.stored_offsets(self._pool, events.TOPIC)
        late = tuple(
            f"the ledger has read partition {number} to {stored.get(number, 0)} of {span.end}"
            for number, span in sorted(topic.items())
            if stored.get(number, 0) < span.end
        )
        return late or faults(topic, stored)

    async def _until(
        self,
        sale_id: str,
        look: Callable[[], Awaitable[tuple[str, ...]]],
        seconds: float,
        *,
        at_least: float = 0.0,
    ) -> None:
        """Looks until nothing is found, from `at_least` to `seconds`; then raises `Unsettled`."""
        began, told = time.monotonic(), ""
        while True:
            found = await look()
            waited = time.monotonic() - began
            if not found and waited >= at_least:
                return
            if waited >= max(seconds, at_least):
                raise Unsettled(*found)
            tell = found[0] if found else "listening for API pods"
            if tell != told:
                self._progress(f"{sale_id}: {tell}")
                told = tell
            await asyncio.sleep(self.patience.between)
