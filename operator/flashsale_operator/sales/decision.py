"""What to do about a sale next: a pure decision over what is observed.

Level-triggered: one action is carried out, everything is observed again, until `Done`. The order
keeps stock from being made twice: the ledger's row is written before Redis is told, Redis is told
what the row says, and keys are made without a rebuild only once, for a row that the same reconcile
has inserted. A row without its keys means lost, never new.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from flashsale.inventory import ServerTime
from flashsale.ledger import SaleRow
from flashsale.sale import Predecessor, Sale, SaleSpec, SaleState, rfc3339_of_ms, utc_of_ms

SEED_MS: Final = 5_000
"""How old what was observed may be when keys are made for a new row: a rebuild of the same sale
that others do meanwhile takes longer, since it waits for a heartbeat's expiry.
"""


class Reason(StrEnum):
    """Why a sale is, or is not, as its manifest asks."""

    APPLIED = "Applied"
    CLOSED = "Closed"
    STOCK_BELOW_HELD = "StockBelowHeld"
    ITEM_CONFLICT = "ItemConflict"
    ITEM_CHANGED = "ItemChanged"
    SALE_ENDED = "SaleEnded"
    FENCED = "Fenced"
    SUPERSEDED = "Superseded"
    UNSETTLED = "Unsettled"


@dataclass(frozen=True, slots=True)
class Kept:
    """What keeps a sale fenced, in words; maybe for want of Kafka."""

    why: tuple[str, ...]
    without_kafka: bool = False

    def __str__(self) -> str:
        return "; ".join(self.why)


@dataclass(frozen=True, slots=True)
class Observed:
    """The ledger and Redis around one sale. Redis is read first, so that its revision is above
    the row's only if the ledger lost something.

    `row` is the sale's own, `others` are the other rows of the item; `sale` is what Redis holds
    for the item, maybe another sale. `written` is the revision that this reconcile wrote: 1 says
    that it inserted the row, for which it may have `seeded` keys since. `kept` says why this
    reconcile could not have the sale rebuilt.
    """

    server: ServerTime
    sale: Sale | None = None
    row: SaleRow | None = None
    others: tuple[SaleRow, ...] = ()
    written: int | None = None
    seeded: bool = False
    kept: Kept | None = None


@dataclass(frozen=True, slots=True)
class WriteRow:
    """Write the manifest into the ledger, if the item's other rows are still `others`.

    The row's revision goes above `above`: a ledger that was restored from a backup has a lower one
    than Redis, which would refuse it.
    """

    others: tuple[SaleRow, ...]
    above: int = 0


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Bring the sale of the ledger's row back into Redis, where `replaces` may have its item."""

    row: SaleRow
    replaces: Predecessor | None = None


@dataclass(frozen=True, slots=True)
class Apply:
    """Make Redis agree with the ledger's row; the arguments are `Inventory.apply`'s."""

    row: SaleRow
    seed_until_ms: int | None = None
    replaces: Predecessor | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing is left to do now. `message` is one sentence for a person."""

    state: SaleState
    reason: Reason
    message: str


Action = WriteRow | Rebuild | Apply | Done


def decide(spec: SaleSpec, observed: Observed) -> Action:
    """The next step towards `spec`."""
    row = observed.row
    if row is not None and row.item_id != spec.item_id:
        return Done(
            SaleState.UNKNOWN,
            Reason.ITEM_CHANGED,
            f"spec.itemId: is immutable; {row.sale_id} sells {row.item_id}, "
            "and another item needs a sale of another name",
        )
    sale = observed.sale
    if row is not None and observed.written is not None and _asks_differently(row, spec):
        return Done(
            state_of(row, sale, observed.server),
            Reason.SUPERSEDED,
            f"another apply has changed the sale meanwhile: revision {row.revision}",
        )
    if sale is not None and sale.sale_id == spec.sale_id:
        return _decide_held(spec, observed, sale)
    return _decide_absent(spec, observed)


def spec_of(row: SaleRow) -> SaleSpec:
    """What a row of the ledger asks for."""
    return SaleSpec(
        sale_id=row.sale_id,
        item_id=row.item_id,
        stock=row.allocated,
        max_per_user=row.max_per_user,
        display_name=row.display_name,
        starts_ms=_ms(row.starts_at),
        ends_ms=_ms(row.ends_at),
        paused=row.paused,
    )


def state_of(row: SaleRow | None, sale: Sale | None, server: ServerTime) -> SaleState:
    """The state of a sale of which the ledger has `row` and Redis, for its item, `sale`."""
    if sale is not None and (row is None or sale.sale_id == row.sale_id):
        return sale.state(server.now_ms, server.run_id)
    if row is None:
        return SaleState.UNKNOWN
    if row.closed:
        return SaleState.CLOSING
    if row.finished(utc_of_ms(server.now_ms)):
        return SaleState.ENDED
    return SaleState.FENCED if sale is None else SaleState.ITEM_CONFLICT


def ended(sale: Sale, now_ms: int) -> bool:
    """Whether the sale's end was reached, which is for good; a closed sale may be continued."""
    return sale.stored_state != "closed" and sale.finished(now_ms)


