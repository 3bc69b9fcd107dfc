"""Announces recorded reservations in a topic for order services, see ADR 21.

The announcer is one step behind the recording. It takes each batch that was just recorded, and
publishes the ledger's state of its reservations. It reads only those rows that the batch does not
know. Recording never waits for it. If Kafka refuses messages, or after a restart, it reads the
events again from the announced offset. So only a few batches are in memory.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain
from typing import Final
from zlib import crc32

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RecordListTooLargeError,
)
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.structs import RecordMetadata

from flashsale import events, kafka_clients, requirements
from flashsale.errors import LedgerUnavailable, SettingsError
from flashsale.fields import ReservationId, SaleId
from flashsale.ledger import Pool
from flashsale.requirements import BATCH_BYTES, PARTITIONS, Checks
from flashsale.settings import KafkaSettings
from flashsale_consumer import clients, topics
from flashsale_consumer.availability import Availability
from flashsale_consumer.metrics import Metrics
from flashsale_consumer.partitions import Partitions
from flashsale_consumer.recorded import Message, Source

log = logging.getLogger(__name__)

PAGE: Final = 5_000
"""Events that are announced together."""
POLL_SECONDS: Final = 0.5
REBUILDS_SECONDS: Final = 1.0
"""How often the announcer looks for rebuilt sales."""
PAGE_SECONDS: Final = 12.0
"""How long Kafka may take to receive a page, and then to acknowledge it. After that the producer is
discarded."""
_REQUEST_TIMEOUT_MS: Final = 10_000
_LEAST_BATCH_BYTES: Final = 100
"""Each message is larger. So batches with this limit have one message."""
_TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError)


class _Name(msgspec.Struct, frozen=True, rename="camel"):
    """The reservation that an event is about."""

    sale_id: SaleId
    reservation_id: ReservationId


_decoder = msgspec.json.Decoder(_Name)


class Announcer:
    """The announcements of one consumer process."""

    def __init__(
        self, kafka: KafkaSettings, metrics: Metrics, partitions: int = PARTITIONS
    ) -> None:
        self._kafka = kafka
        self._new_partitions = partitions
        self._metrics = metrics
        self._read_topic = events.topic(kafka.engine)
        self._topic = events.recorded_topic(kafka.engine)
        up = metrics.server_up.labels("recorded")
        self._availability = Availability(self._topic, up, there=True)
        self._checks = Checks(log)
        self._batch_bytes = BATCH_BYTES
        self._delivered: dict[tuple[bytes, bytes], tuple[int, int]] = {}
        """Messages that Kafka has, while it has not acknowledged their whole page.

        They are not sent again. A partition can be away for hours. Repeats would fill the others,
        and Kafka would delete messages that no receiver has read. The values are the partition and
        the time of the message in Kafka, in ms.
        """
        self._reading: dict[int, int] = {}
        """The offsets of the reader, by partition."""

    async def run(self, pool: Pool, partitions: Partitions, engine_id: str) -> None:
        """Announces the events of `partitions` until cancelled. Outages are only logged."""
        source = Source(pool, engine_id)
        while True:
            try:
                async with self._connected() as (reader, producer):
                    await self._announce(partitions, source, reader, producer)
            except (OffsetOutOfRangeError, NoOffsetForPartitionError):
                partitions.displace()
            except (KafkaError, LedgerUnavailable, SettingsError, TimeoutError) as error:
                self._availability.away(error)
            await asyncio.sleep(self._availability.delay())

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[AIOKafkaConsumer, AIOKafkaProducer]]:
        """Makes the topic and the clients."""
        facts = await topics.create_recorded(self._kafka, self._new_partitions)
        if facts is not None:
            self._checks.require(requirements.RECORDED, facts)
        self._batch_bytes = BATCH_BYTES
        reader = clients.reader(self._kafka)
        producer = AIOKafkaProducer(
            **self._kafka.kafka_client(),
            acks="all",
            max_batch_size=BATCH_BYTES,
            request_timeout_ms=_REQUEST_TIMEOUT_MS,
        )
        try:
            await clients.start(reader)
            await clients.start(producer)
            yield reader, producer
        finally:
            await kafka_clients.close(
                "the announcer's clients", kafka_clients.discard(producer), clients.leave(reader)
            )

    async def _announce(
        self,
        partitions: Partitions,
        source: Source,
        reader: AIOKafkaConsumer,
        producer: AIOKafkaProducer,
    ) -> None:
        self._reading = {}
        await self._check_delivered(reader, producer)
        looked = 0.0
        while True:
            announced = partitions.announced
            if 0 in announced and time.monotonic() - looked > REBUILDS_SECONDS:
                await self._announce_rebuilds(source, producer)
                looked = time.monotonic()
                continue
            messages: list[Message] = []
            if batch := partitions.next_batch():
                messages, names, end = source.written(batch.written), batch.names, batch.end
                self._seek(reader, {})
            elif announced != partitions.positions:
                names, end = await self._read(partitions, reader)
            else:
                if announced:  # so nothing is owed
                    self._availability.back()
                await partitions.moved(REBUILDS_SECONDS)
                continue
            messages += await source.reservations(names)
            await self._publish(producer, messages)
            for number, offset in end.items():
                announced[number] = max(announced[number], offset)

    async def _read(
        self, partitions: Partitions, reader: AIOKafkaConsumer
    ) -> tuple[Sequence[tuple[str, str]], Mapping[int, int]]:
        """Reads a page of events from Kafka. Returns it once the ledger has it."""
        announced = partitions.announced
        self._seek(reader, announced)
        page = await clients.poll(reader, self._reading, seconds=POLL_SECONDS, limit=PAGE)
        page = clients.with_skipped(reader, page, self._reading)
        end = {tp.partition: records[-1].offset + 1 for tp, records in page.items()}
        self._reading |= end
        if not await partitions.recorded(announced, end):
            return [], {}
        return _names(chain.from_iterable(page.values())), end

    def _seek(self, reader: AIOKafkaConsumer, offsets: Mapping[int, int]) -> None:
        """Sets the reader to offsets. Without offsets it fetches nothing."""
        if self._reading == offsets:
            return
        if self._reading.keys() != offsets.keys():
            reader.assign([TopicPartition(self._read_topic, number) for number in offsets])
        for number, offset in offsets.items():
            reader.seek(TopicPartition(self._read_topic, number), offset)
        self._reading = dict(offsets)

    async def _announce_rebuilds(self, source: Source, producer: AIOKafkaProducer) -> None:
        rebuilds = await source.rebuilds()
        if rebuilds:
            await self._publish(producer, [source.rebuilt(rebuild) for rebuild in rebuilds])
            await source.announced(rebuilds)

    async def _check_delivered(self, reader: AIOKafkaConsumer, producer: AIOKafkaProducer) -> None:
        """Forgets the delivered messages if Kafka has lost them, as in a topic that was recreated.

        Offsets would not show that, because the new topic soon has as many messages. Looking up a
        time needs no right to read the topic. If it finds a message of another time, the delivered
        ones are sent again.
        """
        first: dict[TopicPartition, int] = {}
        for number, time_ms in self._delivered.values():
            first.setdefault(TopicPartition(self._topic, number), time_ms)
        if not first:
            return
        async with asyncio.timeout(PAGE_SECONDS):
            there = await producer.partitions_for(self._topic)
            times = {tp: time_ms for tp, time_ms in first.items() if tp.partition in there}
            found = await reader.offsets_for_times(times)
        if first != {tp: message.timestamp for tp, message in found.items() if message}:
            self._delivered.clear()

    async def _publish(self, producer: AIOKafkaProducer, messages: Sequence[Message]) -> None:
        """Returns once all in-sync replicas have all messages.

        Raises `KafkaError` and TimeoutError. Some messages can be published then.
        """
        if len(self._delivered) > 4 * PAGE:  # of pages that this consumer has no more
            self._delivered.clear()
        left = messages
        while left := [each for each in left if (each.key, each.value) not in self._delivered]:
            try:
                await self._send(producer, left)
            except _TOO_LARGE:
                # A topic with a lower limit gets smaller batches, in the end of one message.
                if self._batch_bytes < _LEAST_BATCH_BYTES:
                    raise
                self._batch_bytes //= 4
            except InvalidTimestampError as error:
                raise InvalidTimestampError(kafka_clients.WRONG_CLOCK) from error
            else:
                self._batch_bytes = min(2 * self._batch_bytes, BATCH_BYTES)
        if messages:
            self._delivered.clear()
            self._metrics.announced.inc(len(messages))
            self._availability.back()

    async def _send(self, producer: AIOKafkaProducer, messages: Sequence[Message]) -> None:
        now_ms = int(time.time() * 1000)
        sent: list[asyncio.Future[RecordMetadata]] = []
        # aiokafka retries without a limit if a broker was killed.
        async with asyncio.timeout(PAGE_SECONDS):
            count = len(await producer.partitions_for(self._topic))
            by_partition: dict[int, list[Message]] = {}
            for message in messages:
                by_partition.setdefault(crc32(message.key) % count, []).append(message)
            for partition, own in by_partition.items():
                for builder, some in self._batches(producer, own, now_ms):
                    batch = await producer.send_batch(builder, self._topic, partition=partition)
                    batch.add_done_callback(partial(self._sent, some, now_ms))
                    sent.append(batch)
        # Wait for all. A batch that is only slower than another's error would be sent again.
        # A timeout must not cancel a batch, because aiokafka fails on that.
        done, waiting = await asyncio.wait(sent, timeout=PAGE_SECONDS)
        errors = [error for batch in done if (error := batch.exception())]
        if errors:
            # A size is corrected first, also while another partition is away.
            raise next((error for error in errors if isinstance(error, _TOO_LARGE)), errors[0])
        if waiting:
            raise TimeoutError

    def _sent(
        self, messages: Iterable[Message], now_ms: int, batch: "asyncio.Future[RecordMetadata]"
    ) -> None:
        """Notes that Kafka has messages, also if it says so after their page has failed."""
        kafka_clients.retrieve(batch)
        if not batch.cancelled() and batch.exception() is None:
            at = batch.result()
            # Without a time of the broker, the topic keeps that of the producer.
            place = at.partition, now_ms if at.timestamp == -1 else at.timestamp
            for each in messages:
                self._delivered[each.key, each.value] = place

    def _batches(
        self, producer: AIOKafkaProducer, messages: Iterable[Message], now_ms: int
    ) -> "Iterable[tuple[BatchBuilder, list[Message]]]":
        """Divides messages of a partition into batches of at most `_batch_bytes`."""
        builder, own = producer.create_batch(), list[Message]()
        for message in messages:
            key, value, headers = message
            full = own and builder.size() > self._batch_bytes
            if full or not builder.append(timestamp=now_ms, key=key, value=value, headers=headers):
                builder.close()
                yield builder, own
                builder, own = producer.create_batch(), []
                builder.append(timestamp=now_ms, key=key, value=value, headers=headers)
            own.append(message)
        builder.close()
        yield builder, own


def _names(records: Iterable[ConsumerRecord]) -> list[tuple[str, str]]:
    """Returns the sale id and reservation id of each reservation. Ignores other records."""
    names: dict[tuple[str, str], None] = {}
    for record in records:
        try:
            name = _decoder.decode(record.value or b"")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue  # a dead letter, or skipped offsets
        names[name.sale_id, name.reservation_id] = None
    return list(names)
