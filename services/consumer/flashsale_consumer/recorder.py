"""Records a batch of events in the ledger.

All functions run inside the caller's transaction. They lock rows in one order: offsets by
partition, then sales by id. So two consumers that record the same events wait for each other, and
each event counts once. This happens if one of them has lost its partitions without noticing yet.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Final, NamedTuple

import asyncpg
from asyncpg import CheckViolationError, DataError, IntegrityConstraintViolationError

from flashsale.events import Event
from flashsale.ledger import Connection
from flashsale.reservations import FINAL
from flashsale_consumer import offsets

log = logging.getLogger(__name__)

_CAPACITY_CHECK: Final = "sales_accepted_within_capacity"

_LOCK_SALES: Final = """
    SELECT sale_id, capacity, rebuilt_revision FROM sales
    WHERE sale_id = ANY($1::text[])
    ORDER BY sale_id
    FOR UPDATE
"""
_ADD_SALES: Final = """
    INSERT INTO sales (sale_id, item_id, allocated, revision, capacity, paused)
    SELECT *, true FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[])
    ON CONFLICT DO NOTHING
"""
_RAISE_CAPACITY: Final = """
    UPDATE sales SET capacity = raised.capacity, updated_at = now()
    FROM unnest($1::text[], $2::bigint[]) AS raised (sale_id, capacity)
    WHERE sales.sale_id = raised.sale_id
"""
# Every access is by the primary key, so no plan depends on the table's statistics. The counts are
# the differences between former and new states. So versions can come in any order, or not at all. A
# refused row was never counted. If its reservation is accepted later, it counts like a new one. An
# older version cannot replace it, because the ledger would miss the newer one for ever. A final
# state stays, because its units are for sale again. Texts and numbers are joined by commas, which
# no field contains: asyncpg needs several times as long for an array. An empty text is NULL.
_WRITE: Final = """
    WITH written AS (
        INSERT INTO reservations AS known (
            sale_id, reservation_id, user_id, quantity, state, version, request_key, order_ref,
            accepted_at, expires_at, confirmed_at, recorded_at
        )
        SELECT *, statement_timestamp() FROM unnest(
            string_to_array($1, ','), string_to_array($2, ',')::uuid[], string_to_array($3, ','),
            string_to_array($4, ',')::int[], string_to_array($5, ','),
            string_to_array($6, ',')::bigint[], string_to_array($7, ',', ''),
            string_to_array($8, ',', ''), $9::timestamptz[], $10::timestamptz[], $11::timestamptz[]
        )
        ON CONFLICT (sale_id, reservation_id) DO UPDATE
        SET former_state = known.state, state = excluded.state, version = excluded.version,
            quantity = CASE known.state WHEN 'refused' THEN excluded.quantity
                ELSE known.quantity END,
            accepted_at = excluded.accepted_at, expires_at = excluded.expires_at,
            confirmed_at = excluded.confirmed_at, order_ref = excluded.order_ref,
            recorded_at = excluded.recorded_at
        WHERE (known.state = 'refused' AND excluded.version >= known.version)
            OR (known.state IN ('held', 'confirmed') AND excluded.version > known.version)
        RETURNING sale_id, quantity, state, coalesce(former_state, 'refused') AS former_state,
            CASE WHEN former_state IS NOT NULL THEN reservation_id::text END AS changed, user_id
    ), change AS (
        SELECT sale_id, count(*) AS events,
            array_agg(changed) FILTER (WHERE changed IS NOT NULL) AS changed,
            array_agg(user_id) FILTER (WHERE changed IS NOT NULL) AS users,
            array_agg(quantity) FILTER (WHERE changed IS NOT NULL) AS quantities,
            coalesce(sum(quantity) FILTER (WHERE former_state = 'refused'), 0) AS accepted,
            coalesce(sum(quantity) FILTER (WHERE state = 'held'), 0)
                - coalesce(sum(quantity) FILTER (WHERE former_state = 'held'), 0) AS held,
            coalesce(sum(quantity) FILTER (WHERE state IN ('cancelled', 'expired')), 0) AS released
        FROM written
        GROUP BY sale_id
    )
    UPDATE sales SET accepted = sales.accepted + change.accepted, held = sales.held + change.held,
        released = sales.released + change.released, updated_at = now()
    FROM change
    WHERE sales.sale_id = change.sale_id
    RETURNING sales.sale_id, sales.item_id, change.events, change.changed, change.users,
        change.quantities, statement_timestamp() AS recorded_at
