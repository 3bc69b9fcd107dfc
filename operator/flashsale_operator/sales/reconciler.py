"""Carry out decisions against the ledger and Redis.

The reconciler alone writes manifests into the ledger's `sales` table. It writes the row before it
changes Redis.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from flashsale import ledger
from flashsale.errors import ContractViolation, FlashsaleError
from flashsale.inventory import Applied, Closed, Inventory
from flashsale.ledger import SaleRow
from flashsale.sale import Predecessor, Sale, SaleSpec, SaleState, utc_of_ms
from flashsale_operator.sales import engine
from flashsale_operator.sales.decision import (
    Apply,
    Done,
    Observed,
    Reason,
    Rebuild,
    StillFenced,
    WriteRow,
    counted,
    decide,
    spec_of,
    state_of,
)
from flashsale_operator.sales.rebuild import Rebuilt
from flashsale_operator.sales.recovery import Recovery

MAX_STEPS: Final = 16
"""Steps of one reconcile. A quiet one takes one to three, and each race adds a few."""

_CHANGED_REDIS: Final = frozenset({Applied.SEEDED, Applied.CHANGED})

# One writer per item at a time, so that of two new sales of an item one sees the other's row.
_LOCK_ITEM: Final = "SELECT pg_advisory_xact_lock(hashtextextended($1 || ':' || $2, 0))"
_ITEM: Final = "SELECT item_id FROM sales WHERE sale_id = $1"
_OTHERS: Final = "SELECT sale_id, revision FROM sales WHERE item_id = $1 AND sale_id <> $2"
# A closed sale that flashsalectl continues loses the uid, because its FlashSale was deleted.
_WRITE: Final = """
INSERT INTO sales AS s (sale_id, item_id, display_name, allocated, max_per_user, starts_at,
                        ends_at, paused, revision, capacity, resource_uid, hold_seconds,
                        max_expired_holds)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9::bigint + 1, $4, $10, $11, $12)
ON CONFLICT (sale_id) DO UPDATE SET
  display_name = excluded.display_name, allocated = excluded.allocated,
  max_per_user = excluded.max_per_user, starts_at = excluded.starts_at,
  ends_at = excluded.ends_at, paused = excluded.paused, closed = false, closed_at = NULL,
  hold_seconds = excluded.hold_seconds, max_expired_holds = excluded.max_expired_holds,
  revision = greatest(s.revision, $9) + 1,
  capacity = greatest(s.capacity, excluded.allocated + s.released),
  resource_uid = CASE WHEN s.closed THEN excluded.resource_uid
                      ELSE coalesce(excluded.resource_uid, s.resource_uid) END,
  updated_at = now()
WHERE s.item_id = excluded.item_id
  AND (s.revision < $9
       OR (s.display_name, s.allocated, s.max_per_user, s.starts_at, s.ends_at, s.paused, s.closed,
           s.hold_seconds, s.max_expired_holds)
          IS DISTINCT FROM
          (excluded.display_name, excluded.allocated, excluded.max_per_user, excluded.starts_at,
           excluded.ends_at, excluded.paused, false,
           excluded.hold_seconds, excluded.max_expired_holds))
RETURNING revision
"""
_ADOPT: Final = "UPDATE sales SET resource_uid = $2 WHERE sale_id = $1"
_CLOSE: Final = """
UPDATE sales SET closed = true, closed_at = CASE WHEN closed THEN closed_at ELSE now() END,
  revision = greatest(revision, $2) + 1, updated_at = now()
WHERE sale_id = $1 AND (NOT closed OR revision < $2)
"""
_HOLD_EXPIRED: Final = (
    "SELECT EXISTS (SELECT FROM reservations WHERE sale_id = $1 AND state = 'expired')"
)
_REFUSED: Final = """
SELECT count(*), coalesce(sum(quantity), 0)::bigint FROM reservations
WHERE sale_id = $1 AND state = 'refused'
"""


class UnknownSale(FlashsaleError):
    """There is no such sale, or no sale of the item."""


class Outdated(FlashsaleError):
    """The manifest has changed since the caller read it. Nothing was written."""


Current = Callable[[], Awaitable[bool]]
"""Whether the manifest, or its absence, is still as the caller has read it."""


async def _given() -> bool:
    """A person's manifest is not read from anywhere."""
    return True


