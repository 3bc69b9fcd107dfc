"""Resync everything periodically, to find changes that no watch reports.

- FlashSales that were deleted while no operator ran.
- Closed sales that are still open in Redis.
- Finished sales that no FlashSale declares, and that Redis lost after their end, with open holds,
  or before the ledger had all their units, or has from before their last rebuild.
- Sales of namespaces that the operator neither serves nor may list.
- Keys of closed sales, which can be freed.
- Items that Redis' index lacks, or should not have.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Final, TypeAlias

from flashsale import ledger
from flashsale.errors import FlashsaleError, RedisMoved
from flashsale.inventory import Freed
from flashsale.ledger import SaleRow
from flashsale.sale import Sale, utc_of_ms
from flashsale_operator.kubernetes.client import KubeForbidden
from flashsale_operator.kubernetes.controller import Clients, Controller
from flashsale_operator.kubernetes.failures import MISTAKES, server_of
from flashsale_operator.kubernetes.queue import Key, Queue, Urgency
from flashsale_operator.kubernetes.rebuilds import Rebuilds
from flashsale_operator.kubernetes.reporting import unknown
from flashsale_operator.sales import engine, index
from flashsale_operator.sales.decision import Reason, last_of_items, needs_rebuild

log = logging.getLogger(__name__)

RESYNC_SECONDS: Final = 10.0
RETRY_SECONDS: Final = 2.0
"""Between two resyncs until the operator is ready."""
STUCK_SECONDS: Final = 180.0
"""A resync ends within seconds, also during outages, unless it migrates the ledger. After this long
without one, the process is stuck."""

_DECLARED: Final = """
SELECT * FROM sales WHERE NOT closed AND resource_uid IS NOT NULL ORDER BY sale_id
"""
_Objects: TypeAlias = dict[str | None, list[Key]]
_ROWS: Final = "SELECT * FROM sales WHERE sale_id = ANY($1::text[])"


def left_behind(
    declared: Sequence[SaleRow], objects: Mapping[str | None, Sequence[Key]]
) -> list[Key]:
    """Returns the deleted FlashSales of unclosed rows.

    `objects` are the FlashSales by the namespace that was listed. None means all namespaces. The
    rows must be read before the objects, because a row is younger than its FlashSale.
    """
    present = {key for listed in objects.values() for key in listed}
    keys = [Key.of(row.sale_id) for row in declared]
    return [
        key for key in keys if key not in present and (None in objects or key.namespace in objects)
    ]


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
        and not sale.held
        and not row.held
        and (sale.accepted, sale.released) == (row.accepted, row.released)
    )


class Resync:
    """Resyncs periodically. An outage ends one resync, and the next one starts again."""

    def __init__(  # noqa: PLR0913 - the parts of the process that it works with
        self,
        clients: Clients,
        controller: Controller,
        queue: Queue,
        rebuilds: Rebuilds,
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
        self._rebuilds = rebuilds
        self._served = served
        self._keep_closed = keep_closed
        self._refused: set[str | None] = set()
        self._unserved: set[Key] = set()
        self.ended = time.monotonic()
        """When the last resync ended, successfully or not, on the monotonic clock."""
        self.unready: str | None = "no resync has ended yet"
        """Why the operator cannot work, or None if a resync succeeded. Later outages do not count,
        but a mistake of a person does."""

    @property
    def stuck(self) -> bool:
        """Whether the process does nothing any more. A large ledger is migrated for minutes."""
        since = time.monotonic() - self.ended
        return since > STUCK_SECONDS and not self._controller.migrating

    async def run(self) -> None:
        """Resyncs until it is cancelled."""
        failing = ""
        while True:
            try:
                await self.resync()
                self._metrics.last_success.set_to_current_time()
                failing, self.unready = "", None
            except Exception as error:
                self._metrics.failures.labels(server_of(error)).inc()
                bug = not isinstance(error, FlashsaleError)
                mistake = isinstance(error, MISTAKES)
                said = f"{type(error).__name__}: {error}" if bug else str(error)
                if failing != said:
                    level = logging.ERROR if bug or mistake else logging.WARNING
                    log.log(level, "resync failed: %s", said, exc_info=error if bug else None)
                failing = said
                if self.unready is not None or mistake:
                    self.unready = " ".join(said.split())
            self.ended = time.monotonic()
            await asyncio.sleep(RESYNC_SECONDS if self.unready is None else RETRY_SECONDS)

    async def resync(self) -> None:
        """Resyncs once."""
        try:
            await self._controller.prepare()
        except RedisMoved:
            await self._controller.stop_all_outdated()  # also sales without a FlashSale
            raise
        engine_id = await engine.claimed_id(self._inventory, self._pool)
        rows = await index.refresh(self._inventory, self._pool, keep_closed=self._keep_closed)
        async with ledger.translated():
            declared = [SaleRow.of(record) for record in await self._pool.fetch(_DECLARED)]
        served, others = await self._objects(declared)
        refused = set(self._served).difference(served)  # their metrics tell it
        unread = [key for row in declared if (key := Key.of(row.sale_id)).namespace in refused]
        for key in chain(unread, *served.values()):
            if key not in self._queue:
                self._queue.wake(key)
        self._show_unserved(declared, others)
        for key in left_behind(declared, served):
            log.info("%s: its FlashSale was deleted", key.sale_id)
            self._queue.wake(key, Urgency.CHANGED)
        for key in left_behind(declared, others):
            if await self._kube.flash_sale(*key) is None:
                log.info("%s: its FlashSale was deleted", key.sale_id)
                await self._controller.close_deleted(key)
        await self._resync_redis(engine_id)
        await self._rebuild_finished(rows)

    async def _objects(self, declared: Sequence[SaleRow]) -> tuple[_Objects, _Objects]:
        """Returns the FlashSales of the served namespaces, and of the others that have open sales.

        A namespace that the operator's account may not list is left out. A Role ends with its
        namespace, so an account with Roles alone cannot see that a namespace is gone.
        """
        served = await self._listed(self._served or (None,))
        if not self._served:
            return served, {}
        if not served:
            raise KubeForbidden(f"the account may list no FlashSales in {', '.join(self._served)}")
        namespaces = {Key.of(row.sale_id).namespace for row in declared}
        return served, await self._listed(sorted(namespaces.difference(self._served)))

    def _show_unserved(self, declared: Sequence[SaleRow], others: _Objects) -> None:
        """Shows that sales of namespaces that are neither served nor listed are unknown.

        Such a namespace was probably served before. Its sales still sell, but this operator carries
        out no change, rebuilds no fenced sale, and does not notice a deleted FlashSale.
        """
        now = datetime.now(UTC)
        keys = {Key.of(row.sale_id) for row in declared if self._served and not row.finished(now)}
        unserved = {key for key in keys if key.namespace not in {*self._served, *others}}
        for key in self._unserved - unserved:
            self._metrics.sales.forget(key)
        for key in unserved:
            message = "the operator does not serve the namespace, and may not list it"
            self._metrics.sales.update(key, unknown(key, Reason.FAILED, message))
        self._unserved = unserved

    async def _listed(self, namespaces: Iterable[str | None]) -> _Objects:
        found = {}
        for namespace in namespaces:
            try:
                listed = await self._kube.flash_sales(namespace)
            except KubeForbidden as error:
                if namespace is None:
                    raise
                if namespace not in self._refused:
                    log.warning("namespace %s is left out: %s", namespace, error)
                self._refused.add(namespace)
                continue
            self._refused.discard(namespace)
            found[namespace] = [
                Key(live["metadata"]["namespace"], live["metadata"]["name"]) for live in listed
            ]
        return found

    async def _rebuild_finished(self, rows: Sequence[SaleRow]) -> None:
        """Rebuilds finished sales that no reconcile rebuilds, because no FlashSale declares them.

        They would otherwise keep their holds or their item, or answer no order.
        """
        last = last_of_items(rows)
        undeclared = [row for row in rows if row.closed or row.resource_uid is None]
        if not undeclared:
            return
        servers = await self._inventory.servers({row.item_id for row in undeclared})
        sales = await self._inventory.sales(servers, skip_unreadable=True)
        for row in undeclared:
            if (server := servers.get(row.item_id)) is None:
                continue  # the item's node is away
            if not row.finished(utc_of_ms(server.now_ms)):
                continue
            if needs_rebuild(row, sales.get(row.item_id), server, last=row.sale_id in last):
                try:
                    await self._rebuilds.rebuild(row, wakes=False)
                except FlashsaleError as error:
                    self._metrics.failures.labels(server_of(error)).inc()
                    log.warning("%s: not rebuilt yet: %s", row.sale_id, error)
            elif (done := self._rebuilds.outcome(row.sale_id, wakes=False)) is not None:
                self._metrics.rebuilds.inc()
                self._rebuilds.reported(row.sale_id, done)

    async def _resync_redis(self, engine_id: str) -> None:
        """Closes and frees sales in Redis that the ledger has closed."""
        items = await self._inventory.index.items()
        sales = (await self._inventory.sales(items, skip_unreadable=True)).values()
        rows = await self._rows([sale.sale_id for sale in sales])
        for sale in sales:
            if sale.sale_id not in rows:
                continue
            row, updated_at = rows[sale.sale_id]
            if unclosed(row, sale):
                log.info("%s: closed in the ledger, closing it in Redis", sale.sale_id)
                reconciler = self._controller.reconciler
                if sale.revision > row.revision:
                    # The ledger is an older copy: its revision must rise above Redis' first.
                    await reconciler.close(sale.sale_id)
                else:
                    # Closes nothing if the manifest was applied again since.
                    await reconciler.stop_outdated(sale.sale_id, engine_id)
            elif may_be_freed(row, sale, datetime.now(UTC) - updated_at, self._keep_closed):
                freed = await self._inventory.free(
                    sale.item_id,
                    sale.sale_id,
                    row.revision,
                    accepted=row.accepted,
                    released=row.released,
                    engine_id=engine_id,
                )
                log.info("%s: freeing the keys of %s: %s", sale.sale_id, sale.item_id, freed)
                if freed is Freed.FREED:
                    self._metrics.freed.inc()

    async def _rows(self, sale_ids: Sequence[str]) -> Mapping[str, tuple[SaleRow, datetime]]:
        async with ledger.translated():
            records = await self._pool.fetch(_ROWS, list(sale_ids))
        return {record["sale_id"]: (SaleRow.of(record), record["updated_at"]) for record in records}
