"""Decide the next step of a sale: a pure function of the ledger's and Redis' records.

The reconciler carries out one action, observes again, and asks again until it gets `Done`. The
order of the steps keeps units from being created twice:

- The ledger's row is written before Redis changes, and Redis receives the row's contents.
- Only the reconcile that inserted the row may seed its keys, and only once. If the sale was served
  before, the ledger has lost the row, and the reconcile must not.
- A row without keys otherwise means that Redis lost them. The sale is rebuilt from the ledger.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from flashsale.clocks import ServerTime
from flashsale.ledger import SaleRow
from flashsale.sale import (
    Predecessor,
    Sale,
    SaleSpec,
    SaleState,
    ms_of_time,
    rfc3339_of_ms,
    utc_of_ms,
)

SEED_MS: Final = 5_000
"""Maximum age of the observation when keys are seeded for a new row, in milliseconds.

A rebuild of the same sale by another process takes longer, because it waits until a heartbeat
expires. So the seeding cannot follow such a rebuild.
"""

_LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)
_NOT_YET: Final = datetime.max.replace(tzinfo=UTC)


class Reason(StrEnum):
    """Why a sale does or does not match its manifest: the reason of the Ready condition."""

    APPLIED = "Applied"
    CLOSED = "Closed"
    STOCK_BELOW_HELD = "StockBelowHeld"
    ITEM_CONFLICT = "ItemConflict"
    ITEM_CHANGED = "ItemChanged"
    SALE_ENDED = "SaleEnded"
    FENCED = "Fenced"
    SUPERSEDED = "Superseded"
    NOT_CONVERGED = "NotConverged"
    REDIS_UNAVAILABLE = "RedisUnavailable"
    LEDGER_UNAVAILABLE = "LedgerUnavailable"
    KAFKA_UNAVAILABLE = "KafkaUnavailable"
    UNREADABLE = "Unreadable"
    INVALID_SPEC = "InvalidSpec"
    OTHER_ENGINE = "OtherEngine"
    REDIS_MOVED = "RedisMoved"
    REQUIREMENT_UNMET = "RequirementUnmet"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True)
class StillFenced:
    """Why a sale stays fenced, one phrase per cause. `without_kafka`: Kafka did not answer."""

    why: tuple[str, ...]
    without_kafka: bool = False

    def __str__(self) -> str:
        return "; ".join(self.why)


@dataclass(frozen=True, slots=True)
class Observed:
    """The records of one sale in the ledger and Redis.

    Redis is read before the row. So its revision is above the row's only if the ledger lost
    something.

    - `sale` is Redis' sale of the item. It may be another sale.
    - `row` is the sale's own row.
    - `others` are the other rows of the item, as they were read before Redis.
    - `written` is the revision that this reconcile wrote. 1 means that it inserted the row.
    - `seeded`: this reconcile has tried to seed the keys of that row.
    - `still_fenced` tells why this reconcile could not get the sale rebuilt.
    - `before` is the row as it was read before Redis. Redis has all its changes, or lost some.
    - `served`: Redis had the sale of this FlashSale before.
    """

    server: ServerTime
    sale: Sale | None = None
    row: SaleRow | None = None
    others: tuple[SaleRow, ...] = ()
    written: int | None = None
    seeded: bool = False
    still_fenced: StillFenced | None = None
    engine_id: str = ""
    before: SaleRow | None = None
    served: bool = False


@dataclass(frozen=True, slots=True)
class WriteRow:
    """Write the manifest into the ledger if the item's other rows are still `others`.

    The row's new revision must exceed `above`. A ledger that was restored from a backup can have a
    lower revision than Redis, and Redis would refuse it.
    """

    others: tuple[SaleRow, ...]
    above: int = 0


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Restore the sale of `row` in Redis. `replaces` is the sale that has the item there now."""

    row: SaleRow
    replaces: Predecessor | None = None


