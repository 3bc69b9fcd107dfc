"""Publishes accepted reservations to Kafka, immediately and from memory.

Order does not matter and duplicates are harmless. A batch therefore goes to any partition, and a
failed batch is sent again. The producer is not idempotent, because aiokafka's idempotent producer
never gives up a sent batch. The publisher holds an event until Kafka has acknowledged it
(`acks=all`) and its outbox entry is deleted.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    UnknownTopicOrPartitionError,
)
from aiokafka.producer.message_accumulator import BatchBuilder

from flashsale import cancellation, events, kafka_clients
from flashsale.errors import OtherEngine, SettingsError
from flashsale.events import Event
from flashsale.outbox import Outbox
from flashsale.requirements import BATCH_BYTES
from flashsale.reservations import OutboxEntry
from flashsale.settings import KafkaSettings
from flashsale.tracing import sampled, traceparent_of
from flashsale_api.engine import OWNER_SECONDS, Engine, GroupOwner, OwnerUnknown
from flashsale_api.metrics import Metrics
from flashsale_api.settler import Settler

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from flashsale_api.spans import Spans

log = logging.getLogger(__name__)

SENDERS: Final = 3
"""Batches in flight. Meanwhile the next batches fill."""
ENOUGH: Final = 256
"""This many pending events are sent without waiting for more."""
LINGER_SECONDS: Final = 0.01
"""How long fewer events wait for more, as in Kafka's own producer.

A batch costs the API 0.16 ms of CPU, as much as a hundred events. Buyers do not wait for it.
"""
REQUEST_TIMEOUT_SECONDS: Final = 10
BATCH_SECONDS: Final = 12.0
"""How long to wait for the acknowledgement of a batch before the producer is discarded."""
BACKOFF_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0)
SET_ASIDE_SECONDS: Final = 60.0
"""How long an event rests that is too large for the topic. A sweep then publishes it again."""
REMEMBERED: Final = 50_000
"""Published replays that a pod remembers at least, in at most 45 MB."""


_Version: TypeAlias = tuple[str, str, int]
"""A version of a reservation: sale id, reservation id, version.