"""
# A refused row keeps its newest version, so that an older one cannot return without it.
_REFUSE: Final = """
    INSERT INTO reservations AS known (
        sale_id, reservation_id, user_id, quantity, state, version, request_key, order_ref,
        accepted_at, expires_at, confirmed_at
    )
    SELECT * FROM unnest(
        string_to_array($1, ','), string_to_array($2, ',')::uuid[], string_to_array($3, ','),
        string_to_array($4, ',')::int[], string_to_array($5, ','),
        string_to_array($6, ',')::bigint[], string_to_array($7, ',', ''),
        string_to_array($8, ',', ''), $9::timestamptz[], $10::timestamptz[], $11::timestamptz[]
    )
    ON CONFLICT (sale_id, reservation_id) DO UPDATE
    SET version = excluded.version, former_state = known.state, order_ref = excluded.order_ref,
        accepted_at = excluded.accepted_at, expires_at = excluded.expires_at,
        confirmed_at = excluded.confirmed_at
    WHERE known.state = 'refused' AND known.version < excluded.version
    RETURNING sale_id, reservation_id::text, former_state
"""
_RAISE_ROOM: Final = """
    UPDATE sales SET capacity = capacity + ended.units, updated_at = now()
    FROM unnest($1::text[], $2::bigint[]) AS ended (sale_id, units)
    WHERE sales.sale_id = ended.sale_id
"""
_ROOM: Final = """
    SELECT sale_id, capacity - accepted AS room FROM sales WHERE sale_id = ANY($1::text[])
"""
# An event adds no units if its reservation is accepted, or is refused with a newer version.
_COUNTED: Final = """
    SELECT known.sale_id, known.reservation_id::text
    FROM unnest($1::text[], $2::uuid[], $3::bigint[]) AS event (sale_id, reservation_id, version)
    CROSS JOIN LATERAL (
        SELECT * FROM reservations
        WHERE reservations.sale_id = event.sale_id
            AND reservations.reservation_id = event.reservation_id
        OFFSET 0
    ) AS known
    WHERE known.state <> 'refused' OR known.version > event.version
"""
_VERSIONS: Final = """
    SELECT sale_id, reservation_id::text AS id, version FROM reservations
    WHERE (sale_id, reservation_id) IN (SELECT * FROM unnest($1::text[], $2::uuid[]))
        AND state <> 'refused'
"""
_COUNT_VOIDED: Final = """
    UPDATE sales SET voided = voided + change.events, updated_at = now()
    FROM unnest($1::text[], $2::bigint[]) AS change (sale_id, events)
    WHERE sales.sale_id = change.sale_id