@dataclass(frozen=True, slots=True)
class Apply:
    """Make Redis agree with the ledger's row, by `Inventory.apply` with these arguments."""

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
    """Returns the next step towards `spec`."""
    row = observed.row
    if row is not None and row.item_id != spec.item_id:
        sells = "sold" if row.closed else "sells"
        return Done(
            SaleState.UNKNOWN,
            Reason.ITEM_CHANGED,
            f"spec.itemId is immutable: {row.sale_id} {sells} {row.item_id}, "
            "and another item needs a FlashSale of another name",
        )
    sale = observed.sale
    if row is not None and observed.written is not None and _differs(row, spec):
        return Done(
            state_of(row, sale, observed.server),
            Reason.SUPERSEDED,
            f"another apply changed the sale at the same time: revision {row.revision}",
        )
    if sale is not None and sale.sale_id == spec.sale_id:
        return _decide_present(spec, observed, sale)
    return _decide_absent(spec, observed)


def spec_of(row: SaleRow) -> SaleSpec:
    """Returns the request of a ledger row."""
    return SaleSpec(
        sale_id=row.sale_id,
        item_id=row.item_id,
        stock=row.allocated,
        max_per_user=row.max_per_user,
        display_name=row.display_name,
        starts_ms=_ms(row.starts_at),
        ends_ms=_ms(row.ends_at),
        paused=row.paused,
        hold_seconds=row.hold_seconds,
        max_expired_holds=row.max_expired_holds,
    )


def last_of_items(rows: Iterable[SaleRow]) -> frozenset[str]:
    """Returns the ids of the sales that had their item last, of all sales of some items."""
    last: dict[str, SaleRow] = {}
    for row in rows:
        before = last.get(row.item_id)
        if before is None or _left_at(before) < _left_at(row):
            last[row.item_id] = row
    return frozenset(row.sale_id for row in last.values())


def state_of(
    row: SaleRow | None, sale: Sale | None, server: ServerTime, *, last: bool = False
) -> SaleState:
    """Returns the state of a sale from its ledger row and Redis' sale of the item.

    A sale that both have closed is not fenced by a restart of Redis: it accepts nothing anyway, and
    is rebuilt when its manifest is applied again. Without keys, a closed sale counts as freed, and
    an ended one as replaced, unless it was the `last` sale of its item. A sale with open holds in
    the ledger is neither freed nor replaced.
    """
    if sale is not None and (row is None or sale.sale_id == row.sale_id):
        closed = row is not None and row.closed and not row.held
        if closed and sale.stored_state == "closed" and not sale.torn:
            return SaleState.CLOSING
        return sale.state(server.now_ms, server.run_id)
    if row is None:
        return SaleState.UNKNOWN
    if sale is None and has_keys(row, utc_of_ms(server.now_ms), last=last):
        return SaleState.FENCED
    if row.finished(utc_of_ms(server.now_ms)) and not row.held:
        return SaleState.CLOSING if row.closed else SaleState.ENDED
    return SaleState.ITEM_CONFLICT


def ended(sale: Sale, now_ms: int) -> bool:
    """Whether the sale has reached its end, which is final. A closed sale can be continued."""
    return sale.stored_state != "closed" and sale.finished(now_ms)


def lost_units(row: SaleRow, sale: Sale) -> int:
    """Returns how many units of the row Redis' sale lacks, with all or with their last change.

    The row was read before Redis. Accepted units only grow, as do those that are not held any more,
    and Redis has each change before the ledger.
    """
    accepted = row.accepted - sale.accepted
    return max(0, accepted, accepted - row.held + sale.held)


def outdated(row: SaleRow, sale: Sale) -> bool:
    """Whether Redis' sale is from before the last rebuild of the row that was read before.

    The engine has returned to a Redis that it had left. A rebuild is in the ledger first, and the
    sale is fenced until Redis has it too. Keys of the previous version do not tell.
    """
    return sale.rebuilt is not None and sale.rebuilt < row.rebuilt_revision


def untrusted(row: SaleRow | None, sale: Sale, server: ServerTime) -> bool:
    """Whether Redis' sale is fenced, or behind the row that was read before."""
    if sale.torn or sale.run_id != server.run_id:
        return True
    return row is not None and (lost_units(row, sale) > 0 or outdated(row, sale))


def has_keys(row: SaleRow, now: datetime, *, last: bool) -> bool:
    """Whether Redis should have the keys of a sale, unless another sale of the item has them.

    An ended sale keeps its keys as the `last` sale of its item. Its buyers ask for their
    reservations, and orders are confirmed again or refunded.
    """
    return row.held > 0 or not row.finished(now) or (last and not row.closed)