def _decide_held(spec: SaleSpec, observed: Observed, sale: Sale) -> Action:
    """Redis has the sale."""
    row, server = observed.row, observed.server
    state = sale.state(server.now_ms, server.run_id)
    over = ended(sale, server.now_ms)
    behind = row is None or row.revision < sale.revision
    if over and (behind or state is not SaleState.FENCED):
        return _ended(row, spec, sale.ends_ms)
    if row is None or behind or (not over and (row.closed or _asks_differently(row, spec))):
        return WriteRow(observed.others, above=sale.revision)
    if state is SaleState.FENCED:
        return _fenced(observed.kept) if observed.kept else Rebuild(row)
    wanted = "paused" if row.paused else "open"
    if (
        sale.revision != row.revision
        or sale.stored_state != wanted
        or sale.allocated != max(row.allocated, sale.held)
    ):
        return Apply(row)
    if sale.allocated > row.allocated:
        return Done(
            state,
            Reason.STOCK_BELOW_HELD,
            f"spec.stock {row.allocated} is below the {sale.held} units that buyers hold: "
            f"{sale.allocated} stay allocated",
        )
    return Done(state, Reason.APPLIED, f"{sale.available} of {sale.allocated} available")


def _decide_absent(spec: SaleSpec, observed: Observed) -> Action:
    """Redis has nothing for the item, or another sale."""
    row, sale = observed.row, observed.sale
    now = utc_of_ms(observed.server.now_ms)
    inserted = row is not None and observed.written == row.revision == 1
    if row is not None and not row.closed and not inserted and row.finished(now):
        return _ended(row, spec, _ms(row.ends_at))
    if obstacle := _obstacle(spec, observed, now):
        return Done(SaleState.ITEM_CONFLICT, Reason.ITEM_CONFLICT, obstacle)
    if row is None or row.closed or _asks_differently(row, spec):
        return WriteRow(observed.others)
    replaces = None if sale is None else Predecessor(sale.sale_id, sale.accepted)
    if inserted and not observed.seeded:
        return Apply(row, observed.server.now_ms + SEED_MS, replaces)
    return _fenced(observed.kept) if observed.kept else Rebuild(row, replaces)


def _obstacle(spec: SaleSpec, observed: Observed, now: datetime) -> str | None:
    """What keeps the sale from its item, in words."""
    sale, server = observed.sale, observed.server
    rivals = [
        other.sale_id
        for other in observed.others
        if not other.finished(now) and not (sale and sale.sale_id == other.sale_id)
    ]
    if rivals:
        return f"{spec.item_id} is sold by {' and '.join(rivals)}"
    if sale is None:
        return None
    if not sale.finished(server.now_ms):
        state = sale.state(server.now_ms, server.run_id)
        return f"{spec.item_id} is sold by {sale.sale_id}, which is {state}"
    waits = f"{sale.sale_id} had {spec.item_id} before and is not recorded whole yet"
    if sale.outbox_length:
        return f"{waits}: its outbox has {_counted(sale.outbox_length, 'event')}"
    recorded = sum(other.accepted for other in observed.others if other.sale_id == sale.sale_id)
    if recorded != sale.accepted:
        return f"{waits}: {recorded} of {sale.accepted} accepted units"
    return None


def _asks_differently(row: SaleRow, spec: SaleSpec) -> bool:
    return spec_of(row) != spec


def _ended(row: SaleRow | None, spec: SaleSpec, ends_ms: int | None) -> Done:
    at = "before" if ends_ms is None else f"at {rfc3339_of_ms(ends_ms)}"
    if row is not None and not _asks_differently(row, spec):
        return Done(SaleState.ENDED, Reason.APPLIED, f"it ended {at}")
    return Done(
        SaleState.ENDED,
        Reason.SALE_ENDED,
        f"it ended {at} and stays ended: a new sale needs a new name",
    )


def _fenced(kept: Kept) -> Done:
    return Done(SaleState.FENCED, Reason.FENCED, str(kept))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ms(time: datetime | None) -> int | None:
    return None if time is None else round(time.timestamp() * 1000)
