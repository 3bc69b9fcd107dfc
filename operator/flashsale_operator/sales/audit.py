"""Check that Redis, the outbox, the topic and the ledger agree on every sale.

The stores change during the audit. So it reads them in an order that gives each difference one
meaning: the ledger's rows, Redis, the topic's end offsets, the stored offsets, the ledger again.

- Redis has a unit, and the end of its hold, before the ledger has it. If the first count of the
  ledger is above Redis', Redis lost units or changes.
- Each change that Redis made is in the outbox, on the topic below its end, or in the second count
  of the ledger. If the ledger has read the topic to its end, a change found in none of them is
  lost.
- Redis counts a release after Kafka has it. The ledger may count it before that.
- Changes in the outbox or in the unread part of the topic are in flight.
"""

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from flashsale import events, ledger
from flashsale.clocks import ServerTime
from flashsale.inventory import Inventory
from flashsale.ledger import SaleRow
from flashsale.sale import Sale, SaleSpec, SaleState
from flashsale_operator.sales import offsets
from flashsale_operator.sales.decision import (
    counted,
    ended,
    last_of_items,
    lost_units,
    outdated,
    spec_of,
    state_of,
)
from flashsale_operator.sales.offsets import Spans

LOOKS: Final = 5
"""Only a difference that every look finds is a disagreement. A change in progress is none."""
BETWEEN_LOOKS_SECONDS: Final = 0.4

# One statement, so that all counts are of the same moment.
_TALLIES: Final = """
SELECT s.*, r.*, b.*
FROM sales s,
LATERAL (
  SELECT coalesce(sum(quantity) FILTER (WHERE state <> 'refused'), 0)::bigint AS counted_accepted,
         coalesce(sum(quantity) FILTER (WHERE state IN ('cancelled', 'expired')), 0)::bigint
           AS counted_released,
         coalesce(sum(quantity) FILTER (WHERE state = 'held'), 0)::bigint AS counted_held,
         coalesce(sum(quantity) FILTER (WHERE state = 'refused'), 0)::bigint AS refused_units,
         count(*) FILTER (WHERE state = 'refused') AS refused
  FROM reservations WHERE sale_id = s.sale_id
) r,
LATERAL (
  SELECT count(*) AS buyers_above_limit FROM (
    SELECT FROM reservations WHERE sale_id = s.sale_id AND state IN ('held', 'confirmed')
    GROUP BY user_id HAVING sum(quantity) > s.max_per_user
  ) above
) b
WHERE $1::text IS NULL OR s.item_id = $1
ORDER BY s.item_id, s.sale_id
"""


class Verdict(StrEnum):
    """The conclusion of an audit about one sale."""

    OK = "ok"
    IN_FLIGHT = "in flight"
    DISAGREES = "DISAGREES"


@dataclass(frozen=True, slots=True)
class Tally:
    """A sale's row in the ledger, and the sums of its reservations.

    All are units, except `refused`, which counts reservations, and `buyers_above_limit`.
    """

    row: SaleRow
    accepted: int
    released: int
    held: int
    refused: int
    refused_units: int
    buyers_above_limit: int


@dataclass(frozen=True, slots=True)
class Facts:
    """The records of one sale in all stores, in the order of the reads.

    `holder` is Redis' sale of the item, which may be another sale. `lag` counts the topic's records
    that the ledger has not read. `last`: the sale had its item last.
    """

    before: SaleRow | None
    holder: Sale | None
    server: ServerTime
    lag: int
    after: Tally | None
    last: bool = False

    @property
    def sale(self) -> Sale | None:
        """Redis' record of this sale."""
        row = self.before or (None if self.after is None else self.after.row)
        if self.holder is None or row is None or self.holder.sale_id == row.sale_id:
            return self.holder
        return None


@dataclass(frozen=True, slots=True)
class SaleFinding:
    """An audit's result for one sale. A count is None if its store does not have the sale."""

    sale_id: str
    item_id: str
    state: SaleState
    allocated: int | None
    accepted: int | None
    held: int | None
    recorded: int | None
    outbox: int
    lag: int
    verdict: Verdict
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Audit:
    """The findings of the audited sales, and the faults of the topic as a whole.

    `unread` is a sentence about items that are not audited, because Redis' part cannot be read.
    """

    findings: tuple[SaleFinding, ...]
    topic: str
    topic_faults: tuple[str, ...]
    unread: str = ""

    @property
    def agrees(self) -> bool:
        """Whether everything was read and every difference is in flight."""
        return self.settled and not self.unread

    @property
    def settled(self) -> bool:
        """Whether no other look is needed: each difference of the readable sales is in flight."""
        return not self.topic_faults and all(
            finding.verdict is not Verdict.DISAGREES for finding in self.findings
        )