A later sale of the item can have a reservation with the same id and version.
"""
_Key: TypeAlias = tuple[str, str] | _Version


class Publisher:
    """Publishes events, and lets `settler` delete their outbox entries. A process has one."""

    def __init__(
        self,
        kafka: KafkaSettings,
        outbox: Outbox,
        metrics: Metrics,
        engine: Engine,
        *,
        spans: "Spans | None" = None,
    ) -> None:
        self._kafka = kafka
        self._spans = spans
        self._metrics = metrics
        self._engine = engine
        self._owner = GroupOwner(kafka)
        self._topic = events.topic(kafka.engine)
        self._pending: deque[OutboxEntry] = deque()
        self._work = asyncio.Event()
        self._by_item: Counter[str] = Counter()
        self._held: set[_Key] = set()
        self.settler = Settler(outbox, self._forget)
        self._awaited: dict[_Version, list[asyncio.Future[None]]] = {}
        self._recent: dict[_Version, int] = {}
        """The revisions of the sale in which Kafka has acknowledged replays."""
        self._older: dict[_Version, int] = {}
        """The same of the replays before. To forget one replay at a time would cost more."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._turn = itertools.count()
        self._batch_bytes = BATCH_BYTES
        self._failures = 0
        self._told_too_large = False
        self.connected = False

    @property
    def unacknowledged(self) -> int:
        """The number of events in memory that Kafka has not acknowledged."""
        return self._by_item.total()

    @property
    def held(self) -> int:
        """The number of events in memory, including acknowledged ones that are not settled."""
        return len(self._held)

    @property
    def sweepable(self) -> bool:
        """Whether Kafka takes the entries of other pods. Those of another engine are left alone."""
        return self.connected and not self._engine.conflict

    def unacknowledged_by_item(self) -> dict[str, int]:
        """Returns `unacknowledged` per item, without the items that have none."""
        self._by_item = +self._by_item
        return dict(self._by_item)

    def holds(self, item_id: str, entry_id: str) -> bool:
        """Whether this pod is publishing or settling an outbox entry."""
        return (item_id, entry_id) in self._held

    def add(self, entry: OutboxEntry) -> None:
        """Takes an event to publish, unless the publisher holds it already. Never waits.

        A replay that Kafka has acknowledged to this pod in this revision of the sale is not
        published again. No rebuild has left its event out, because the script found this version
        in a trusted sale: docs/adr/0022-replays-are-published-once.md.
        """
        key = _key(entry)
        if key in self._held or (not entry.entry_id and self._remembered(entry)):
            return
        self._held.add(key)
        self._pending.append(entry)
        self._by_item[entry.item_id] += 1
        self._idle.clear()
        self._work.set()

    def acknowledgement(self, entry: OutboxEntry) -> "asyncio.Future[None]":
        """Returns a future of Kafka's next acknowledgement of a version that was just added.

        The future is done if the version is a replay that the pod remembers. Cancel the future to
        give up waiting.
        """
        key = _version(entry)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._remembered(entry):
            future.set_result(None)
            return future
        self._awaited.setdefault(key, []).append(future)

        def ended(_: "asyncio.Future[None]") -> None:
            waiting = self._awaited.get(key, [])
            if future in waiting:
                waiting.remove(future)
            if not waiting:
                self._awaited.pop(key, None)

        future.add_done_callback(ended)
        return future

    async def run(self) -> None:
        """Publishes until it is cancelled. Makes a new producer after each failure of Kafka."""
        kafka_clients.adapt_aiokafka()
        while True:
            self._batch_bytes = BATCH_BYTES
            producer = None
            try:
                producer = AIOKafkaProducer(
                    **self._kafka.kafka_client(),
                    acks="all",
                    max_batch_size=BATCH_BYTES,
                    request_timeout_ms=REQUEST_TIMEOUT_SECONDS * 1000,
                )
                await producer.start()
                await self._require_topic(producer)
                await self._check_owner()
                if not self._failures:
                    log.info("publishing to Kafka, %d events are waiting", self.unacknowledged)
                self.connected = True
                await cancellation.in_own_task(self._send(producer))
            except* OtherEngine:
                self._failures = len(BACKOFF_SECONDS)
            except* (KafkaError, OSError, SettingsError) as group:
                # A wrong certificate after a renewal counts as an outage, so sales continue.
                self._metrics.publish_failures.inc()
                if not self._failures:
                    log.warning(
                        "Kafka failed, events stay in memory until it is back: %r",
                        group.exceptions[0],
                    )
                self._failures += 1
            finally:
                self.connected = False
                if producer is not None:
                    await kafka_clients.close(
                        "the publisher's producer", kafka_clients.discard(producer)
                    )
            await asyncio.sleep(BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS)) - 1])

    async def flush(self, timeout_seconds: float) -> int:
        """Waits until no event is held. Returns how many are left after `timeout_seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        return len(self._held)

    def _forget(self, keys: Iterable[_Key]) -> None:
        self._held.difference_update(keys)
        if not self._held:
            self._idle.set()

    async def _send(self, producer: AIOKafkaProducer) -> None:
        async with asyncio.TaskGroup() as senders:
            senders.create_task(self._watch_owner())
            for _ in range(SENDERS):
                senders.create_task(self._send_forever(producer))

    async def _watch_owner(self) -> None:
        while True:
            await asyncio.sleep(OWNER_SECONDS)
            await self._check_owner()
            self._note_success()

    def _note_success(self) -> None:
        """Notes an acknowledgement, or a producer that lasted. To connect does not suffice."""
        if self._failures:
            log.info("Kafka is back, %d events are waiting", self.unacknowledged)
        self._failures = 0

    async def _require_topic(self, producer: AIOKafkaProducer) -> None:
        """Raises `UnknownTopicOrPartitionError` until the topic exists.

        It reads all topics. A broker may create a topic that is read by its name, with too few
        partitions and too short a retention.
        """
        topics = await producer.client.fetch_all_metadata()
        if not topics.partitions_for_topic(self._topic):
            raise UnknownTopicOrPartitionError(
                f"the topic {self._topic} does not exist yet: a consumer creates it, or a user who "
                "may create topics"
            )
        await producer.partitions_for(self._topic)

    async def _check_owner(self) -> None:
        """Raises `OtherEngine` if another engine's consumers would record this pod's events.

        The last answer counts while Kafka cannot say who owns the group.
        """
        try:
            self._engine.found_in_kafka(await self._owner.read())
        except OwnerUnknown as error:
            log.debug("%s", error)
        if self._engine.conflict:
            raise OtherEngine(self._engine.conflict)

    async def _send_forever(self, producer: AIOKafkaProducer) -> None:
        while True:
            while not self._pending:
                self._work.clear()
                await self._work.wait()
            if len(self._pending) < ENOUGH:
                await asyncio.sleep(LINGER_SECONDS)
            if not self._pending:
                continue  # another sender took them
            builder = producer.create_batch()
            batch, spans = self._fill(builder)
            try:
                # If a broker was killed, aiokafka retries without a limit.
                async with asyncio.timeout(BATCH_SECONDS):
                    partitions = sorted(await producer.partitions_for(self._topic))
                    partition = partitions[next(self._turn) % len(partitions)]
                    sent = await producer.send_batch(builder, self._topic, partition=partition)
                    sent.add_done_callback(kafka_clients.retrieve)
                    # aiokafka fails on a cancelled batch, so a timeout must not cancel it.
                    await asyncio.shield(sent)
            except BaseException as error:
                if self._spans is not None:
                    self._spans.failed(spans, error)
                too_large = isinstance(error, (MessageSizeTooLargeError, RecordListTooLargeError))
                if too_large and len(batch) == 1:
                    self._set_aside(batch[0])
                    continue
                self._pending.extendleft(reversed(batch))
                if too_large:
                    self._batch_bytes = min(self._batch_bytes, builder.size()) // 2
                    continue
                if isinstance(error, InvalidTimestampError):
                    raise InvalidTimestampError(kafka_clients.WRONG_CLOCK) from error
                raise
            if self._spans is not None:
                self._spans.sent(spans, len(batch), partition)
            self._note_success()
            self._acknowledge(batch)

    def _acknowledge(self, batch: Sequence[OutboxEntry]) -> None:
        """Lets the entries of acknowledged events be settled, and ends the waits for them."""
        self._metrics.published.inc(len(batch))
        for entry in batch:
            item_id, entry_id, reservation_id, record, snapshot, _ = entry
            self._by_item[item_id] -= 1
            version = _version(entry)
            if entry_id:
                self.settler.add(item_id, (entry_id, reservation_id, record.version))
            else:
                self._forget([version])
                self._remember(version, snapshot.revision)
            if self._awaited:
                for future in self._awaited.pop(version, ()):
                    if not future.done():
                        future.set_result(None)

    def _remember(self, version: _Version, revision: int) -> None:
        self._recent[version] = revision
        if len(self._recent) >= REMEMBERED:
            self._recent, self._older = {}, self._recent

    def _remembered(self, entry: OutboxEntry) -> bool:
        """Whether Kafka has acknowledged a replay to this pod in this revision of the sale."""
        version = _version(entry)
        known = self._recent.get(version) or self._older.get(version)
        return known == entry.snapshot.revision

    def _fill(self, builder: BatchBuilder) -> "tuple[list[OutboxEntry], list[Span]]":
        """Moves pending events into a batch until it is full.

        Returns the events, and the spans of the sampled ones.
        """
        batch: list[OutboxEntry] = []
        spans: list[Span] = []
        # For topics without LogAppendTime. Kafka deletes records by their age. Those of old
        # reservations must not be deleted unread, and it refuses a time ahead of its clock.
        now_ms = int(time.time() * 1000)
        while self._pending and (not batch or builder.size() < self._batch_bytes):
            item_id, _, reservation_id, record, snapshot, traceparent = self._pending[0]
            span = None
            if self._spans is not None and sampled(traceparent):
                span = self._spans.sending(self._topic, reservation_id, traceparent)
                traceparent = traceparent_of(span)
            fits = builder.append(
                timestamp=now_ms,
                key=reservation_id.encode(),
                value=events.encode(Event.of(item_id, reservation_id, record, snapshot)),
                headers=events.headers(traceparent),
            )
            if fits is None:
                break
            batch.append(self._pending.popleft())
            if span is not None:
                spans.append(span)
        builder.close()
        return batch, spans

    def _set_aside(self, entry: OutboxEntry) -> None:
        """Leaves one event that is too large for the topic to a later sweep."""
        self._metrics.publish_failures.inc()
        if not self._told_too_large:
            log.error(
                "the event of reservation %s is larger than the topic %s accepts: raise its "
                "max.message.bytes to %d",
                entry.reservation_id,
                self._topic,
                BATCH_BYTES,
            )
        self._told_too_large = True

        def forget() -> None:
            self._by_item[entry.item_id] -= 1
            self._forget([_key(entry)])

        asyncio.get_running_loop().call_later(SET_ASIDE_SECONDS, forget)


def _key(entry: OutboxEntry) -> _Key:
    """Returns the key of a held event: its outbox entry, or a replayed reservation's version."""
    if entry.entry_id:
        return entry.item_id, entry.entry_id
    return _version(entry)


def _version(entry: OutboxEntry) -> _Version:
    return entry.snapshot.sale_id, entry.reservation_id, entry.record.version
