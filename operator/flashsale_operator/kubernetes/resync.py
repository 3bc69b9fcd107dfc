"""Resync everything periodically, to find changes that no watch reports.

These are FlashSales that were deleted while no operator ran, closed sales that are still open in
Redis, and the keys of closed sales, which can be freed.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from flashsale import ledger
from flashsale.errors import FlashsaleError
from flashsale.inventory import Freed
from flashsale.ledger import SaleRow
from flashsale.sale import Sale
from flashsale_operator.kubernetes.controller import Clients, Controller, server_of
from flashsale_operator.kubernetes.queue import Key, Queue
from flashsale_operator.sales import engine as engines

log = logging.getLogger(__name__)

RESYNC_SECONDS: Final = 10.0

_DECLARED: Final = """
SELECT * FROM sales WHERE NOT closed AND resource_uid IS NOT NULL ORDER BY sale_id
"""
_HELD: Final = "SELECT *, updated_at FROM sales WHERE sale_id = ANY($1::text[])"


def left_behind(
    declared: Sequence[SaleRow], objects: Sequence[Key], served: Sequence[str]
) -> list[Key]:
    """Returns the deleted FlashSales of unclosed rows, in the served namespaces (none means all).

    The rows must be read before the objects, because a row is younger than its FlashSale.
    """
    present = set(objects)
    keys = [Key.of(row.sale_id) for row in declared]
    return [key for key in keys if key not in present and (not served or key.namespace in served)]


def unclosed(row: SaleRow, sale: Sale) -> bool:
    """Whether the sale is closed in the ledger but not in Redis."""
    closed = sale.stored_state in ("closed", "ended") and sale.revision >= row.revision
    return row.closed and not closed


def may_be_freed(row: SaleRow, sale: Sale, closed_for: timedelta, keep: timedelta) -> bool:
    """Whether to try to free the keys of a closed sale. `free.lua` decides."""
    return (
        row.closed
        and closed_for >= keep
        and sale.revision == row.revision
        and not sale.outbox_length
        and sale.accepted == row.accepted
    )


class Resync:
    """Resyncs periodically. An outage ends one resync, and the next one starts again."""

    def __init__(
        self,
        clients: Clients,
        controller: Controller,
        queue: Queue,
        *,
        served: Sequence[str],
        keep_closed: timedelta,
    ) -> None:
        self._kube = clients.kube
        self._inventory = clients.inventory
        self._pool = clients.pool
        self._metrics = clients.metrics
        self._controller = controller
        self._queue = queue
        self._served = served
        self._keep_closed = keep_closed
        self.ended = time.monotonic()
        """When the last resync ended, successfully or not, on the monotonic clock."""

    async def run(self) -> None:
        """Resyncs until it is cancelled."""
        failing = ""
        while True:
            try:
                await self.resync()
                self._metrics.last_success.set_to_current_time()
                failing = ""
            except FlashsaleError as error:
                self._metrics.failures.labels(server_of(error)).inc()
                if failing != str(error):
                    log.warning("resync failed: %s", error)
                failing = str(error)
            self.ended = time.monotonic()
            await asyncio.sleep(RESYNC_SECONDS)

    async def resync(self) -> None:
        """Resyncs once."""
        await self._controller.prepare()
        engine_id = await engines.engine_id(self._inventory, self._pool)
        async with ledger.translated():
            declared = [SaleRow.of(record) for record in await self._pool.fetch(_DECLARED)]
        objects = await self._objects()
        for key in objects:
            if key not in self._queue:
                self._queue.wake(key)
        for key in left_behind(declared, objects, self._served):
            log.info("%s: its FlashSale was deleted", key.sale_id)
            self._queue.wake(key)
        await self._inventory.index([row.item_id for row in declared])
        await self._resync_redis(engine_id)

    async def _objects(self) -> list[Key]:
        return [
            Key(live["metadata"]["namespace"], live["metadata"]["name"])
            for namespace in self._served or (None,)
            for live in await self._kube.flash_sales(namespace)
        ]

    async def _resync_redis(self, engine_id: str) -> None:
        """Closes and frees sales in Redis that the ledger has closed."""
        held = await self._inventory.sales(await self._inventory.items(), skip_unreadable=True)
        rows = await self._rows([sale.sale_id for sale in held.values()])
        for sale in held.values():
            if sale.sale_id not in rows:
                continue
            row, updated_at = rows[sale.sale_id]
            if unclosed(row, sale):
                log.info("%s: closed in the ledger, closing it in Redis", sale.sale_id)
                await self._close(row, sale, engine_id)
            elif may_be_freed(row, sale, datetime.now(UTC) - updated_at, self._keep_closed):
                freed = await self._inventory.free(
                    sale.item_id, sale.sale_id, row.revision, row.accepted, engine_id
                )
                log.info("%s: freeing the keys of %s: %s", sale.sale_id, sale.item_id, freed)
                if freed is Freed.FREED:
                    self._metrics.freed.inc()

    async def _close(self, row: SaleRow, sale: Sale, engine_id: str) -> None:
        if sale.revision > row.revision:
            # The ledger is an older copy: its revision must rise above Redis' first.
            await self._controller.close(sale.sale_id)
        else:
            # The script refuses this close if the manifest was applied again since.
            await self._inventory.close(sale.item_id, sale.sale_id, row.revision, engine_id)

    async def _rows(self, sale_ids: Sequence[str]) -> Mapping[str, tuple[SaleRow, datetime]]:
        async with ledger.translated():
            records = await self._pool.fetch(_HELD, list(sale_ids))
        return {record["sale_id"]: (SaleRow.of(record), record["updated_at"]) for record in records}