"""

# asyncpg raises ValueError for an argument that it cannot encode.
_REJECTED: Final = (DataError, IntegrityConstraintViolationError, ValueError)
_TOO_MANY: Final = "does not fit the sale's capacity"
_TOO_LATE: Final = "arrived after the sale was rebuilt without it, and its units are on sale again"


class Written(NamedTuple):
    """Events that equal the rows that they wrote."""

    recorded_at: datetime
    events: Sequence[Event]


@dataclass(slots=True)
class BatchOutcome:
    """The result of recording a batch.

    - `recorded` is the number of rows that were added or changed.
    - `written` has the events whose rows are known without reading them.
    - `refused` has the events that were now recorded as refused, with the reason.
    - `voided` has the changes that the sale's last rebuild did not find.
    - `broken` has the events whose data PostgreSQL rejects, with the reason.

    Nothing is written of voided and broken events.
    """

    recorded: int = 0
    written: list[Written] = field(default_factory=list, compare=False)
    refused: list[tuple[Event, str]] = field(default_factory=list)
    voided: list[Event] = field(default_factory=list)
    broken: list[tuple[Event, str]] = field(default_factory=list)


async def record(  # noqa: PLR0913 - the batch and three kinds of offsets
    connection: Connection,
    topic: str,
    positions: Mapping[int, int],
    read: Mapping[int, int],
    events: Sequence[Event],
    *,
    announced: Mapping[int, int] = MappingProxyType({}),
) -> BatchOutcome:
    """Records the events between `positions` and `read`, and stores `read` and `announced`.

    `positions` has all partitions of this consumer. Raises `LedgerRewound` if the ledger has less
    of one of them. Before the caller commits, it must save the events in `BatchOutcome.broken`
    elsewhere.
    """
    stored = await offsets.lock(connection, topic, positions)
    outcome = BatchOutcome()
    if events:
        rebuilt = await _prepare_sales(connection, events)
        # Void events go before `fold`, because they can have higher versions than valid ones.
        late = [event for event in events if event.revision < rebuilt[event.sale_id]]
        valid = [event for event in events if event.revision >= rebuilt[event.sale_id]]
        unknown = await _void(connection, late, outcome)
        await _write(connection, fold(valid), outcome)
        # Last, because a valid event may have recorded the reservation.
        await _refuse(connection, fold(unknown), _TOO_LATE, outcome)
    await offsets.advance(connection, topic, stored, read, announced)
    return outcome


def fold(events: Iterable[Event]) -> list[Event]:
    """Keeps one event per reservation, the one with the highest version."""
    latest: dict[tuple[str, str], Event] = {}
    for event in events:
        known = latest.setdefault((event.sale_id, event.reservation_id), event)
        if event.version > known.version:
            latest[event.sale_id, event.reservation_id] = event
    return list(latest.values())


async def _prepare_sales(connection: Connection, events: Sequence[Event]) -> dict[str, int]:
    """Locks the sales, adds missing ones, and raises their capacity to the highest of the events.

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
    """Adds sales that the ledger has lost, from the newest snapshot in the events.

    Events have neither the window nor the limit nor the holds of a sale. So the sale is paused: a
    rebuild must not open it until its manifest is applied again.
    """
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
    text = "added sales that the ledger did not have, apply their manifests again: %s"
    log.warning(text, ", ".join(sorted(newest)))


async def _write(connection: Connection, events: Sequence[Event], outcome: BatchOutcome) -> None:
    """Writes the events together. Refuses those that do not fit the capacity of their sale.

    If PostgreSQL rejects the events, write each half of them. This isolates a few bad events in few
    steps. Earlier events come first, so the result is the same as writing the events one by one in
    the order in which Redis accepted them.
    """
    if not events:
        return
    try:
        async with connection.transaction():
            changes = await connection.fetch(
                _WRITE, *_columns(events, [event.state for event in events])
            )
    except _REJECTED as error:
        ordered = sorted(events, key=lambda event: (event.accepted_at, event.reservation_id))
        over: list[Event] = []
        more_room = False
        if isinstance(error, CheckViolationError) and error.constraint_name == _CAPACITY_CHECK:
            ordered, over, more_room = await _divide(connection, ordered)
        if over or more_room:
            await _write(connection, ordered, outcome)
            await _refuse(connection, over, _TOO_MANY, outcome)
        elif len(events) > 1:
            middle = len(ordered) // 2
            await _write(connection, ordered[:middle], outcome)
            await _write(connection, ordered[middle:], outcome)
        else:
            outcome.broken.append((events[0], _reason(error)))
    else:
        recorded = sum(change["events"] for change in changes)
        outcome.recorded += recorded
        if recorded == len(events):
            outcome.written.append(Written(changes[0]["recorded_at"], _known(events, changes)))


def _columns(events: Sequence[Event], states: Sequence[str]) -> tuple[object, ...]:
    """Returns the arguments of `_WRITE` and `_REFUSE`."""
    return (
        ",".join([event.sale_id for event in events]),
        ",".join([event.reservation_id for event in events]),
        ",".join([event.user_id for event in events]),
        ",".join([str(event.quantity) for event in events]),
        ",".join(states),
        ",".join([str(event.version) for event in events]),
        ",".join([event.request_key or "" for event in events]),
        ",".join([event.order_ref or "" for event in events]),
        [event.accepted_at for event in events],
        [event.expires_at for event in events],
        [event.confirmed_at for event in events],
    )


