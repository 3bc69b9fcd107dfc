"""Finds out whether anything of a sale is missing, before its Redis state is trusted again.

The order is what makes it a proof. First nobody may hold an event that Kafka lacks: the outbox is
empty, and every pod that lives has said, after the last call that it can have had in flight, that
it holds nothing. Then the topic's ends cover every event there will be. Then the ledger has read
that far. Only then do equal counts mean that nothing is missing.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import asyncpg
from redis.asyncio import Redis

from flashsale import events, heartbeat, ledger
from flashsale.inventory import Inventory
from flashsale_operator.reconcile import Differs, Verification, Verified
from flashsale_operator.topic import KafkaUnavailable, Span, faults

CALL_DEADLINE_MS: Final = 1_500
"""Longer than an API pod waits for a script, so that what it may have accepted before the
verification began is in its heartbeat that much later."""

Progress = Callable[[str], None]
Spans = Callable[[], Awaitable[Mapping[int, Span]]]
_Differences = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds.

    `unseen`: after a flush a living pod is not in the pods' set until it beats again. `quiet`: for
    pods to publish what they hold. `recorded`: for the ledger to read what is on the topic.
    """

    unseen: float = heartbeat.EXPIRY_SECONDS
    quiet: float = 30.0
    recorded: float = 60.0
    between: float = 0.2


class Barrier:
    """Verifies sales; `progress` is told what is waited for, when that changes."""

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
        self._patience = patience
        self._progress = progress

    async def verify(self, sale_id: str, item_id: str) -> Verification:
        """Says whether Redis and ledger have the same units of the sale, and lack none.

        Raises `RedisUnavailable` and `LedgerUnavailable`.
        """
        run_id = (await self._inventory.server()).run_id
        if found := await self.settled(sale_id, item_id):
            return Differs(found)
        return await self._compare(sale_id, item_id, run_id)

    async def settled(self, sale_id: str, item_id: str) -> _Differences:
        """Waits until the ledger has everything of a fenced sale that was not lost.

        That is: the outbox is empty, every living pod holds nothing of the item, and the ledger
        has read the topic to where it ended then. Returns what is not so at the deadline.
        """
        sampled_from_ms = (await self._inventory.server()).now_ms + CALL_DEADLINE_MS

        async def held() -> _Differences:
            return await self._held(item_id, sampled_from_ms)

        patience = self._patience
        if found := await self._until(sale_id, held, patience.quiet, at_least=patience.unseen):
            return found
        try:
            topic = await self._spans()
        except KafkaUnavailable as error:
            return (str(error),)

        async def unread() -> _Differences:
            return await self._unread(topic)

        return await self._until(sale_id, unread, patience.recorded)

    async def _held(self, item_id: str, sampled_from_ms: int) -> _Differences:
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

    async def _unread(self, topic: Mapping[int, Span]) -> _Differences:
        """What of the topic the ledger has not read."""
        stored = await ledger.stored_offsets(self._pool, events.TOPIC)
        late = tuple(
            f"the ledger has read partition {number} to {stored.get(number, 0)} of {span.end}"
            for number, span in sorted(topic.items())
            if stored.get(number, 0) < span.end
        )
        return late or faults(topic, stored)

    async def _compare(self, sale_id: str, item_id: str, run_id: str) -> Verification:
        if (await self._inventory.server()).run_id != run_id:
            return Differs(("Redis restarted in the meantime",))
        sale = (await self._inventory.sales([item_id])).get(item_id)
        row = await ledger.sale(self._pool, sale_id)
        held = sale.accepted if sale is not None and sale.sale_id == sale_id else 0
        recorded = 0 if row is None else row.accepted
        if held == recorded:
            return Verified(recorded, run_id)
        return Differs((f"Redis has {held} accepted units and the ledger {recorded}",))

    async def _until(
        self,
        sale_id: str,
        look: Callable[[], Awaitable[_Differences]],
        seconds: float,
        *,
        at_least: float = 0.0,
    ) -> _Differences:
        """Looks until nothing is found, from `at_least` to `seconds`; returns what is left."""
        began, told = time.monotonic(), ""
        while True:
            found = await look()
            waited = time.monotonic() - began
            if (not found and waited >= at_least) or waited >= max(seconds, at_least):
                return found
            tell = found[0] if found else "listening for API pods"
            if tell != told:
                self._progress(f"{sale_id}: verifying: {tell}")
                told = tell
            await asyncio.sleep(self._patience.between)
