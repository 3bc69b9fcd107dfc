"""Carries decisions out against ledger and Redis, in the order that keeps stock from being made
twice; the only writer of what a manifest says into the ledger's `sales`.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final

import asyncpg

from flashsale import ledger
from flashsale.errors import ContractViolation, FlashsaleError, RedisUnavailable
from flashsale.inventory import Applied, Closed, Inventory
from flashsale.ledger import SaleRow
from flashsale.sale import Predecessor, Sale, SaleSpec, SaleState, utc_of_ms
from flashsale_operator.sales.decision import (
    Apply,
    Done,
    Kept,
    Observed,
    Reason,
    Rebuild,
    WriteRow,
    decide,
    spec_of,
    state_of,
)
from flashsale_operator.sales.rebuild import Rebuilt

MAX_STEPS: Final = 16
"""Steps of one reconcile: a quiet one takes three, each race with another a few more."""

_TOLD_REDIS: Final = frozenset({Applied.SEEDED, Applied.CHANGED})
_STUCK: Final = {
    Applied.FENCED: "Redis fences the sale again and again: does the server restart?",
}

# One writer an item at a time, so that of two new sales for one item one sees the other's row.
_LOCK_ITEM: Final = "SELECT pg_advisory_xact_lock(hashtextextended('flashsale:' || $1, 0))"
_OTHERS: Final = "SELECT sale_id, revision FROM sales WHERE item_id = $1 AND sale_id <> $2"
_WRITE: Final = """
INSERT INTO sales AS s (sale_id, item_id, display_name, allocated, max_per_user, starts_at,
                        ends_at, paused, revision, capacity, resource_uid)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9::bigint + 1, $4, $10)
ON CONFLICT (sale_id) DO UPDATE SET
  display_name = excluded.display_name, allocated = excluded.allocated,
  max_per_user = excluded.max_per_user, starts_at = excluded.starts_at,
  ends_at = excluded.ends_at, paused = excluded.paused, closed = false,
  revision = greatest(s.revision, $9) + 1,
  capacity = greatest(s.capacity, excluded.allocated + s.released),
  resource_uid = coalesce(excluded.resource_uid, s.resource_uid), updated_at = now()
WHERE s.item_id = excluded.item_id
  AND (s.revision < $9
       OR (s.display_name, s.allocated, s.max_per_user, s.starts_at, s.ends_at, s.paused, s.closed)
          IS DISTINCT FROM
          (excluded.display_name, excluded.allocated, excluded.max_per_user, excluded.starts_at,
           excluded.ends_at, excluded.paused, false))