async def _divide(
    connection: Connection, events: Sequence[Event]
) -> tuple[list[Event], list[Event], bool]:
    """Divides events, one per reservation, into those that fit and those over the capacity.

    The caller has locked the sales, so no other transaction changes their counts and reservations.
    The end of a reservation always fits. Redis sells its units again, and the capacity in the next
    events contains them. If the ledger did not count them, both sales would fit. Also returns
    whether such an end has raised a capacity.
    """
    sale_ids = [event.sale_id for event in events]
    reservation_ids = [event.reservation_id for event in events]
    versions = [event.version for event in events]
    rows = await connection.fetch(_ROOM, list(set(sale_ids)))
    room = {row["sale_id"]: row["room"] for row in rows}
    rows = await connection.fetch(_COUNTED, sale_ids, reservation_ids, versions)
    counted = {tuple(row) for row in rows}
    fitting, over, ended = [], [], Counter[str]()
    for event in events:
        added = 0 if (event.sale_id, event.reservation_id) in counted else event.quantity
        missing = added - room[event.sale_id]
        if missing > 0 and event.state not in FINAL:
            over.append(event)
            continue
        if missing > 0:
            ended[event.sale_id] += missing
        room[event.sale_id] = max(0, -missing)
        fitting.append(event)
    if ended:
        await connection.execute(_RAISE_ROOM, list(ended), list(ended.values()))
        log.warning(
            "reservations ended that did not fit their sale, because Redis sold units twice: %s",
            ", ".join(f"{units} units of {sale_id}" for sale_id, units in sorted(ended.items())),
        )
    return fitting, over, bool(ended)


def _known(events: Sequence[Event], changes: Sequence[asyncpg.Record]) -> list[Event]:
    """Returns the events that equal their rows, if all events were written.

    A row keeps its user and its quantity, and its sale's item, whatever a later event has.
    """
    items = {change["sale_id"]: change["item_id"] for change in changes}
    known = [event for event in events if event.item_id == items[event.sale_id]]
    rows = {
        (change["sale_id"], name): (user_id, quantity)
        for change in changes
        for name, user_id, quantity in zip(
            change["changed"] or (), change["users"] or (), change["quantities"] or (), strict=True
        )
    }
    if not rows:
        return known
    return [
        event
        for event in known
        if rows.get((event.sale_id, event.reservation_id))
        in (None, (event.user_id, event.quantity))
    ]


async def _void(
    connection: Connection, late: Sequence[Event], outcome: BatchOutcome
) -> list[Event]:
    """Counts the changes that are older than their sale's last rebuild and newer than the ledger.

    The rebuild restored these reservations without the changes. Returns the events of reservations
    that the ledger does not have.
    """
    if not late:
        return []
    rows = await connection.fetch(
        _VERSIONS, [event.sale_id for event in late], [event.reservation_id for event in late]
    )
    versions = {(row["sale_id"], row["id"]): row["version"] for row in rows}
    unknown = []
    for event in late:
        version = versions.get((event.sale_id, event.reservation_id))
        if version is None:
            unknown.append(event)
        elif event.version > version:
            outcome.voided.append(event)
    if outcome.voided:
        counts = Counter(event.sale_id for event in outcome.voided)
        await connection.execute(_COUNT_VOIDED, list(counts), list(counts.values()))
    return unknown


async def _refuse(
    connection: Connection, events: Sequence[Event], why: str, outcome: BatchOutcome
) -> None:
    """Records events as refused, unless their reservation counts. There is one event of each.

    A refused row gets the newer version. Only new rows are in the outcome.
    """
    if not events:
        return
    try:
        async with connection.transaction():
            rows = await connection.fetch(_REFUSE, *_columns(events, ["refused"] * len(events)))
    except _REJECTED as error:
        if len(events) > 1:
            middle = len(events) // 2
            await _refuse(connection, events[:middle], why, outcome)
            await _refuse(connection, events[middle:], why, outcome)
        else:
            outcome.broken.append((events[0], _reason(error)))
    else:
        added = {(row[0], row[1]) for row in rows if row["former_state"] is None}
        outcome.refused += [
            (event, why) for event in events if (event.sale_id, event.reservation_id) in added
        ]


def _reason(error: Exception) -> str:
    """Returns the first line. PostgreSQL's next line has the whole row, with the user."""
    return str(error).partition("\n")[0]