def needs_rebuild(
    row: SaleRow, sale: Sale | None, server: ServerTime, *, last: bool = False
) -> bool:
    """Whether a sale must be rebuilt from the ledger. The row was read before Redis.

    `sale` is Redis' sale of the item. If it is another one, the row's sale waits until it is freed.
    A closed sale accepts nothing, so a restart of Redis alone does not matter. But its open holds
    must end. If its counts differ from the ledger's, it also keeps its item, because it is neither
    freed nor replaced. An outdated sale answers orders, and one that only the ledger has closed
    sells.
    """
    if sale is None:
        return has_keys(row, utc_of_ms(server.now_ms), last=last)
    if sale.sale_id != row.sale_id:
        return False
    if not untrusted(row, sale, server):
        return row.closed and not sale.finished(server.now_ms)
    recorded = (sale.accepted, sale.released, sale.held) == (row.accepted, row.released, row.held)
    return row.held > 0 or not row.closed or not recorded or outdated(row, sale)


def counted(number: int, noun: str) -> str:
    """Returns the number with its noun: `1 unit`, `2 units`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _decide_present(  # noqa: PLR0911 - one per state of the sale
    spec: SaleSpec, observed: Observed, sale: Sale
) -> Action:
    """Redis has the sale."""
    row, server = observed.row, observed.server
    state = sale.state(server.now_ms, server.run_id)
    behind = row is None or row.revision < sale.revision
    over = ended(sale, server.now_ms) or (
        # A rebuild gives a closed sale the state closed, whether it had ended before or not.
        row is not None and row.closed and not behind and row.ended(utc_of_ms(server.now_ms))
    )
    fenced = untrusted(observed.before, sale, server)
    if over and (row is None or not fenced):
        return _ended(row, spec, sale.ends_ms)
    if row is not None and row.closed and (rivals := _rivals(spec, observed)):
        return Done(SaleState.ITEM_CONFLICT, Reason.ITEM_CONFLICT, rivals)
    if row is None or (not over and (behind or row.closed or _differs(row, spec))):
        return WriteRow(observed.others, above=sale.revision)
    if fenced:
        return _fenced(observed.still_fenced) if observed.still_fenced else Rebuild(row)
    wanted = "paused" if row.paused else "open"
    if (
        sale.revision != row.revision
        or sale.stored_state != wanted
        or sale.engine != observed.engine_id
        or sale.allocated != max(row.allocated, sale.taken)
    ):
        return Apply(row)
    if sale.allocated > row.allocated:
        return Done(
            state,
            Reason.STOCK_BELOW_HELD,
            f"spec.stock {row.allocated} is below the {sale.taken} units that buyers have, "
            f"so {sale.allocated} stay allocated",
        )
    return Done(state, Reason.APPLIED, f"{sale.available} of {sale.allocated} available")


def _decide_absent(spec: SaleSpec, observed: Observed) -> Action:
    """Redis has no sale of the item, or another sale."""
    row, sale = observed.row, observed.sale
    now = utc_of_ms(observed.server.now_ms)
    inserted = row is not None and observed.written == row.revision == 1
    over = row is not None and not inserted and row.ended(now)
    if row is not None and over and not row.held:
        last = row.sale_id in last_of_items((row, *observed.others))
        if not needs_rebuild(row, sale, observed.server, last=last):
            return _ended(row, spec, _ms(row.ends_at))
    if obstacle := _obstacle(spec, observed):
        return Done(SaleState.ITEM_CONFLICT, Reason.ITEM_CONFLICT, obstacle)
    if row is None or (not over and (row.closed or _differs(row, spec))):
        return WriteRow(observed.others)
    replaces = None if sale is None else Predecessor(sale.sale_id, sale.accepted, sale.released)
    if inserted and not observed.seeded and not observed.served:
        return Apply(row, observed.server.now_ms + SEED_MS, replaces)
    return _fenced(observed.still_fenced) if observed.still_fenced else Rebuild(row, replaces)


def _obstacle(spec: SaleSpec, observed: Observed) -> str | None:
    """Returns why the sale cannot have its item, or None."""
    sale, server = observed.sale, observed.server
    if rivals := _rivals(spec, observed):
        return rivals
    if observed.row is None or observed.row.closed:
        own = () if observed.row is None else (observed.row,)
        last = last_of_items((*own, *observed.others))
        for other in observed.others:
            if other.held:
                holds = counted(other.held, "unit")
                return f"{other.sale_id} sold {spec.item_id} before and has open holds: {holds}"
            lost = sale is None and other.sale_id in last and not other.closed
            if lost and (kept := _kept_from(spec.sale_id, other.sale_id, spec.item_id)):
                return kept
    if sale is None:
        return None
    if not sale.finished(server.now_ms):
        state = sale.state(server.now_ms, server.run_id)
        return f"{spec.item_id} is sold by {sale.sale_id}, which is {state}"
    return _kept(spec.sale_id, sale, observed.others)


def _rivals(spec: SaleSpec, observed: Observed) -> str | None:
    """Names the item's unfinished sales in the ledger except Redis' sale, or returns None."""
    sale, now = observed.sale, utc_of_ms(observed.server.now_ms)
    rivals = [
        other.sale_id
        for other in observed.others
        if not other.finished(now) and not (sale and sale.sale_id == other.sale_id)
    ]
    return f"{spec.item_id} is sold by {' and '.join(rivals)}" if rivals else None


def _kept(sale_id: str, sale: Sale, others: tuple[SaleRow, ...]) -> str | None:
    """Returns why a finished sale keeps its item, or None if the sale `sale_id` may replace it."""
    if kept := _kept_from(sale_id, sale.sale_id, sale.item_id):
        return kept
    before = f"{sale.sale_id} sold {sale.item_id} before"
    own = next((other for other in others if other.sale_id == sale.sale_id), None)
    accepted, released = (0, 0) if own is None else (own.accepted, own.released)
    if accepted > sale.accepted:
        lost = counted(accepted - sale.accepted, "unit")
        return f"{before} and waits for its rebuild: Redis lost {lost}"
    causes = (
        (sale.outbox_length, f"its outbox has {counted(sale.outbox_length, 'event')}"),
        (sale.held, f"it has open holds of {counted(sale.held, 'unit')}"),
        (accepted != sale.accepted, f"{accepted} of {sale.accepted} accepted units"),
        (released != sale.released, f"{released} of {sale.released} released units"),
    )
    cause = next((words for found, words in causes if found), None)
    return cause and f"{before} and is not fully recorded yet: {cause}"


def _left_at(row: SaleRow) -> datetime:
    """Returns when a sale leaves its item to the next one.

    The previous version did not record when it closed a sale.
    """
    closed_at = row.closed_at or _LONG_AGO if row.closed else _NOT_YET
    return min(row.ends_at or _NOT_YET, closed_at)


def _namespace(sale_id: str) -> str:
    return sale_id.partition("/")[0]


def _kept_from(sale_id: str, former_id: str, item_id: str) -> str | None:
    """Returns why a finished sale keeps its item from a sale of another namespace, or None."""
    if _namespace(former_id) == _namespace(sale_id):
        return None
    return (
        f"{former_id} sold {item_id} before: another namespace may sell it once the keys of that "
        "sale are freed"
    )


def _differs(row: SaleRow, spec: SaleSpec) -> bool:
    return spec_of(row) != spec


def _ended(row: SaleRow | None, spec: SaleSpec, ends_ms: int | None) -> Done:
    at = "earlier" if ends_ms is None else f"at {rfc3339_of_ms(ends_ms)}"
    if row is not None and not _differs(row, spec):
        return Done(SaleState.ENDED, Reason.APPLIED, f"the sale ended {at}")
    return Done(
        SaleState.ENDED,
        Reason.SALE_ENDED,
        f"the sale ended {at} and stays ended: a new sale needs a new name",
    )


def _fenced(still_fenced: StillFenced) -> Done:
    reason = Reason.KAFKA_UNAVAILABLE if still_fenced.without_kafka else Reason.FENCED
    return Done(SaleState.FENCED, reason, str(still_fenced))


def _ms(time: datetime | None) -> int | None:
    return None if time is None else ms_of_time(time)
