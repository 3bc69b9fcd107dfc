"""The offsets that the ledger stores: per partition, the next event to record.

The consumer reads from these offsets, not from those that its group commits to Kafka. Rows are
locked in the order of partitions.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Final

from flashsale.ledger import Pool
from flashsale_consumer.clients import Connection, transaction

log = logging.getLogger(__name__)

_ADD: Final = """
    INSERT INTO kafka_offsets (topic, partition, next_offset)
    SELECT $1, partition, next_offset
    FROM unnest($2::int[], $3::bigint[]) AS log (partition, next_offset)
    ORDER BY partition
    ON CONFLICT DO NOTHING
"""
_LOCK: Final = """
    SELECT partition, next_offset FROM kafka_offsets
    WHERE topic = $1 AND partition = ANY($2::int[])
    ORDER BY partition
    FOR UPDATE
"""
_MOVE: Final = """
    UPDATE kafka_offsets SET next_offset = batch.next_offset
    FROM unnest($2::int[], $3::bigint[]) AS batch (partition, next_offset)
    WHERE kafka_offsets.topic = $1 AND kafka_offsets.partition = batch.partition
"""
_FORGET: Final = "DELETE FROM kafka_offsets WHERE topic = $1"


class LedgerRewound(Exception):
    """The ledger has less of a partition than the consumer recorded.

    PostgreSQL failed over to a replica that lagged behind, or was restored from a backup. Kafka
    still has the events that the ledger lost, so reading goes back to the stored offset.
    """


async def forget(pool: Pool, topic: str) -> None:
    """Delete the stored offsets of a topic that was just created.

    They belong to a deleted topic of the same name. `place` cannot tell this if the new topic is
    already as long as the old one.
    """
    async with transaction(pool) as connection:
        await connection.execute(_FORGET, topic)


async def place(pool: Pool, topic: str, logs: Mapping[int, range]) -> dict[int, int]:
    """Return the offset to read each partition from, and store it.

    `logs` has the offsets of the events that Kafka keeps, by partition. A stored offset outside
    them is replaced by the earliest one.
    """
    earliest = {partition: kept.start for partition, kept in logs.items()}
    moved: dict[int, int] = {}
    async with transaction(pool) as connection:
        await connection.execute(_ADD, topic, list(earliest), list(earliest.values()))
        stored = await _lock(connection, topic, logs)
        for partition, offset in stored.items():
            name, kept = f"{topic}/{partition}", logs[partition]
            if offset > kept.stop:
                text = "%s ends at %d, before the stored offset %d: recreated, reading all of it"
                log.warning(text, name, kept.stop, offset)
            elif offset < kept.start:
                text = "%s begins at %d: Kafka deleted %d events before they were recorded"
                log.error(text, name, kept.start, kept.start - offset)
            else:
                continue
            moved[partition] = kept.start
        await move(connection, topic, moved)
    return stored | moved


async def lock(connection: Connection, topic: str, positions: Mapping[int, int]) -> dict[int, int]:
    """Lock stored offsets in the caller's transaction, and return them.

    Raises `LedgerRewound` if one of them is below its position.
    """
    stored = await _lock(connection, topic, positions)
    for partition, position in positions.items():
        if stored.get(partition, -1) < position:
            raise LedgerRewound(
                f"{topic}/{partition} was recorded up to {position}, "
                f"the ledger has it up to {stored.get(partition, 'nothing')}"
            )
    return stored


async def move(connection: Connection, topic: str, offsets: Mapping[int, int]) -> None:
    """Store offsets whose rows the caller's transaction has locked."""
    if offsets:
        await connection.execute(_MOVE, topic, list(offsets), list(offsets.values()))


async def _lock(connection: Connection, topic: str, partitions: Iterable[int]) -> dict[int, int]:
    rows = await connection.fetch(_LOCK, topic, list(partitions))
    return {row["partition"]: row["next_offset"] for row in rows}
