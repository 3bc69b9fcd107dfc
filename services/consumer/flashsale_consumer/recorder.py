"""The transaction that records a batch of events in the ledger.

Everything here runs inside a transaction of the caller's. Rows are locked in one order (offsets by
partition, then sales by id), so that two consumers that record the same events at once, one of
them not knowing yet that it lost its partitions, wait for each other and count nothing twice.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import asyncpg
from asyncpg import CheckViolationError, DataError, IntegrityConstraintViolationError

from flashsale.events import Event

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

log = logging.getLogger(__name__)

Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"

_CAPACITY_CHECK: Final = "sales_accepted_within_capacity"

_ADD_OFFSETS: Final = """
    INSERT INTO kafka_offsets (topic, partition, next_offset)
    SELECT $1, partition, next_offset
    FROM unnest($2::int[], $3::bigint[]) AS log (partition, next_offset)
    ORDER BY partition
    ON CONFLICT DO NOTHING
"""
_LOCK_OFFSETS: Final = """
    SELECT partition, next_offset FROM kafka_offsets
    WHERE topic = $1 AND partition = ANY($2::int[])
    ORDER BY partition
    FOR UPDATE
"""
_MOVE_OFFSETS: Final = """
    UPDATE kafka_offsets SET next_offset = batch.next_offset
    FROM unnest($2::int[], $3::bigint[]) AS batch (partition, next_offset)
    WHERE kafka_offsets.topic = $1 AND kafka_offsets.partition = batch.partition
"""
_FORGET_OFFSETS: Final = "DELETE FROM kafka_offsets WHERE topic = $1"
_LOCK_SALES: Final = """
    SELECT sale_id, capacity, rebuilt_revision FROM sales
    WHERE sale_id = ANY($1::text[])
    ORDER BY sale_id
    FOR UPDATE
"""
_ADD_SALES: Final = """
    INSERT INTO sales (sale_id, item_id, allocated, revision, capacity)
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[])
    ON CONFLICT DO NOTHING
"""
_RAISE_CAPACITY: Final = """
    UPDATE sales SET capacity = raised.capacity, updated_at = now()
    FROM unnest($1::text[], $2::bigint[]) AS raised (sale_id, capacity)
    WHERE sales.sale_id = raised.sale_id
"""
# Always by the primary key, whatever the planner knows of the table. Released is the last state. A
# refused row was never counted, and the same key may have been accepted again since: it is added
# like a new one. A row's xmax is 0 if the statement inserted it, and its own transaction's id if it
# found and locked it.
_WRITE: Final = """
    WITH refused AS (
        SELECT sale_id, reservation_id FROM reservations
        WHERE sale_id = ANY($1::text[]) AND state = 'refused'
    ), written AS (
        INSERT INTO reservations AS known (
            sale_id, reservation_id, user_id, quantity, state, version, request_key, occurred_at
        )
        SELECT * FROM unnest(
            $1::text[], $2::uuid[], $3::text[], $4::int[], $5::text[], $6::int[], $7::text[],
            $8::timestamptz[]
        )
        ON CONFLICT (sale_id, reservation_id) DO UPDATE
        SET state = excluded.state, version = excluded.version,
            occurred_at = excluded.occurred_at, recorded_at = clock_timestamp()
        WHERE known.state = 'refused'
            OR (known.state = 'accepted' AND excluded.version > known.version)
        RETURNING sale_id, quantity, state, xmax = 0
            OR (sale_id, reservation_id) IN (SELECT sale_id, reservation_id FROM refused) AS added
    ), change AS (
        SELECT sale_id, count(*) AS events,
            coalesce(sum(quantity) FILTER (WHERE added), 0) AS accepted,
            coalesce(sum(quantity) FILTER (WHERE state = 'released'), 0) AS released
        FROM written
        GROUP BY sale_id
    )
    UPDATE sales SET accepted = sales.accepted + change.accepted,
        released = sales.released + change.released, updated_at = now()
    FROM change
    WHERE sales.sale_id = change.sale_id
    RETURNING change.events
"""
_REFUSE: Final = """
    INSERT INTO reservations (
        sale_id, reservation_id, user_id, quantity, state, version, request_key, occurred_at
    )
    VALUES ($1, $2, $3, $4, 'refused', $5, $6, $7)
    ON CONFLICT DO NOTHING
    RETURNING true
