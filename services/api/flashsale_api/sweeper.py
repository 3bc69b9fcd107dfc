"""The sweep: publishes outbox entries that are older than a living pod leaves its own.

The pod that accepted such an entry died, or its call to Redis failed after Redis had executed it.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from flashsale.errors import RedisUnavailable
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale.reservations import OutboxEntry
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
REREAD_SECONDS: Final = 60.0
"""How often a pod reads entries again that it could not read.

A pod of a later version can have published some of them.
"""
BACKLOG: Final = 10_000
"""A pod with this many unacknowledged events does not sweep.

After an outage of Kafka, most of the entries that it would read are its own. Acknowledged events
do not count, because those of a node that is away wait for it and must not stop the other nodes.
"""


@dataclass
class _Unreadable:
    """The entries of an outbox that the pod cannot read. They stay in the outbox."""

    end: str = "-"
    """The sweep begins behind this entry, because it and all older ones are unreadable."""
    reread_at: float = 0.0
    logged: int = 0
    """The number of entries in the last line of the log."""


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
        self._unreadable: dict[str, _Unreadable] = {}

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
        due = await self._measure(now_ms)
        self._unreadable = {item: each for item, each in self._unreadable.items() if item in due}
        for item_id in due:
            try:
                await self._sweep_item(item_id, now_ms[item_id])
            except RedisUnavailable as error:
                log.debug("no sweep of %s: %s", item_id, error)

    async def _measure(self, now_ms: Mapping[str, int]) -> set[str]:
        """Updates the gauges of outboxes. Returns the items with entries that are to be swept.

        `now_ms` is the time by the clock of each item's server.
        """
        lengths = await self._outbox.lengths(now_ms, partial=True)
        oldest = await self._outbox.oldest(
            {item: now_ms[item] + AHEAD_MS for item, length in lengths.items() if length}
        )
        due = set()
        for item_id, length in lengths.items():
            written_ms, ahead = oldest.get(item_id, (now_ms[item_id], False))
            age_ms = now_ms[item_id] - written_ms
            self._metrics.outbox_length.labels(item_id).set(length)
            self._metrics.outbox_age.labels(item_id).set(max(age_ms, 0) / 1000)
            if age_ms > SWEEP_AGE_MS or ahead:
                due.add(item_id)
        return due

    async def _sweep_item(self, item_id: str, now_ms: int) -> None:
        """Publishes the entries of dead pods, and logs how many entries cannot be read.

        A pod logs a changed number once per `REREAD_SECONDS`.
        """
        publisher, now = self._publisher, time.monotonic()
        known = self._unreadable.setdefault(item_id, _Unreadable())
        if reread := now >= known.reread_at:
            known.end, known.reread_at = "-", now + REREAD_SECONDS
        count, first = 0, None
        old = known.end, now_ms - SWEEP_AGE_MS
        ahead = f"{now_ms + AHEAD_MS}", FOREVER_MS
        for begin, until_ms in (old, ahead):
            after = begin
            while after:
                if not publisher.sweepable or publisher.unacknowledged >= BACKLOG:
                    return
                page = await self._outbox.page(
                    item_id, after=after, until_ms=until_ms, count=SWEEP_PAGE
                )
                count += len(page.unreadable)
                first = first or next(iter(page.unreadable.values()), None)
                if after == known.end and not page.entries:
                    known.end = next(reversed(page.unreadable), after)
                if not await self._publish(item_id, page.entries):
                    return
                after = page.last
        if count != known.logged and (reread or not known.logged):
            if count:
                log.error("%s: %s, so its event is not published (1 of %d)", item_id, first, count)
            known.logged = count

    async def _publish(self, item_id: str, entries: Sequence[OutboxEntry]) -> bool:
        """Publishes entries that this pod does not hold. False if another pod has the lease."""
        left = [each for each in entries if not self._publisher.holds(item_id, each.entry_id)]
        if left and not await self._outbox.take_lease(item_id, self._pod_id, SWEEP_LEASE_MS):
            return False
        for entry in left:
            self._publisher.add(entry)
        self._metrics.swept.inc(len(left))
        return True
