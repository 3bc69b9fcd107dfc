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
from collections import Counter, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.producer.message_accumulator import BatchBuilder

from flashsale import events
from flashsale.errors import OtherEngine, RedisUnavailable
from flashsale.events import Event
from flashsale.outbox import Outbox
from flashsale.reservations import Record, Snapshot
from flashsale.settings import KafkaSettings
from flashsale.tracing import sampled, traceparent_of
from flashsale_api.engine import OWNER_SECONDS, Engine, GroupOwner, OwnerUnknown
from flashsale_api.metrics import Metrics

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from flashsale_api.spans import Spans

log = logging.getLogger(__name__)

BATCH_BYTES: Final = 256 * 1024
SENDERS: Final = 3
"""Batches in flight. Meanwhile the next batches fill."""
ENOUGH: Final = 256
"""This many pending events are sent without waiting for more."""
LINGER_SECONDS: Final = 0.01
"""How long fewer events wait for more, as in Kafka's own producer.

A batch costs the API 0.16 ms of CPU, as much as a hundred events. Buyers do not wait for it.
"""
SETTLE_BATCH: Final = 256
REQUEST_TIMEOUT_SECONDS: Final = 10
ACKNOWLEDGED_SECONDS: Final = 12.0
"""How long to wait for the acknowledgement of a batch before the producer is discarded."""
STOP_SECONDS: Final = 2.0
BACKOFF_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0)


class Accepted(NamedTuple):
    """A reservation that Redis has accepted, and the id of its outbox entry.

    `entry_id` is empty for a replay, whose entry may be deleted already.
    """

    item_id: str
    entry_id: str
    reservation_id: str
    record: Record
    snapshot: Snapshot
    traceparent: str


class Publisher:
    """Publishes events to `topic` and settles their outbox entries. A process has one."""

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
        self._outbox = outbox
        self._metrics = metrics
        self._engine = engine
        self._owner = GroupOwner(kafka)
        self._topic = events.topic(kafka.engine)
        self._pending: deque[Accepted] = deque()
        self._work = asyncio.Event()
        self._by_item: Counter[str] = Counter()
        self._acknowledged: dict[str, list[tuple[str, str]]] = {}
        self._to_settle = asyncio.Event()
        self._held: set[tuple[str, str]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._turn = itertools.count()
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

    def add(self, accepted: Accepted) -> None:
        """Takes a reservation to publish, unless the publisher holds it already. Never waits."""
        key = _key(accepted)
        if key in self._held:
            return
        self._held.add(key)
        self._pending.append(accepted)
        self._by_item[accepted.item_id] += 1
        self._idle.clear()
        self._work.set()

    async def run(self) -> None:
        """Publishes until it is cancelled. Makes a new producer after each failure of Kafka."""
        failures = 0
        while True:
            producer = AIOKafkaProducer(
                **self._kafka.kafka_client(),
                acks="all",
                max_batch_size=BATCH_BYTES,
                request_timeout_ms=REQUEST_TIMEOUT_SECONDS * 1000,
            )
            try:
                await producer.start()
                await producer.partitions_for(self._topic)
                await self._check_owner()
                log.info("publishing to Kafka, %d events are waiting", self.unacknowledged)
                failures = 0
                self.connected = True
                # Before Python 3.13, a failed TaskGroup leaves its task a counted cancellation,
                # which a timeout can mistake for one from outside. So give it its own task.
                await asyncio.create_task(self._send(producer))
            except* OtherEngine:
                failures = len(BACKOFF_SECONDS)
            except* (KafkaError, OSError) as group:
                self._metrics.publish_failures.inc()
                if not failures:
                    log.warning(
                        "Kafka failed, events stay in memory until it is back: %r",
                        group.exceptions[0],
                    )
                failures += 1
            finally:
                self.connected = False
                await _discard(producer)
            await asyncio.sleep(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1])

    async def settle(self) -> None:
        """Deletes the outbox entries of acknowledged events until it is cancelled."""
        away = False
        while True:
            await self._to_settle.wait()
            self._to_settle.clear()
            while self._acknowledged:
                # Take the items in turn. A waiting item may have a full outbox and sell nothing.
                item_id = next(iter(self._acknowledged))
                page = self._acknowledged[item_id][:SETTLE_BATCH]
                try:
                    await self._outbox.settle(item_id, page)
                except RedisUnavailable as error:
                    if not away:
                        log.warning("cannot settle outbox entries yet: %s", error)
                    away = True
                    self._acknowledged[item_id] = self._acknowledged.pop(item_id)
                    await asyncio.sleep(BACKOFF_SECONDS[-1])
                    continue
                away = False
                if left := self._acknowledged.pop(item_id)[len(page) :]:
                    self._acknowledged[item_id] = left
                self._forget((item_id, entry_id) for entry_id, _ in page)

    async def flush(self, timeout_seconds: float) -> int:
        """Waits until no event is held. Returns how many are left after `timeout_seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        return len(self._held)

    def _forget(self, keys: Iterable[tuple[str, str]]) -> None:
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
                async with asyncio.timeout(ACKNOWLEDGED_SECONDS):
                    partitions = sorted(await producer.partitions_for(self._topic))
                    partition = partitions[next(self._turn) % len(partitions)]
                    sent = await producer.send_batch(builder, self._topic, partition=partition)
                    sent.add_done_callback(_retrieve)
                    # aiokafka fails on a cancelled batch, so a timeout must not cancel it.
                    await asyncio.shield(sent)
            except BaseException as error:
                self._pending.extendleft(reversed(batch))
                if self._spans is not None:
                    self._spans.failed(spans, error)
                raise
            if self._spans is not None:
                self._spans.sent(spans, len(batch), partition)
            self._metrics.published.inc(len(batch))
            for accepted in batch:
                self._by_item[accepted.item_id] -= 1
                if accepted.entry_id:
                    self._acknowledged.setdefault(accepted.item_id, []).append(
                        (accepted.entry_id, accepted.reservation_id)
                    )
                else:
                    self._forget([_key(accepted)])
            self._to_settle.set()

    def _fill(self, builder: BatchBuilder) -> "tuple[list[Accepted], list[Span]]":
        """Moves pending events into a batch until it is full.

        Returns the events, and the spans of the sampled ones.
        """
        batch: list[Accepted] = []
        spans: list[Span] = []
        while self._pending:
            item_id, _, reservation_id, record, snapshot, traceparent = self._pending[0]
            span = None
            if self._spans is not None and sampled(traceparent):
                span = self._spans.sending(self._topic, reservation_id, traceparent)
                traceparent = traceparent_of(span)
            fits = builder.append(
                timestamp=record.occurred_ms,
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


def _key(accepted: Accepted) -> tuple[str, str]:
    """Returns the key of a held event: the id of its outbox entry, or of a replayed reservation."""
    return accepted.item_id, accepted.entry_id or accepted.reservation_id


async def _discard(producer: AIOKafkaProducer) -> None:
    """Stops a producer. The next producer sends its unsent events again."""
    # aiokafka has no public way to drop the batches, and stop() would wait for them.
    producer._message_accumulator.fail_all(KafkaError("the producer was discarded"))
    try:
        await asyncio.wait_for(producer.stop(), STOP_SECONDS)
    except Exception as error:  # noqa: BLE001 - a new producer replaces it after any error
        log.debug("a producer failed to stop: %r", error)
    await producer.client.close()  # stop() did not close it if it failed


def _retrieve(sent: asyncio.Future[object]) -> None:
    """Retrieves the exception of a batch that timed out, or asyncio would log it."""
    if not sent.cancelled():
        sent.exception()
