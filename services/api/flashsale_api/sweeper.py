"""The sweep: publishes outbox entries that are older than a living pod leaves its own.

The pod that accepted such an entry died, or its call to Redis failed after Redis had executed it.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Final

from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale_api.known_items import KnownItems
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher

log = logging.getLogger(__name__)

INTERVAL_SECONDS: Final = 1.0
SWEEP_AGE_MS: Final = 3_000
"""Age at which another pod's entry is swept."""
AHEAD_MS: Final = 60_000
"""An entry this far ahead of the server's clock is swept at once.

The clock was ahead when it was written, so its age is unknown.
"""
FOREVER_MS: Final = 2**53
SWEEP_LEASE_MS: Final = 10_000
SWEEP_PAGE: Final = 500
BACKLOG: Final = 10_000
"""A pod with this many unacknowledged events does not sweep.

After an outage of Kafka, most of the entries that it would read are its own. Acknowledged events
do not count, because those of a node that is away wait for it and must not stop the other nodes.
"""


class Sweeper:
    """Publishes the outbox entries of dead pods. A lease lets one pod sweep an item at a time."""

    def __init__(  # noqa: PLR0913 - the parts that it reads and tells
        self,
        inventory: Inventory,
        outbox: Outbox,
        publisher: Publisher,
        metrics: Metrics,
        *,
        known: KnownItems,
        pod_id: str,
    ) -> None:
        self._known = known
        self._inventory = inventory
        self._outbox = outbox
        self._publisher = publisher
        self._metrics = metrics
        self._pod_id = pod_id
        self._unreadable: set[tuple[str, str]] = set()
        """The entries that were logged: item id, entry id. They stay unreadable."""

    async def run(self) -> None:
        """Sweeps all outboxes every `INTERVAL_SECONDS` until it is cancelled."""
        while True:
            try:
                await self.sweep()
            except RedisUnavailable as error:
                log.debug("no sweep: %s", error)
            await asyncio.sleep(INTERVAL_SECONDS)

    async def sweep(self) -> None:
        """Sweeps the outboxes of all items once. Raises `RedisUnavailable`."""
        items, claimed = await self._inventory.index.read()
        if claimed is not None:
            self._known.looked(items, claimed=claimed)
        servers = await self._inventory.servers(items)
        now_ms = {item_id: server.now_ms for item_id, server in servers.items()}
        self._metrics.set_items(items)
        for item_id in await self._measure(now_ms):
            try:
                await self._sweep_item(item_id, "-", now_ms[item_id] - SWEEP_AGE_MS)
                await self._sweep_item(item_id, f"{now_ms[item_id] + AHEAD_MS}", FOREVER_MS)
            except RedisUnavailable as error:
                log.debug("no sweep of %s: %s", item_id, error)

    async def _measure(self, now_ms: Mapping[str, int]) -> list[str]:
        """Updates the gauges of outboxes. Returns the items whose outbox has entries.

        `now_ms` is the time by the clock of each item's server.
        """
        lengths = await self._outbox.lengths(now_ms, partial=True)
        filled = [item_id for item_id, length in lengths.items() if length]
        oldest_ms = await self._outbox.oldest_ms(filled)
        for item_id, length in lengths.items():
            self._metrics.outbox_length.labels(item_id).set(length)
            age_ms = now_ms[item_id] - oldest_ms.get(item_id, now_ms[item_id])
            self._metrics.outbox_age.labels(item_id).set(max(age_ms, 0) / 1000)
        return filled

    async def _sweep_item(self, item_id: str, after: str, until_ms: int) -> None:
        publisher = self._publisher
        while publisher.sweepable and publisher.unacknowledged < BACKLOG:
            page = await self._outbox.page(
                item_id, after=after, until_ms=until_ms, count=SWEEP_PAGE
            )
            self._log_unreadable(item_id, page.unreadable)
            left = [entry for entry in page.entries if not publisher.holds(item_id, entry.entry_id)]
            if left and not await self._outbox.take_lease(item_id, self._pod_id, SWEEP_LEASE_MS):
                return
            for entry in left:
                publisher.add(entry)
            self._metrics.swept.inc(len(left))
            if not page.last:
                return
            after = page.last

    def _log_unreadable(self, item_id: str, unreadable: Mapping[str, ContractViolation]) -> None:
        for entry_id, error in unreadable.items():
            if (item_id, entry_id) not in self._unreadable:
                log.error("%s: %s, so its event is not published", item_id, error)
            self._unreadable.add((item_id, entry_id))
