"""The offsets that the ledger stores: per partition, the next event to record and to announce.

The consumer reads from these offsets, not from those that its group commits to Kafka. Rows are
locked in the order of partitions. An announced offset is never above the recorded one.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import asyncpg

from flashsale import ledger
from flashsale.ledger import Connection, Pool
from flashsale_consumer.clients import transaction

log = logging.getLogger(__name__)

_ADD: Final = """
    INSERT INTO kafka_offsets (topic, partition, next_offset, announced_offset)
    SELECT $1, partition, earliest, earliest
    FROM unnest($2::int[], $3::bigint[]) AS log (partition, earliest)
    ORDER BY partition
    ON CONFLICT DO NOTHING
"""
_READ: Final = """
    SELECT partition, next_offset, announced_offset FROM kafka_offsets
    WHERE topic = $1 AND partition = ANY($2::int[])
    ORDER BY partition
"""
_LOCK: Final = f"{_READ} FOR UPDATE"
_MOVE: Final = """
    UPDATE kafka_offsets
    SET next_offset = batch.next_offset, announced_offset = batch.announced_offset
    FROM unnest($2::int[], $3::bigint[], $4::bigint[])
        AS batch (partition, next_offset, announced_offset)
    WHERE kafka_offsets.topic = $1 AND kafka_offsets.partition = batch.partition
"""
_FORGET: Final = "DELETE FROM kafka_offsets WHERE topic = $1"


class Stored(NamedTuple):
    """The stored offsets of a partition: the next event to record, and the next to announce."""

    recorded: int
    announced: int


class LedgerRewound(Exception):
    """The ledger has less of a partition than the consumer recorded.

    PostgreSQL failed over to a replica that lagged behind, or was restored from a backup. Kafka
    still has the events that the ledger lost, so reading goes back to the stored offset.
    """


async def forget(pool: Pool, topic: str) -> None:
    """Deletes the stored offsets of a topic that was just created.

    They belong to a deleted topic of the same name. `place` cannot tell this if the new topic is
    already as long as the old one.
    """
    async with transaction(pool) as connection:
        await connection.execute(_FORGET, topic)


async def read(pool: Pool, topic: str, partitions: Iterable[int]) -> dict[int, Stored]:
    """Returns the stored offsets of the partitions that have some."""
    async with ledger.translated():
        return _stored(await pool.fetch(_READ, topic, list(partitions)))


async def place(
    pool: Pool, topic: str, logs: Mapping[int, range], *, before: Mapping[int, Stored]
) -> dict[int, Stored]:
    """Returns the offsets to read each partition from, and stores them.

    `logs` has the offsets of the events that Kafka keeps, by partition. A stored offset outside
    them is replaced by the earliest one. `before` are the stored offsets from before `logs` was
    read. If one has changed since, another consumer has recorded events that `logs` may lack, so
    it stays.
    """
    earliest = {partition: kept.start for partition, kept in logs.items()}
    async with transaction(pool) as connection:
        await connection.execute(_ADD, topic, list(earliest), list(earliest.values()))
        stored = await _lock(connection, topic, logs)
        moved = {
            partition: _within(logs[partition], found, f"{topic}/{partition}")
            for partition, found in stored.items()
            if before.get(partition) == found
        }
        await _move(
            connection,
            topic,
            {partition: now for partition, now in moved.items() if now != stored[partition]},
        )
    return stored | moved


def _within(kept: range, stored: Stored, name: str) -> Stored:
    """Returns the stored offsets of a partition, moved to the events that Kafka keeps."""
    recorded, announced = stored
    if recorded > kept.stop:
        text = "%s ends at %d, before the stored offset %d: recreated, reading all of it"
        log.warning(text, name, kept.stop, recorded)
        return Stored(kept.start, kept.start)
    if recorded < kept.start:
        text = "%s begins at %d: Kafka deleted %d events before they were recorded"
        log.error(text, name, kept.start, kept.start - recorded)
        return Stored(kept.start, kept.start)
    if announced < kept.start:
        text = "%s begins at %d: Kafka deleted %d events before they were announced"
        log.error(text, name, kept.start, kept.start - announced)
        return Stored(recorded, kept.start)
    if announced > recorded:
        # A consumer of the previous version found the topic recreated.
        return Stored(recorded, kept.start)
    return stored


async def lock(
    connection: Connection, topic: str, positions: Mapping[int, int]
) -> dict[int, Stored]:
    """Locks stored offsets in the caller's transaction, and returns them.

    Raises `LedgerRewound` if one of them is below its position.
    """
    stored = await _lock(connection, topic, positions)
    for partition, position in positions.items():
        found = stored.get(partition)
        if found is None or found.recorded < position:
            raise LedgerRewound(
                f"{topic}/{partition} was recorded up to {position}, "
                f"the ledger has it up to {found.recorded if found else 'nothing'}"
            )
    return stored


async def advance(
    connection: Connection,
    topic: str,
    stored: Mapping[int, Stored],
    recorded: Mapping[int, int],
    announced: Mapping[int, int],
) -> None:
    """Stores the offsets that are higher than the `stored` ones, which the caller has locked.

    A consumer that lost its partitions can be behind the one that reads them now. If the ledger
    went back, it can have announced more than the ledger has.
    """
    moved = {}
    for partition, was in stored.items():
        now = Stored(
            max(was.recorded, recorded.get(partition, 0)),
            max(was.announced, min(announced.get(partition, 0), was.recorded)),
        )
        if now != was:
            moved[partition] = now
    await _move(connection, topic, moved)


async def announce(
    pool: Pool, topic: str, positions: Mapping[int, int], announced: Mapping[int, int]
) -> None:
    """Stores announced offsets while nothing is recorded.

    Raises `LedgerRewound` if the ledger has less than `positions`.
    """
    async with transaction(pool) as connection:
        stored = await lock(connection, topic, positions)
        await advance(connection, topic, stored, {}, announced)


async def _move(connection: Connection, topic: str, offsets: Mapping[int, Stored]) -> None:
    """Stores offsets whose rows the caller's transaction has locked."""
    if offsets:
        recorded, announced = zip(*offsets.values(), strict=True)
        await connection.execute(_MOVE, topic, list(offsets), recorded, announced)


async def _lock(connection: Connection, topic: str, partitions: Iterable[int]) -> dict[int, Stored]:
    return _stored(await connection.fetch(_LOCK, topic, list(partitions)))


def _stored(rows: Iterable[asyncpg.Record]) -> dict[int, Stored]:
    return {row["partition"]: Stored(row["next_offset"], row["announced_offset"]) for row in rows}