class Refused(NamedTuple):
    """Reservations that the ledger has refused, and their units. Their buyers hold a 202."""

    reservations: int
    units: int


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a reconcile or a close.

    - `applied` is the largest change that it made in Redis.
    - `sale` is Redis' sale of the item, which may be another sale. `row` is the ledger's row.
      None means that the store has none, or that it did not answer.
    - `rebuilt` counts the units of a rebuild since the result before.
    - `hold_expired`: a hold of the sale has expired. Only the operator asks the ledger for it.
    - `refused` is None if the ledger was not asked.
    """

    sale_id: str
    item_id: str
    state: SaleState
    reason: Reason
    message: str
    applied: Applied | Closed = Applied.UNCHANGED
    sale: Sale | None = None
    row: SaleRow | None = None
    rebuilt: Rebuilt | None = None
    hold_expired: bool = False
    refused: Refused | None = None

    @property
    def ready(self) -> bool:
        """Whether Redis and the ledger match the manifest."""
        return self.reason in (Reason.APPLIED, Reason.CLOSED)

    @property
    def own_sale(self) -> Sale | None:
        """Redis' sale of the item, unless it is another sale."""
        return self.sale if self.sale and self.sale.sale_id == self.sale_id else None

    @property
    def trusted_sale(self) -> Sale | None:
        """Redis' sale, unless it is another sale or fenced. A fenced one can lack any unit."""
        return None if self.state is SaleState.FENCED else self.own_sale

    @property
    def recorded(self) -> int | None:
        """Accepted units in the ledger, or None if they are not known."""
        return None if self.row is None else self.row.accepted


RebuildCall = Callable[[SaleRow, Predecessor | None], Awaitable[Rebuilt | StillFenced]]
"""`Rebuilder.rebuild`, or a call that runs it in the background."""


async def _never(row: SaleRow, _: Predecessor | None) -> Rebuilt | StillFenced:
    raise AssertionError(f"{row.sale_id}: this reconciler has no rebuild")


