"""Records a batch of events in the ledger.

All functions run inside the caller's transaction. They lock rows in one order: offsets by
partition, then sales by id. So two consumers that record the same events wait for each other, and
each event counts once. This happens if one of them has lost its partitions without noticing yet.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from asyncpg import CheckViolationError, DataError, IntegrityConstraintViolationError

from flashsale.events import Event
from flashsale_consumer import offsets
from flashsale_consumer.clients import Connection

log = logging.getLogger(__name__)

_CAPACITY_CHECK: Final = "sales_accepted_within_capacity"

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
# Every access is by the primary key, so no plan depends on the table's statistics. `released` is
# the final state. A refused row was never counted. If its reservation is accepted later, it is
# added like a new one. A row's xmax is 0 if this statement inserted it, otherwise the id of this
# transaction, which locked it.
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
_TOO_LATE: Final = "arrived after the sale was rebuilt without it, and its units are on sale again"


@dataclass(slots=True)
class BatchOutcome:
    """The result of recording a batch.

    `recorded` is the number of rows that were added or changed. `refused` has the events that were
    now recorded as refused, with the reason. `broken` has the events whose data PostgreSQL rejects,
    with the reason. Nothing is written of those.
    """

    recorded: int = 0
    refused: list[tuple[Event, str]] = field(default_factory=list)
    broken: list[tuple[Event, str]] = field(default_factory=list)


async def record(
    connection: Connection,
    topic: str,
    positions: Mapping[int, int],
    read: Mapping[int, int],
    events: Sequence[Event],
) -> BatchOutcome:
    """Record the events between `positions` and `read`, and store the offsets in `read`.

    `positions` has all partitions of this consumer. Raises `LedgerRewound` if the ledger has less
    of one of them. Before the caller commits, it must save the events in `BatchOutcome.broken`
    elsewhere.
    """
    stored = await offsets.lock(connection, topic, positions)
    outcome = BatchOutcome()
    if events:
        rebuilt = await _prepare_sales(connection, events)
        batch = fold(events)
        late = [event for event in batch if event.revision < rebuilt[event.sale_id]]
        if late:
            await _refuse_late(connection, late, outcome)
            batch = [event for event in batch if event.revision >= rebuilt[event.sale_id]]
        await _write(connection, batch, outcome)
    # A consumer that lost its partitions can be behind the one that reads them now.
    ahead = {partition: offset for partition, offset in read.items() if offset > stored[partition]}
    await offsets.move(connection, topic, ahead)
    return outcome


def fold(events: Iterable[Event]) -> list[Event]:
    """Keep one event per reservation, the one with the highest version."""
    latest: dict[tuple[str, str], Event] = {}
    for event in events:
        known = latest.setdefault((event.sale_id, event.reservation_id), event)
        if event.version > known.version:
            latest[event.sale_id, event.reservation_id] = event
    return list(latest.values())


async def _prepare_sales(connection: Connection, events: Sequence[Event]) -> dict[str, int]:
    """Lock the sales, add missing ones, and raise their capacity to the highest of the events.

    Returns the revision of each sale's last rebuild. The capacities of all events count before any
    event is accepted, including those of duplicates. So the split into batches does not affect
    which events fit.
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
    """Add sales that the ledger has lost, from the newest snapshot in the events."""
    newest = {event.sale_id: event for event in sorted(events, key=lambda event: event.revision)}
    snapshots = [newest[sale_id] for sale_id in sorted(newest)]
    await connection.execute(
        _ADD_SALES,
        [event.sale_id for event in snapshots],
        [event.item_id for event in snapshots],
        [event.allocated for event in snapshots],
        [event.revision for event in snapshots],
        [event.capacity for event in snapshots],
    )
    log.warning("added sales that the ledger did not have: %s", ", ".join(sorted(newest)))


async def _write(connection: Connection, events: Sequence[Event], outcome: BatchOutcome) -> None:
    """Write the events together. If that fails, write each half of them.

    This isolates a few bad events in few steps. Earlier events come first, so the result is the
    same as writing the events one by one in the order in which Redis accepted them.
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
    # asyncpg raises ValueError for an argument that it cannot encode.
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


async def _refuse_late(
    connection: Connection, late: Sequence[Event], outcome: BatchOutcome
) -> None:
    """Refuse events from before the sale's last rebuild, unless the ledger has them already."""
    rows = await connection.fetch(
        _KNOWN, [event.sale_id for event in late], [event.reservation_id for event in late]
    )
    known = {row["id"] for row in rows}
    for event in late:
        if event.reservation_id not in known:
            await _refuse(connection, event, _TOO_LATE, outcome)


async def _refuse(connection: Connection, event: Event, why: str, outcome: BatchOutcome) -> None:
    """Record an event as refused, unless its reservation has a row."""
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
