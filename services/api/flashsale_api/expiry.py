"""Expires holds that are due. Any pod does it, with neither the operator nor Kafka."""

import asyncio
import logging
from typing import Final

from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.heartbeat import CALL_DEADLINE_SECONDS
from flashsale.inventory import Inventory
from flashsale.reservations import Expired, OutboxEntry
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher
from flashsale_api.sweeper import BACKLOG

log = logging.getLogger(__name__)

INTERVAL_SECONDS: Final = 1.0
LEASE_MS: Final = 3_000
BATCH: Final = 64
"""Holds in one script call. Such a call blocks Redis for about 1 ms."""
BATCHES: Final = 16
"""Calls per item until the next item has its turn."""
PAUSE: Final = 2.0
"""Pause after a call, as a multiple of its duration. It leaves Redis to buyers."""


class Expiry:
    """Expires due holds. A lease lets one pod do it per item, so that Redis has less work."""

    def __init__(
        self,
        inventory: Inventory,
        publisher: Publisher,
        metrics: Metrics,
        engine: Engine,
        *,
        pod_id: str,
    ) -> None:
        self._inventory = inventory
        self._publisher = publisher
        self._metrics = metrics
        self._engine = engine
        self._pod_id = pod_id
        self._unreadable: set[str] = set()

    async def run(self) -> None:
        """Expires holds every `INTERVAL_SECONDS`, and without a pause while more are due."""
        while True:
            more = False
            try:
                more = await self.expire_due()
            except RedisUnavailable as error:
                log.debug("no expiry: %s", error)
            if not more:
                await asyncio.sleep(INTERVAL_SECONDS)

    async def expire_due(self) -> bool:
        """Expires at most `BATCHES` batches of each item. Returns whether an item has more.

        Raises `RedisUnavailable`.
        """
        servers = await self._inventory.servers(await self._inventory.index.items())
        now_ms = {item_id: server.now_ms for item_id, server in servers.items()}
        holds = await self._inventory.holds(now_ms)
        self._metrics.set_holds(holds, now_ms)
        more = False
        for item_id, of_item in holds.items():
            if of_item.overdue and not self._engine.conflict:
                more = await self._guarded(item_id) or more
        return more

    async def _guarded(self, item_id: str) -> bool:
        try:
            return await self._expire(item_id)
        except RedisUnavailable as error:
            log.debug("no expiry of %s: %s", item_id, error)
        except ContractViolation:
            if item_id not in self._unreadable:  # log once, because it stays unreadable
                log.exception("the holds of %s cannot be expired", item_id)
            self._unreadable.add(item_id)
        return False

    async def _expire(self, item_id: str) -> bool:
        if not await self._inventory.lease_expiry(item_id, self._pod_id, LEASE_MS):
            return False
        loop = asyncio.get_running_loop()
        for _ in range(BATCHES):
            started = loop.time()
            reply = await self._inventory.expire(
                item_id,
                BATCH,
                timeout_seconds=CALL_DEADLINE_SECONDS / 2,
                engine_id=self._engine.id,
            )
            seconds = loop.time() - started
            if not isinstance(reply, Expired) or seconds >= CALL_DEADLINE_SECONDS:
                return False
            self._publish(item_id, reply)
            if len(reply.holds) < BATCH:
                return False
            await asyncio.sleep(seconds * PAUSE)
        return True

    def _publish(self, item_id: str, reply: Expired) -> None:
        """Publishes the events. A pod with a backlog leaves them in the outbox for the sweep."""
        label = self._metrics.label(item_id)
        self._metrics.transitions.labels(label, "expire", "changed").inc(len(reply.holds))
        if self._publisher.unacknowledged >= BACKLOG:
            return
        for reservation_id, entry_id, record in reply.holds:
            entry = OutboxEntry(item_id, entry_id, reservation_id, record, reply.snapshot, "")
            self._publisher.add(entry)
