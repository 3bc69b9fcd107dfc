"""Makes and reads Kafka clients, and opens ledger transactions.

Only this module of the consumer uses private parts of aiokafka.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from inspect import GEN_CLOSED, getgeneratorstate
from typing import Final, TypeAlias

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from flashsale import kafka_clients, ledger
from flashsale.ledger import Connection, Pool
from flashsale.requirements import BATCH_BYTES
from flashsale.settings import KafkaSettings

Records: TypeAlias = Mapping[TopicPartition, list[ConsumerRecord]]

TRANSACTION_SECONDS: Final = 30.0
_REQUEST_TIMEOUT_MS: Final = 15_000
_ADMIN_REQUEST_TIMEOUT_MS: Final = 10_000
_METADATA_AGE_MS: Final = 5_000
"""The client notices added partitions and recreated topics within this time."""
_NO_LEADER: Final = -1
"""The leader in Kafka's answer for a partition without one."""


def group_member(kafka: KafkaSettings, group_id: str) -> AIOKafkaConsumer:
    """Makes a client that can join a consumer group. It is not connected yet."""
    return AIOKafkaConsumer(
        **kafka.kafka_client(),
        group_id=group_id,
        enable_auto_commit=False,
        # The ledger determines where reading begins, see `offsets.place`.
        auto_offset_reset="none",
        request_timeout_ms=_REQUEST_TIMEOUT_MS,
        metadata_max_age_ms=_METADATA_AGE_MS,
    )


async def start(client: AIOKafkaConsumer | AIOKafkaProducer | AIOKafkaAdminClient) -> None:
    """Connects a client. A cancellation waits up to 3 s for the connections, so that they close."""
    task = asyncio.create_task(client.start())
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=kafka_clients.CLOSE_SECONDS)
        task.cancel()  # or it would connect again after the caller has closed the client
        task.add_done_callback(kafka_clients.retrieve)
        raise


@asynccontextmanager
async def admin(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    """Connects a client for topics and groups. Raises `KafkaError`."""
    client = AIOKafkaAdminClient(
        **kafka.kafka_client(), request_timeout_ms=_ADMIN_REQUEST_TIMEOUT_MS
    )
    try:
        await start(client)
        yield client
    finally:
        await kafka_clients.close("the client for topics and groups", client.close())


def leaderless(
    consumer: AIOKafkaConsumer, partitions: Iterable[TopicPartition]
) -> frozenset[TopicPartition]:
    """Returns the partitions that have no leader, as far as the client knows."""
    leader = consumer._client.cluster.leader_for_partition
    return frozenset(tp for tp in partitions if leader(tp) == _NO_LEADER)


def metadata_time(consumer: AIOKafkaConsumer) -> float:
    """Returns when a broker last answered with metadata, which the client often asks for."""
    refreshed: float = consumer._client.cluster._last_successful_refresh_ms
    return refreshed


async def leave(consumer: AIOKafkaConsumer) -> None:
    """Leaves the group and closes the connections, even if leaving fails."""
    try:
        await consumer.stop()
    finally:
        # stop() does not get this far if it fails.
        await consumer._client.close()


def reader(kafka: KafkaSettings) -> AIOKafkaConsumer:
    """Makes a client that reads partitions outside of a group. It is not connected yet."""
    return AIOKafkaConsumer(
        **kafka.kafka_client(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="none",
        max_partition_fetch_bytes=BATCH_BYTES,  # it reads ahead this much of each partition
        request_timeout_ms=_REQUEST_TIMEOUT_MS,
        metadata_max_age_ms=_METADATA_AGE_MS,
    )


class Undecodable(ConsumerRecord):  # type: ignore[misc] # aiokafka has no types
    """A record in whose batch a header's name is not UTF-8. Only its place is known."""

    def __init__(self, partition: TopicPartition, offset: int) -> None:
        headers = [("omitted", b"cannot be decoded")]
        super().__init__(*partition, offset, 0, 0, None, None, None, -1, -1, headers)


class Skipped(ConsumerRecord):  # type: ignore[misc] # aiokafka has no types
    """The last of some offsets without a record, such as the end of another's transaction."""

    def __init__(self, partition: TopicPartition, offset: int) -> None:
        super().__init__(*partition, offset, 0, 0, None, None, None, -1, -1, [])


async def poll(
    consumer: AIOKafkaConsumer, offsets: Mapping[int, int], *, seconds: float, limit: int
) -> Records:
    """Returns the records that arrive, at most `limit`. `offsets` are the next ones by partition.

    If aiokafka cannot decode a record, it cannot decode the rest of the batch either. A batch is of
    one producer, so it has no events. This returns the records before it, then each of the rest as
    `Undecodable`. Raises `KafkaError` if the client has to be replaced.
    """
    _require_running(consumer)
    records: Records
    timeout_ms = int(seconds * 1000)
    try:
        records = await consumer.getmany(timeout_ms=timeout_ms, max_records=limit)
    except UnicodeDecodeError:
        tp, offset = _undecoded(consumer)
        for number, position in offsets.items():  # aiokafka has dropped other records, too
            consumer.seek(TopicPartition(tp.topic, number), position)
        # Some offsets can have no record, so there can be fewer records before it.
        before = min(limit, offset - offsets[tp.partition])
        while before:
            with suppress(UnicodeDecodeError):
                records = await consumer.getmany(tp, timeout_ms=timeout_ms, max_records=before)
                break
            consumer.seek(tp, offsets[tp.partition])
            before //= 2
        else:
            consumer.seek(tp, offset + 1)
            records = {tp: [Undecodable(tp, offset)]}
    return records


def _require_running(consumer: AIOKafkaConsumer) -> None:
    """Raises `KafkaError` if an unexpected error has ended a task of the client.

    aiokafka neither starts it again nor reports its end, so the client would wait for ever.
    """
    for task in (consumer._fetcher._fetch_task, consumer._client._sync_task):
        if task.done():
            raise KafkaError(f"a client of Kafka has stopped: {task!r}")


def with_skipped(
    consumer: AIOKafkaConsumer, records: Records, offsets: Mapping[int, int]
) -> Records:
    """Returns the polled records, each partition's up to the offset where the client reads on.

    Kafka's own records, such as the ends of other producers' transactions, are not returned. Behind
    the last event they would count as unread for ever.
    """
    found = dict(records)
    for tp in consumer.assignment():
        if tp.partition in offsets:
            position = consumer._subscription._assigned_state(tp).position
            read = found.get(tp, [])
            if position > (read[-1].offset + 1 if read else offsets[tp.partition]):
                found[tp] = [*read, Skipped(tp, position - 1)]
    return found


def _undecoded(consumer: AIOKafkaConsumer) -> tuple[TopicPartition, int]:
    """Returns the place of the record on which `getmany` has just failed."""
    fetched = consumer._fetcher._records.items()
    unpacking = {tp: each._partition_records for tp, each in fetched if hasattr(each, "getall")}
    return next(
        (tp, each.next_fetch_offset)
        for tp, each in unpacking.items()
        if getgeneratorstate(each._records_iterator) == GEN_CLOSED
    )


@asynccontextmanager
async def transaction(pool: Pool) -> AsyncIterator[Connection]:
    """Opens a transaction for at most 30 s. Raises `LedgerUnavailable`."""
    async with (
        ledger.translated(),
        asyncio.timeout(TRANSACTION_SECONDS),
        ledger.transaction(pool) as connection,
    ):
        yield connection