class Reconciler:
    """Makes the ledger and Redis agree with manifests. Any number may work at once.

    Methods raise `RedisUnavailable`, `LedgerUnavailable` and `ContractViolation`. Another call
    continues where the failed one ended.
    """

    def __init__(
        self, inventory: Inventory, pool: ledger.Pool, rebuild: RebuildCall = _never
    ) -> None:
        """Only `reconcile` needs `rebuild`."""
        self._inventory = inventory
        self._recovery = Recovery(inventory.redis, inventory.engine)
        self._pool = pool
        self._rebuild = rebuild

    async def reconcile(
        self,
        spec: SaleSpec,
        resource_uid: str | None = None,
        current: Current = _given,
        *,
        served: bool = False,
        mistakes: str = "",
    ) -> Result:
        """Carries out decisions until nothing is left to do now.

        `resource_uid` is the UID of the FlashSale. The operator closes the sale when that object
        is deleted. `served`: Redis had the sale of this FlashSale before. If the ledger and Redis
        have lost it, Kafka can still have its events, so it is rebuilt instead of seeded. If the
        manifest has `mistakes`, `spec` is that of the ledger's row, which is not written then.
        Raises `Outdated` if the ledger needs a change and the spec is not `current`.
        """
        written: int | None = None
        seeded = False
        rebuilt: Rebuilt | None = None
        still_fenced: StillFenced | None = None
        applied = answer = Applied.UNCHANGED
        engine_id = await engine.claimed_id(self._inventory, self._pool)
        for _ in range(MAX_STEPS):
            observed = replace(
                await self._observe(spec),
                written=written,
                seeded=seeded,
                still_fenced=still_fenced,
                engine_id=engine_id,
                served=served,
            )
            match decide(spec, observed):
                case WriteRow() if mistakes:
                    state = state_of(observed.row, observed.sale, observed.server)
                    done = Done(state, Reason.INVALID_SPEC, mistakes)
                    break
                case WriteRow() as step:
                    wrote = await self._write_row(spec, step, resource_uid, current)
                    written = wrote or written
                case Rebuild(row, replaces):
                    match await self._rebuild(row, replaces):
                        case Rebuilt() as restored:
                            rebuilt = restored.after(rebuilt)
                        case StillFenced() as still_fenced:
                            pass
                case Apply() as step:
                    seeded = seeded or step.seed_until_ms is not None
                    answer = await self._inventory.apply(
                        spec_of(step.row),
                        step.row.revision,
                        engine_id=engine_id,
                        seed_until_ms=step.seed_until_ms,
                        replaces=step.replaces,
                    )
                    engine.require_own_sale(answer, spec.item_id)
                    if answer in _CHANGED_REDIS and applied is not Applied.SEEDED:
                        applied = answer
                case Done() as done:
                    await self._adopt(spec.item_id, observed.row, resource_uid, current)
                    break
        else:
            why = "other writers keep changing the sale: apply it again"
            if answer is Applied.FENCED:
                why = "Redis keeps fencing the sale: check whether the server keeps restarting"
            done = Done(SaleState.UNKNOWN, Reason.NOT_CONVERGED, why)
        if mistakes and done.reason in (Reason.APPLIED, Reason.STOCK_BELOW_HELD):
            done = Done(done.state, Reason.INVALID_SPEC, mistakes)
        return Result(
            sale_id=spec.sale_id,
            item_id=spec.item_id,
            state=done.state,
            reason=done.reason,
            message=done.message,
            applied=applied,
            sale=observed.sale,
            row=observed.row,
            rebuilt=rebuilt,
            refused=await self.refused(spec.sale_id),
        )

    async def close(self, sale_id: str, current: Current = _given) -> Result:
        """Closes a sale in the ledger and then in Redis, which may have lost its keys.

        Raises `UnknownSale` if the ledger has no row of the sale, and `Outdated` if the manifest's
        absence is not `current`.
        """
        inventory = self._inventory
        engine_id = await ledger.engine_id(self._pool, inventory.engine, inventory.address)
        # While Redis is away, the ledger notes the close. A resync then closes the sale in Redis.
        row = await self._close_row(sale_id, current)
        await engine.claim(inventory, self._pool, engine_id)
        with suppress(ContractViolation):  # the script can close a sale that cannot be read here
            await self._fence_outdated(row, engine_id)
        closed = await self._inventory.close(row.item_id, sale_id, row.revision, engine_id)
        sale, server = await self._inventory.observe(row.item_id)
        if closed is Closed.STALE and sale is not None:
            row = await ledger.sale(self._pool, sale_id) or row
            if row.closed:
                # The ledger is an older copy: its revision is below Redis' revision.
                row = await self._close_row(sale_id, current, above=sale.revision)
                closed = await self._inventory.close(row.item_id, sale_id, row.revision, engine_id)
                sale, server = await self._inventory.observe(row.item_id)
        engine.require_own_sale(closed, row.item_id)
        superseded = not row.closed or closed is Closed.STALE
        return Result(
            sale_id=sale_id,
            item_id=row.item_id,
            state=state_of(row, sale, server),
            reason=Reason.SUPERSEDED if superseded else Reason.CLOSED,
            message="its manifest was applied again at the same time"
            if superseded
            else _recorded(row),
            applied=closed,
            sale=sale,
            row=row,
        )

    async def stop_outdated(self, sale_id: str, engine_id: str) -> None:
        """Stops Redis' sale where it is behind the ledger.

        The sale is fenced if the ledger has more of its units, or a later rebuild. Then it is
        closed if the ledger has closed it. For a Redis that the sales have left or returned to: the
        pods of an API that came back would sell the units again. A healthy sale lacks nothing, so
        another name of the right Redis does no harm.
        """
        row = await ledger.sale(self._pool, sale_id)
        if row is None:
            return
        await self._fence_outdated(row, engine_id)
        if row.closed:
            # The script refuses this close if the manifest was applied again since.
            await self._inventory.close(row.item_id, sale_id, row.revision, engine_id)

    async def stop_all_outdated(self, engine_id: str) -> None:
        """Calls `stop_outdated` for each sale in Redis that can be read."""
        items = await self._inventory.index.items()
        for sale in (await self._inventory.sales(items, skip_unreadable=True)).values():
            await self.stop_outdated(sale.sale_id, engine_id)

    async def _fence_outdated(self, row: SaleRow, engine_id: str) -> None:
        sale, server = await self._inventory.observe(row.item_id)
        if sale is None or sale.sale_id != row.sale_id or sale.run_id != server.run_id:
            return
        await self._recovery.fence(
            spec_of(row),
            row.revision,
            recorded=row.accepted,
            held=row.held,
            rebuilt=row.rebuilt_revision,
            engine_id=engine_id,
            closed=row.closed,
            lease_ms=0,
        )

    async def hold_expired(self, sale_id: str) -> bool:
        """Whether the ledger has an expired hold of the sale."""
        async with ledger.translated():
            return bool(await self._pool.fetchval(_HOLD_EXPIRED, sale_id))

    async def sales_to_close(self, item_id: str) -> list[str]:
        """Returns the sales to close when a person closes an item.

        These are Redis' sale of the item and all unfinished sales. If there are none, the finished
        sales are returned, which may be closed again. Raises `UnknownSale` if the item has no sale.
        """
        sale, server = await self._inventory.observe(item_id)
        rows = await ledger.sales(self._pool, item_id)
        now = utc_of_ms(server.now_ms)
        found = {row.sale_id for row in rows if not row.finished(now)}
        if sale is not None:
            found.add(sale.sale_id)
        if not found and not rows:
            raise UnknownSale(f"{item_id}: there is no sale of this item")
        return sorted(found or {row.sale_id for row in rows})

    async def _observe(self, spec: SaleSpec) -> Observed:
        """Returns the records of the ledger and Redis."""
        # Read before Redis: a sale in Redis has all changes of this row, or it has lost some.
        before = await ledger.sale(self._pool, spec.sale_id)
        # Read before Redis, too. If another sale is applied again later, Redis has it open, or
        # `_write_row` finds its new revision and writes nothing.
        others = await ledger.sales(self._pool, spec.item_id)
        sale, server = await self._inventory.observe(spec.item_id)
        row = await ledger.sale(self._pool, spec.sale_id)
        return Observed(
            server=server,
            sale=sale,
            row=row,
            others=tuple(other for other in others if other.sale_id != spec.sale_id),
            before=before,
        )

    async def refused(self, sale_id: str) -> Refused:
        """Returns the number of a sale's refused reservations, and their units."""
        async with ledger.translated():
            count, units = await self._pool.fetchrow(_REFUSED, sale_id) or (0, 0)
        return Refused(count, units)

    async def _close_row(self, sale_id: str, current: Current, *, above: int = 0) -> SaleRow:
        async with ledger.transaction(self._pool) as connection:
            item_id = await connection.fetchval(_ITEM, sale_id)
            await self._lock(connection, item_id or "", current)
            await connection.execute(_CLOSE, sale_id, above)
        row = await ledger.sale(self._pool, sale_id)
        if row is None:
            raise UnknownSale(f"{sale_id}: the ledger has no such sale: apply its manifest first")
        return row

    async def _lock(self, connection: ledger.Connection, item_id: str, current: Current) -> None:
        """Locks the item for a change of its rows. Raises `Outdated`.

        A process can stand still after it has read a manifest. Meanwhile another one can make a
        newer one, which the change would undo. After the lock, no other process can.
        """
        await connection.execute(_LOCK_ITEM, self._inventory.engine, item_id)
        if not await current():
            raise Outdated(f"{item_id}: the manifest has changed since it was read")

    async def _adopt(
        self, item_id: str, row: SaleRow | None, resource_uid: str | None, current: Current
    ) -> None:
        """Notes the FlashSale of a row that flashsalectl or an earlier FlashSale made.

        A FlashSale of another item gets no row. It closes the earlier FlashSale's sale. The resync
        does not, because a FlashSale of that name exists.
        """
        if row is None or resource_uid is None or row.resource_uid == resource_uid:
            return
        if row.item_id == item_id:
            async with ledger.transaction(self._pool) as connection:
                await connection.execute(_ADOPT, row.sale_id, resource_uid)
        elif row.resource_uid is not None and not row.closed:
            await self.close(row.sale_id, current)

    async def _write_row(
        self, spec: SaleSpec, step: WriteRow, resource_uid: str | None, current: Current
    ) -> int | None:
        """Writes the manifest into the ledger and returns the new revision.

        Returns None if the row matches already, or if the item's other rows have changed since
        they were observed.
        """
        async with ledger.transaction(self._pool) as connection:
            await self._lock(connection, spec.item_id, current)
            others = await connection.fetch(_OTHERS, spec.item_id, spec.sale_id)
            if {(r["sale_id"], r["revision"]) for r in others} != {
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
                spec.hold_seconds,
                spec.max_expired_holds,
            )
            return revision


def _recorded(row: SaleRow) -> str:
    recorded = f"{counted(row.accepted, 'unit')} recorded"
    return f"{recorded}, {row.held} of them held" if row.held else recorded