def compare(facts: Facts) -> SaleFinding:
    """Returns the conclusion from the records of one sale."""
    sale, tally = facts.sale, facts.after
    row = None if tally is None else tally.row
    known = row or facts.before or sale
    if known is None:
        raise ValueError("facts of no sale")
    outbox = 0 if sale is None else sale.outbox_length
    differences = [*_within_redis(facts), *([] if tally is None else _within_ledger(tally))]
    missing = False
    if sale is not None and row is None:
        differences.append("the ledger has no row of the sale")
    if sale is not None and facts.before is not None:
        differences += _lost_by_redis(facts.before, sale)
    if sale is not None and tally is not None:
        unrecorded = _unrecorded(sale, tally)
        missing = bool(unrecorded)
        if not outbox and not facts.lag:
            differences += [f"lost: {each}, not in ledger, outbox or topic" for each in unrecorded]
    if differences:
        verdict = Verdict.DISAGREES
    else:
        verdict = Verdict.IN_FLIGHT if outbox or missing else Verdict.OK
    notes = differences
    if tally is not None and tally.buyers_above_limit:
        # This is no fault. Buyers keep their units when maxPerUser is lowered.
        buyers = counted(tally.buyers_above_limit, "buyer")
        notes.append(f"above maxPerUser {tally.row.max_per_user}: {buyers}")
    if row is not None and row.lost:
        notes.append(f"lost before a rebuild: {counted(row.lost, 'unit')}")
    return SaleFinding(
        sale_id=known.sale_id,
        item_id=known.item_id,
        state=state_of(row or facts.before, facts.holder, facts.server, last=facts.last),
        allocated=sale.allocated if sale is not None else known.allocated,
        accepted=None if sale is None else sale.accepted,
        held=None if sale is None else sale.held,
        recorded=None if row is None else row.accepted,
        outbox=outbox,
        lag=facts.lag,
        verdict=verdict,
        notes=tuple(notes),
    )


def _lost_by_redis(before: SaleRow, sale: Sale) -> list[str]:
    """Describes the changes that Redis lacks. The ledger's row was read before Redis."""
    if outdated(before, sale):
        return ["Redis has the sale from before its last rebuild"]
    if sale.accepted < before.accepted:
        return [f"Redis lost {counted(before.accepted - sale.accepted, 'unit')}"]
    if lost := lost_units(before, sale):
        return [f"Redis lost the confirmation or the end of {counted(lost, 'held unit')}"]
    if sale.released < before.released and not sale.outbox_length:
        return [f"Redis lost the release of {counted(before.released - sale.released, 'unit')}"]
    return []


def _unrecorded(sale: Sale, tally: Tally) -> list[str]:
    """Describes the changes in Redis that the ledger lacks. A refused unit is in Redis only."""
    row, refused = tally.row, tally.refused_units
    accepted = sale.accepted - row.accepted
    ended = accepted - sale.held + row.held
    released = sale.released - row.released
    if accepted > refused:
        return [counted(accepted - refused, "unit")]
    if ended > refused:
        units = counted(ended - refused, "held unit")
        return [f"the confirmation or the end of {units}"]
    if released > refused:
        return [f"the release of {counted(released - refused, 'unit')}"]
    return []


def _within_redis(facts: Facts) -> list[str]:
    """Describes faults of Redis' sale, alone and compared with the ledger's row."""
    sale, server = facts.sale, facts.server
    row = facts.before
    if sale is None:
        state = state_of(row, facts.holder, server, last=facts.last)
        if state is SaleState.FENCED:
            return ["Redis has no keys of the sale"]
        return ["another sale has the item"] if state is SaleState.ITEM_CONFLICT else []
    differences = []
    if not (0 <= sale.released <= sale.accepted and 0 <= sale.held <= sale.taken):
        differences.append(
            f"impossible counts in Redis: {sale.accepted} accepted, {sale.released} released, "
            f"{sale.held} held"
        )
    if sale.taken > sale.allocated:
        differences.append(f"oversold: {sale.taken} units taken, {sale.allocated} allocated")
    if state_of(row, sale, server) is SaleState.FENCED:
        differences.append("fenced: Redis restarted or lost keys, and the sale is not rebuilt yet")
    if row is None:
        return differences
    after = row if facts.after is None else facts.after.row
    if sale.revision < row.revision and not ended(sale, server.now_ms):
        differences.append(f"Redis has revision {sale.revision}, the ledger {row.revision}")
    elif sale.revision > after.revision:
        differences.append(f"the ledger has revision {after.revision}, Redis {sale.revision}")
    elif (
        sale.revision == after.revision
        and not after.closed  # closing leaves the allocation as it was
        and sale.allocated != max(after.allocated, sale.taken)
    ):
        differences.append(f"Redis allocates {sale.allocated}, the ledger {after.allocated}")
    elif sale.revision == after.revision and not after.closed and _set_otherwise(sale, after):
        differences.append("the ledger has other settings of the sale than Redis")
    return differences


