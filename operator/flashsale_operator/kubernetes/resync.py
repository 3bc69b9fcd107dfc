"""The pass over everything, for what no watch tells: FlashSales that were deleted while nobody
looked, closings that did not reach Redis, and keys of closed sales, to be freed.
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
from flashsale_operator.kubernetes.controller import Clients, Key, Rounds, server_of
from flashsale_operator.kubernetes.queue import Tending

log = logging.getLogger(__name__)

EVERY_SECONDS: Final = 10.0

_DECLARED: Final = """
SELECT * FROM sales WHERE NOT closed AND resource_uid IS NOT NULL ORDER BY sale_id
"""
_HELD: Final = "SELECT *, updated_at FROM sales WHERE sale_id = ANY($1::text[])"


def left_behind(
    declared: Sequence[SaleRow], objects: Sequence[Key], served: Sequence[str]
) -> list[Key]:
    """The FlashSales of unclosed rows that are there no more, in the namespaces served (none: all).

    The rows must have been read before the objects: a row is younger than its FlashSale.
    """
    there = set(objects)
    keys = [Key(*row.sale_id.split("/", 1)) for row in declared]
    return [key for key in keys if key not in there and (not served or key.namespace in served)]


def unclosed(row: SaleRow, sale: Sale) -> bool:
    """Whether the ledger has closed a sale that Redis has not."""
    closed = sale.stored_state in ("closed", "ended") and sale.revision >= row.revision
    return row.closed and not closed


def may_be_freed(row: SaleRow, sale: Sale, closed_for: timedelta, keep: timedelta) -> bool:
    """Whether to try: `free.lua` decides."""
    return (
        row.closed
        and closed_for >= keep
        and sale.revision == row.revision
        and not sale.outbox_length
        and sale.accepted == row.accepted
    )


class Sweep:
    """Passes again and again; a server that is away ends one, and the next one begins anew."""

    def __init__(
        self,
        clients: Clients,
        rounds: Rounds,
        tending: Tending,
        *,
        served: Sequence[str],
        keep_closed: timedelta,
    ) -> None:
        self._kube = clients.kube
        self._inventory = clients.inventory
        self._pool = clients.pool
        self._metrics = clients.metrics
        self._rounds = rounds
        self._tending = tending
        self._served = served
        self._keep_closed = keep_closed
        self.ended = time.monotonic()
        """When the last pass ended, well or not, of the monotonic clock."""

    async def run(self) -> None:
        """Never returns."""
        failing = ""
        while True:
            try:
                await self.sweep()
                self._metrics.last_success.set_to_current_time()
                failing = ""
            except FlashsaleError as error:
                self._metrics.failures.labels(server_of(error)).inc()
                if failing != str(error):
                    log.warning("a pass failed: %s", error)
                failing = str(error)
            self.ended = time.monotonic()
            await asyncio.sleep(EVERY_SECONDS)

    async def sweep(self) -> None:
        """One pass."""
        await self._rounds.prepare()
        async with ledger.translated():
            declared = [SaleRow.of(record) for record in await self._pool.fetch(_DECLARED)]
        objects = await self._objects()
        for key in objects:
            if not self._tending.tends(key):
                self._tending.wake(key)
        for key in left_behind(declared, objects, self._served):
            log.info("%s: its FlashSale is gone", key.sale_id)
            self._tending.wake(key)
        await self._inventory.index([row.item_id for row in declared])
        await self._sweep_held()

    async def _objects(self) -> list[Key]:
        return [
            Key(live["metadata"]["namespace"], live["metadata"]["name"])
            for namespace in self._served or (None,)
            for live in await self._kube.flash_sales(namespace)
        ]

    async def _sweep_held(self) -> None:
        """Looks at the sales that Redis holds."""
        held = await self._inventory.sales(await self._inventory.items(), skip_unreadable=True)
        rows = await self._rows([sale.sale_id for sale in held.values()])
        for sale in held.values():
            if sale.sale_id not in rows:
                continue
            row, updated_at = rows[sale.sale_id]
            if unclosed(row, sale):
                log.info("%s: closing it in Redis, as the ledger says", sale.sale_id)
                await self._close(row, sale)
            elif may_be_freed(row, sale, datetime.now(UTC) - updated_at, self._keep_closed):
                freed = await self._inventory.free(
                    sale.item_id, sale.sale_id, row.revision, row.accepted
                )
                log.info("%s: keys of %s: %s", sale.sale_id, sale.item_id, freed)
                if freed is Freed.FREED:
                    self._metrics.freed.inc()

    async def _close(self, row: SaleRow, sale: Sale) -> None:
        if sale.revision > row.revision:
            # The ledger is an older copy: its revision has to pass Redis' first.
            await self._rounds.close(sale.sale_id)
        else:
            # Not a closing anew: the script refuses this one if it was applied again meanwhile.
            await self._inventory.close(sale.item_id, sale.sale_id, row.revision)

    async def _rows(self, sale_ids: Sequence[str]) -> Mapping[str, tuple[SaleRow, datetime]]:
        async with ledger.translated():
            records = await self._pool.fetch(_HELD, list(sale_ids))
        return {record["sale_id"]: (SaleRow.of(record), record["updated_at"]) for record in records}