RETURNING revision
"""
_ADOPT: Final = "UPDATE sales SET resource_uid = $2 WHERE sale_id = $1"
_CLOSE: Final = """
UPDATE sales SET closed = true, revision = greatest(revision, $2) + 1, updated_at = now()
WHERE sale_id = $1 AND (NOT closed OR revision < $2)
"""


class UnknownSale(FlashsaleError):
    """The ledger has no such sale, or no sale of such an item."""


@dataclass(frozen=True, slots=True)
class Report:
    """How a reconcile or a close ended. `applied` is what it did to Redis, at its most; `rebuilt`
    what came back of a fenced sale; `kept` why it is fenced still.
    """

    sale_id: str
    item_id: str
    state: SaleState
    reason: Reason
    message: str
    applied: Applied | Closed
    sale: Sale | None
    row: SaleRow | None
    rebuilt: Rebuilt | None = None
    kept: Kept | None = None

    @property
    def ready(self) -> bool:
        """Whether Redis and ledger are as the manifest asks."""
        return self.reason in (Reason.APPLIED, Reason.CLOSED)


Rebuilder = Callable[[SaleRow, Predecessor | None], Awaitable[Rebuilt | Kept]]
"""`rebuild.Rebuild.rebuild`, or what does it beside the caller."""


class Steward:
    """Makes ledger and Redis agree with manifests. Any number may work at once.

    Methods raise `RedisUnavailable`, `LedgerUnavailable` and `ContractViolation`; doing them
    again continues where they ended.
    """

    def __init__(
        self, inventory: Inventory, pool: "asyncpg.Pool[asyncpg.Record]", rebuild: Rebuilder
    ) -> None:
        self._inventory = inventory
        self._pool = pool
        self._rebuild = rebuild

    async def reconcile(self, spec: SaleSpec, resource_uid: str | None = None) -> Report:
        """Does what `decide` says until nothing is left to do now.

        `resource_uid` is the FlashSale's: when it is gone, its sale is to be closed.
        """
        written: int | None = None
        seeded = False
        rebuilt: Rebuilt | None = None
        kept: Kept | None = None
        applied = answer = Applied.UNCHANGED
        for _ in range(MAX_STEPS):
            observed = await self._observe(spec, written, seeded=seeded, kept=kept)
            match decide(spec, observed):
                case WriteRow() as step:
                    written = await self._write_row(spec, step, resource_uid) or written
                case Rebuild(row, replaces):
                    match await self._rebuild(row, replaces):
                        case Rebuilt() as rebuilt:
                            pass
                        case Kept() as kept:
                            pass
                case Apply() as step:
                    seeded = seeded or step.seed_until_ms is not None
                    answer = await self._inventory.apply(
                        spec_of(step.row),
                        step.row.revision,
                        seed_until_ms=step.seed_until_ms,
                        replaces=step.replaces,
                    )
                    if answer is Applied.UNSUPPORTED:
                        raise ContractViolation(
                            f"{spec.item_id}: Redis has a sale that this version cannot read"
                        )
                    if answer in _TOLD_REDIS:
                        applied = answer
                case Done(state, reason, message):
                    await self._adopt(observed.row, resource_uid)
                    report = _report(spec, observed, applied, (state, reason, message))
                    return replace(report, rebuilt=rebuilt)
        message = _STUCK.get(answer, "others keep changing the sale; apply it again")
        return _report(spec, observed, applied, (SaleState.UNKNOWN, Reason.UNSETTLED, message))

    async def close(self, sale_id: str) -> Report:
        """Closes a sale in the ledger and then in Redis, where its keys may be gone.

        Raises `UnknownSale` if the ledger has no row of it.
        """
        row = await self._close_row(sale_id)
        closed = await self._inventory.close(row.item_id, sale_id, row.revision)
        server = await self._inventory.server()
        sale = (await self._inventory.sales([row.item_id])).get(row.item_id)
        if closed is Closed.STALE and sale is not None:
            row = await ledger.sale(self._pool, sale_id) or row
            if row.closed:
                # Not another apply: the ledger is an older copy, below Redis' revision.
                row = await self._close_row(sale_id, above=sale.revision)
                closed = await self._inventory.close(row.item_id, sale_id, row.revision)
                sale = (await self._inventory.sales([row.item_id])).get(row.item_id)
        if closed is Closed.UNSUPPORTED:
            raise ContractViolation(
                f"{row.item_id}: Redis has a sale that this version cannot read"
            )
        superseded = not row.closed or closed is Closed.STALE
        return Report(
            sale_id=sale_id,
            item_id=row.item_id,
            state=state_of(row, sale, server),
            reason=Reason.SUPERSEDED if superseded else Reason.CLOSED,
            message="it was applied again meanwhile"
            if superseded
            else f"{row.accepted} units recorded",
            applied=closed,
            sale=sale,
            row=row,
        )

    async def sales_to_close(self, item_id: str) -> list[str]:
        """The sales of an item that a person who closes the item means.

        They are the one that Redis holds and the unfinished ones; if there are none, the finished
        ones, which are closed already. Raises `UnknownSale` if there is no sale of the item.
        """
        server = await self._inventory.server()
        held = (await self._inventory.sales([item_id])).get(item_id)
        rows = await ledger.sales(self._pool, item_id)
        now = utc_of_ms(server.now_ms)
        meant = {row.sale_id for row in rows if not row.finished(now)}
        if held is not None:
            meant.add(held.sale_id)
        if not meant and not rows:
            raise UnknownSale(f"{item_id}: there is no sale of this item")
        return sorted(meant or {row.sale_id for row in rows})

    async def _observe(
        self, spec: SaleSpec, written: int | None, *, seeded: bool, kept: Kept | None
    ) -> Observed:
        server = await self._inventory.server()
        held = await self._inventory.sales([spec.item_id])
        row = await ledger.sale(self._pool, spec.sale_id)
        others = await ledger.sales(self._pool, spec.item_id)
        return Observed(
            server=server,
            sale=held.get(spec.item_id),
            row=row,
            others=tuple(other for other in others if other.sale_id != spec.sale_id),
            written=written,
            seeded=seeded,
            kept=kept,
        )

    async def _close_row(self, sale_id: str, *, above: int = 0) -> SaleRow:
        async with ledger.translated():
            await self._pool.execute(_CLOSE, sale_id, above)
        row = await ledger.sale(self._pool, sale_id)
        if row is None:
            raise UnknownSale(f"{sale_id}: the ledger has no such sale; apply its manifest first")
        return row

    async def _adopt(self, row: SaleRow | None, resource_uid: str | None) -> None:
        """Notes whose sale it is, where another FlashSale or flashsalectl made the row."""
        if row is not None and resource_uid is not None and row.resource_uid != resource_uid:
            async with ledger.translated():
                await self._pool.execute(_ADOPT, row.sale_id, resource_uid)

    async def _write_row(
        self, spec: SaleSpec, step: WriteRow, resource_uid: str | None
    ) -> int | None:
        """Writes the manifest into the ledger; returns the new revision, or None if the row says
        the same already or the item's other rows are not what was observed.
        """
        async with (
            ledger.translated(),
            self._pool.acquire() as connection,
            connection.transaction(),
        ):
            await connection.execute(_LOCK_ITEM, spec.item_id)
            there = await connection.fetch(_OTHERS, spec.item_id, spec.sale_id)
            if {(r["sale_id"], r["revision"]) for r in there} != {
                (other.sale_id, other.revision) for other in step.others
            }:
                return None
            revision: int | None = await connection.fetchval(
                _WRITE,
                spec.sale_id,
                spec.item_id,
                spec.display_name,
                spec.stock,
                spec.max_per_user,
                None if spec.starts_ms is None else utc_of_ms(spec.starts_ms),
                None if spec.ends_ms is None else utc_of_ms(spec.ends_ms),
                spec.paused,
                step.above,
                resource_uid,
            )
            return revision


async def refuse_eviction(inventory: Inventory) -> None:
    """Raises `RedisUnavailable` if Redis may drop a sale's keys when its memory is full."""
    policy = await inventory.eviction_policy()
    if policy != "noeviction":
        raise RedisUnavailable(
            f"Redis' maxmemory-policy is {policy}: it must be noeviction, "
            "or a full Redis drops sales (CONFIG SET maxmemory-policy noeviction)"
        )


def _report(
    spec: SaleSpec, observed: Observed, applied: Applied, outcome: tuple[SaleState, Reason, str]
) -> Report:
    state, reason, message = outcome
    return Report(
        sale_id=spec.sale_id,
        item_id=spec.item_id,
        state=state,
        reason=reason,
        message=message,
        applied=applied,
        sale=observed.sale,
        row=observed.row,
        kept=observed.kept,
    )