"""
_KNOWN: Final = """
    SELECT reservation_id::text AS id FROM reservations
    WHERE (sale_id, reservation_id) IN (SELECT * FROM unnest($1::text[], $2::uuid[]))
        AND state <> 'refused'
"""

_TOO_MANY: Final = "does not fit the sale's capacity"
_TOO_LATE: Final = "came after the sale was rebuilt without it: its units were sold again"


class LedgerRewound(Exception):
    """The ledger has less of a partition than was recorded from it: an older copy took its place.

    A failover to a replica that lagged behind, or a restored backup. What it lost is still in
    Kafka: reading goes back to the stored offset.
    """


@dataclass(frozen=True, slots=True)
class Log:
    """What Kafka has of a partition: offsets from `earliest` up to, not including, `end`."""

    earliest: int
    end: int


@dataclass(slots=True)
class Outcome:
    """What became of a batch's events.

    `recorded`: rows added or changed. `refused`: recorded now as refused, with the reason.
    `broken`: what PostgreSQL does not take as data, with its reason; nothing was written of these.
    """

    recorded: int = 0
    refused: list[tuple[Event, str]] = field(default_factory=list)
    broken: list[tuple[Event, str]] = field(default_factory=list)


async def forget(connection: Connection, topic: str) -> None:
    """Leaves a topic that is new without stored offsets: those were of another by its name.

    `place` sees by itself that it ends before them, but not once it has become as long.
    """
    await connection.execute(_FORGET_OFFSETS, topic)


async def place(connection: Connection, topic: str, logs: Mapping[int, Log]) -> dict[int, int]:
    """Where to read each partition from: the stored offset, or the earliest if Kafka lacks that.

    Afterwards each partition has a row that says so.
    """
    earliest = {partition: log.earliest for partition, log in logs.items()}
    await connection.execute(_ADD_OFFSETS, topic, list(earliest), list(earliest.values()))
    placed: dict[int, int] = await _lock_offsets(connection, topic, logs)
    moved: dict[int, int] = {}
    for partition, offset in placed.items():
        kept = logs[partition]
        if offset > kept.end:
            log.warning(
                "%s/%d ends at %d, before the stored offset %d: it was created anew, reading all",
                *(topic, partition, kept.end, offset),
            )
            moved[partition] = kept.earliest
        elif offset < kept.earliest:
            log.error(
                "%s/%d begins at %d: Kafka deleted %d events before they were recorded",
                *(topic, partition, kept.earliest, kept.earliest - offset),
            )
            moved[partition] = kept.earliest
    await _move_offsets(connection, topic, moved)
    return placed | moved


async def record(
    connection: Connection,
    topic: str,
    positions: Mapping[int, int],
    next_offsets: Mapping[int, int],
    events: Sequence[Event],
) -> Outcome:
    """Records what was read between `positions` and `next_offsets`, and the latter.

    `positions` are those of all partitions that this consumer reads: `LedgerRewound` if the ledger
    has less of any. The events in `Outcome.broken` must be safe elsewhere before the caller
    commits.
    """
    stored = await _lock_offsets(connection, topic, positions)
    for partition, position in positions.items():
        if stored.get(partition, -1) < position:
            raise LedgerRewound(
                f"{topic}/{partition} was recorded up to {position}, "
                f"the ledger has it up to {stored.get(partition, 'nothing')}"
            )
    outcome = Outcome()
    if events:
        rebuilt = await _prepare_sales(connection, events)
        batch = fold(events)
        late = [event for event in batch if event.revision < rebuilt[event.sale_id]]
        if late:
            await _refuse_late(connection, late, outcome)
            batch = [event for event in batch if event.revision >= rebuilt[event.sale_id]]
        await _write(connection, batch, outcome)
    # A consumer that lost its partitions may be behind the one that has them now.
    moved = {
        partition: offset
        for partition, offset in next_offsets.items()
        if offset > stored[partition]
    }
    await _move_offsets(connection, topic, moved)
    return outcome


def fold(events: Iterable[Event]) -> list[Event]:
    """One event a reservation: that with the highest version."""
    latest: dict[tuple[str, str], Event] = {}
    for event in events:
        known = latest.setdefault((event.sale_id, event.reservation_id), event)
        if event.version > known.version:
            latest[event.sale_id, event.reservation_id] = event
    return list(latest.values())


async def _lock_offsets(
    connection: Connection, topic: str, partitions: Iterable[int]
) -> dict[int, int]:
    rows = await connection.fetch(_LOCK_OFFSETS, topic, list(partitions))
    return {row["partition"]: row["next_offset"] for row in rows}


async def _move_offsets(connection: Connection, topic: str, offsets: Mapping[int, int]) -> None:
    if offsets:
        await connection.execute(_MOVE_OFFSETS, topic, list(offsets), list(offsets.values()))


async def _prepare_sales(connection: Connection, events: Sequence[Event]) -> dict[str, int]:
    """Locks the sales' rows, adds those that are missing, and raises their capacity; returns the
    revision of each sale's last rebuild.

    The capacity of every event counts, of duplicates too, and before anything is accepted: which
    events share a batch must not decide which of them fit.
    """
    capacities: dict[str, int] = {}
    for event in events:
        if event.capacity > capacities.get(event.sale_id, -1):
            capacities[event.sale_id] = event.capacity
    rows = await connection.fetch(_LOCK_SALES, list(capacities))
    if len(rows) < len(capacities):
        missing = capacities.keys() - {row["sale_id"] for row in rows}
        await _add_sales(connection, [event for event in events if event.sale_id in missing])
        rows = await connection.fetch(_LOCK_SALES, list(capacities))
    raised = {
        row["sale_id"]: capacities[row["sale_id"]]
        for row in rows
        if capacities[row["sale_id"]] > row["capacity"]
    }
    if raised:
        await connection.execute(_RAISE_CAPACITY, list(raised), list(raised.values()))
    return {row["sale_id"]: row["rebuilt_revision"] for row in rows}


async def _add_sales(connection: Connection, events: Iterable[Event]) -> None:
    """Rows for sales that the ledger has lost, from the newest snapshot that the events have."""
    newest: dict[str, Event] = {}
    for event in events:
        known = newest.setdefault(event.sale_id, event)
        if event.revision > known.revision:
            newest[event.sale_id] = event
    snapshots = [newest[sale_id] for sale_id in sorted(newest)]
    await connection.execute(
        _ADD_SALES,
        [event.sale_id for event in snapshots],
        [event.item_id for event in snapshots],
        [event.allocated for event in snapshots],
        [event.revision for event in snapshots],
        [event.capacity for event in snapshots],
    )
    log.warning("the ledger had no row for %s: added from an event", ", ".join(sorted(newest)))


async def _write(connection: Connection, events: Sequence[Event], outcome: Outcome) -> None:
    """Writes the events together or, where that fails, each half of them.

    So the few that cannot be written are found in few steps. Those that Redis accepted first are
    written first, as if one by one, in the same order whatever batch they came in.
    """
    if not events:
        return
    try:
        async with connection.transaction():
            changes = await connection.fetch(
                _WRITE,
                [event.sale_id for event in events],
                [event.reservation_id for event in events],
                [event.user_id for event in events],
                [event.quantity for event in events],
                [event.state for event in events],
                [event.version for event in events],
                [event.request_key for event in events],
                [event.occurred_at for event in events],
            )
    # ValueError: what asyncpg finds wrong with an argument before it sends it.
    except (DataError, IntegrityConstraintViolationError, ValueError) as error:
        if len(events) > 1:
            ordered = sorted(events, key=lambda event: (event.occurred_at, event.reservation_id))
            middle = len(ordered) // 2
            await _write(connection, ordered[:middle], outcome)
            await _write(connection, ordered[middle:], outcome)
        elif isinstance(error, CheckViolationError) and error.constraint_name == _CAPACITY_CHECK:
            await _refuse(connection, events[0], _TOO_MANY, outcome)
        else:
            outcome.broken.append((events[0], str(error)))
    else:
        outcome.recorded += sum(change["events"] for change in changes)


async def _refuse_late(connection: Connection, late: Sequence[Event], outcome: Outcome) -> None:
    """Refuses what a rebuild of its sale has not seen; what is known already was in it."""
    rows = await connection.fetch(
        _KNOWN, [event.sale_id for event in late], [event.reservation_id for event in late]
    )
    known = {row["id"] for row in rows}
    for event in late:
        if event.reservation_id not in known:
            await _refuse(connection, event, _TOO_LATE, outcome)


async def _refuse(connection: Connection, event: Event, why: str, outcome: Outcome) -> None:
    """Records an event as refused, unless it is already."""
    added = await connection.fetchval(
        _REFUSE,
        event.sale_id,
        event.reservation_id,
        event.user_id,
        event.quantity,
        event.version,
        event.request_key,
        event.occurred_at,
    )
    if added:
        outcome.refused.append((event, why))