def _set_otherwise(sale: Sale, row: SaleRow) -> bool:
    """Whether Redis has other settings of the sale than the row. The stock is compared apart.

    This is so if the ledger lost the row. The consumer adds it again from events, which have no
    settings.
    """
    paused = row.paused if sale.stored_state == "ended" else sale.stored_state == "paused"
    return spec_of(row) != SaleSpec(
        sale_id=sale.sale_id,
        item_id=sale.item_id,
        stock=row.allocated,
        max_per_user=sale.max_per_user,
        display_name=sale.display_name,
        starts_ms=sale.starts_ms,
        ends_ms=sale.ends_ms,
        paused=paused,
        hold_seconds=sale.hold_ms // 1000 or None,
        max_expired_holds=sale.max_expired_holds,
    )


def _within_ledger(tally: Tally) -> list[str]:
    row = tally.row
    differences = []
    if tally.accepted != row.accepted:
        differences.append(f"accepted: {row.accepted}, but reservations add up to {tally.accepted}")
    if tally.released != row.released:
        differences.append(f"released: {row.released}, but releases add up to {tally.released}")
    if tally.held != row.held:
        differences.append(f"held: {row.held}, but holds add up to {tally.held}")
    if tally.refused:
        differences.append(
            f"refused by the ledger: {counted(tally.refused, 'reservation')} "
            f"({counted(tally.refused_units, 'unit')})"
        )
    return differences


async def audit(
    inventory: Inventory, pool: ledger.Pool, spans: Spans, item_id: str | None = None
) -> Audit:
    """Audits the sales of one item, or all sales.

    Raises `RedisUnavailable`, `LedgerUnavailable` and `KafkaUnavailable`.
    """
    for look in range(LOOKS):
        if look:
            await asyncio.sleep(BETWEEN_LOOKS_SECONDS)
        found = await _look(inventory, pool, spans, item_id)
        if found.settled:
            break
    return found


async def _look(
    inventory: Inventory, pool: ledger.Pool, spans: Spans, item_id: str | None
) -> Audit:
    before = {row.sale_id: row for row in await ledger.sales(pool, item_id)}
    recorded = {row.item_id for row in before.values()}
    items = await inventory.index.items(recorded) if item_id is None else [item_id]
    holders, servers, unread = await inventory.survey(items)
    topic = events.topic(inventory.engine)
    # Only ends that were read after the ledger's offsets can prove that records are missing.
    stored = await ledger.stored_offsets(pool, topic)
    ends = await spans()
    recorded_to = await ledger.stored_offsets(pool, topic)
    after = {tally.row.sale_id: tally for tally in await _tallies(pool, item_id)}

    lag = offsets.behind(ends, recorded_to)
    last = last_of_items(tally.row for tally in after.values())
    found = [
        compare(
            Facts(
                before=before.get(sale_id),
                holder=holders.get(tally.row.item_id),
                server=servers[tally.row.item_id],
                lag=lag,
                after=tally,
                last=sale_id in last,
            )
        )
        for sale_id, tally in after.items()
        if tally.row.item_id in servers
    ]
    found += [
        compare(Facts(before=None, holder=sale, server=servers[sale.item_id], lag=lag, after=None))
        for sale in holders.values()
        if sale.sale_id not in after
    ]
    return Audit(tuple(found), topic, offsets.faults(ends, stored), unread)


async def _tallies(pool: ledger.Pool, item_id: str | None) -> list[Tally]:
    async with ledger.transaction(pool, snapshot=True) as connection:
        records = await connection.fetch(_TALLIES, item_id, timeout=ledger.SUM_SECONDS)
    return [
        Tally(
            row=SaleRow.of(record),
            accepted=record["counted_accepted"],
            released=record["counted_released"],
            held=record["counted_held"],
            refused=record["refused"],
            refused_units=record["refused_units"],
            buyers_above_limit=record["buyers_above_limit"],
        )
        for record in records
    ]
