"""The worker: reads reservation events from Kafka and records them in the ledger.

A partition is read from the offset that the ledger has stored for it, never from Kafka's own. It
is *placed* when reading was set to that offset. It loses its place when it is assigned, when a
batch could not be recorded, or when the ledger turns out to have less than was recorded; it then
stays paused until it is placed again. So nothing is held in memory through an outage, and
whatever happened meanwhile (a rebalance, a failover, a topic created anew), reading goes on where
the ledger is.
"""

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeAlias

import asyncpg
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)

from flashsale import events, ledger, tracing
from flashsale.errors import ContractViolation, LedgerUnavailable
from flashsale.events import Event
from flashsale_consumer import recorder, topics
from flashsale_consumer.availability import Availability
from flashsale_consumer.closing import close
from flashsale_consumer.dead_letters import DeadLetter, DeadLetters, DeadLettersUnavailable
from flashsale_consumer.metrics import Metrics
from flashsale_consumer.recorder import LedgerRewound, Log, Outcome
from flashsale_consumer.settings import Settings

if TYPE_CHECKING:
    from flashsale_consumer.spans import Traces

log = logging.getLogger(__name__)

GROUP_ID: Final = "flashsale-ledger"
BATCH_LIMIT: Final = 5_000
"""Events in one transaction."""

POLL_SECONDS: Final = 0.5
JOIN_SECONDS: Final = 60.0
TRANSACTION_SECONDS: Final = 30.0
REPORT_SECONDS: Final = 1.0
CHECK_SECONDS: Final = 5.0
"""How long a worker without events goes on before it looks whether the ledger is what it was."""
_REQUEST_TIMEOUT_MS: Final = 15_000
_METADATA_AGE_MS: Final = 5_000

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Records: TypeAlias = Mapping[TopicPartition, list[ConsumerRecord]]


class Worker(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """One member of the consumer group."""

    def __init__(  # noqa: PLR0913 - the last four have defaults
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        topic: str = events.TOPIC,
        dead_letter_topic: str = events.DEAD_LETTER_TOPIC,
        group_id: str = GROUP_ID,
        traces: "Traces | None" = None,
    ) -> None:
        self._traces = traces
        self._settings = settings
        self.metrics = metrics
        self._topic = topic
        self._dead_letter_topic = dead_letter_topic
        self._group_id = group_id
        up = metrics.server_up.labels
        self._ledger = Availability("the ledger", up("ledger"))
        self._kafka = Availability("Kafka", up("kafka"))
        self._dead_letters = Availability(dead_letter_topic, up("dead_letters"), there=True)
        self._publisher = DeadLetters(settings, dead_letter_topic)
        self._consumer: AIOKafkaConsumer | None = None
        # Next offset by partition: up to there the ledger has everything.
        self._positions: dict[int, int] = {}
        self._unplaced: frozenset[TopicPartition] = frozenset()
        self._checked = 0.0
        # When the partitions were taken away, until others, or none, are assigned.
        self._rejoining_since: float | None = None
        self.joined = False
        """Whether the ledger was migrated and the group joined since the start."""

    async def run(self) -> None:
        """Records events until it is cancelled; what it was recording is then rolled back."""
        pool = await ledger.connect(self._settings.database_url, max_connections=2)
        try:
            await self._migrate(pool)
            while True:
                try:
                    await self._consume(pool)
                except* (KafkaError, TimeoutError) as errors:
                    self._kafka.away(errors.exceptions[0])
                await asyncio.sleep(self._kafka.delay())
        finally:
            await self._publisher.close()
            await close("the ledger's connections", pool.close())

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:  # noqa: ARG002
        """Forgets all partitions: an assignment names the ones that stay, too."""
        self._positions = {}
        self._unplaced = frozenset()
        self._rejoining_since = self._rejoining_since or time.monotonic()
        self.metrics.lag.clear()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Lets nothing be read before it is placed. Waits for nothing: no heartbeat is sent now."""
        self._unplaced = frozenset(assigned)
        self._positions = {}
        self._rejoining_since = None
        self._member().pause(*self._unplaced)
        log.info("assigned partitions %s", sorted(tp.partition for tp in self._unplaced))

    async def _migrate(self, pool: Pool) -> None:
        while True:
            try:
                version = await ledger.migrate(pool)
            except LedgerUnavailable as error:
                self._ledger.away(error)
                await asyncio.sleep(self._ledger.delay())
            else:
                self._ledger.back()
                log.info("the ledger has schema version %d", version)
                return

    async def _forget(self, pool: Pool) -> None:
        while True:
            try:
                async with (
                    ledger.translated(),
                    asyncio.timeout(TRANSACTION_SECONDS),
                    pool.acquire() as connection,
                ):
                    await recorder.forget(connection, self._topic)
            except LedgerUnavailable as error:
                self._ledger.away(error)
                await asyncio.sleep(self._ledger.delay())
            else:
                return

    async def _consume(self, pool: Pool) -> None:
        """Is a member of the group until Kafka fails in a way that the client does not mend."""
        created = await topics.create(self._settings, self._topic, self._dead_letter_topic)
        if self._topic in created:
            await self._forget(pool)
        self._consumer = AIOKafkaConsumer(
            **self._settings.kafka_client(),
            group_id=self._group_id,
            enable_auto_commit=False,
            # Where reading begins is for the ledger to say: see `recording.place`.
            auto_offset_reset="none",
            request_timeout_ms=_REQUEST_TIMEOUT_MS,
            # So soon it sees partitions that were added, and a topic that was created anew.
            metadata_max_age_ms=_METADATA_AGE_MS,
        )
        self._rejoining_since = None
        self._consumer.subscribe([self._topic], listener=self)
        try:
            async with asyncio.timeout(JOIN_SECONDS):
                await self._consumer.start()
            self.joined = True
            self._kafka.back()
            # In a task of its own: a TaskGroup that fails leaves its task a cancellation that
            # counts (Python before 3.13), which asyncio.timeout takes for one from outside (before
            # 3.11.4), so that the next timeout would end the worker.
            await asyncio.create_task(self._read_and_report(pool))
        finally:
            await close("the membership", _leave(self._consumer))

    async def _read_and_report(self, pool: Pool) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(pool))
            tasks.create_task(self._report())

    async def _read(self, pool: Pool) -> None:
        while True:
            try:
                if self._unplaced:
                    await self._place(pool)
                    continue
                records = await self._poll(POLL_SECONDS)
                if records:
                    await self._record(pool, records)
                    self._checked = time.monotonic()
                elif time.monotonic() - self._checked > CHECK_SECONDS:
                    self._displace()
                if not self._unplaced:
                    self._ledger.back()
            except LedgerUnavailable as error:
                self._ledger.away(error)
                await self._suspend(self._ledger.delay())
            except DeadLettersUnavailable as error:
                self._dead_letters.away(error)
                await self._suspend(self._dead_letters.delay())
            except LedgerRewound as rewound:
                log.error("the ledger is older than it was, reading again: %s", rewound)  # noqa: TRY400 - its text is all there is to it
                self._displace()
            except (OffsetOutOfRangeError, NoOffsetForPartitionError):
                self._displace()

    async def _poll(self, seconds: float) -> Records:
        """What arrived, at most `BATCH_LIMIT` events; keeps the membership alive."""
        records: Records = await self._member().getmany(
            timeout_ms=int(seconds * 1000), max_records=BATCH_LIMIT
        )
        return records

    async def _suspend(self, seconds: float) -> None:
        """Reads nothing for a while, but goes on polling, which keeps the membership."""
        self._displace()
        self._member().pause(*self._unplaced)
        await self._poll(seconds)

    def _displace(self) -> None:
        self._unplaced = frozenset(self._member().assignment())

    async def _place(self, pool: Pool) -> None:
        consumer, placing = self._member(), self._unplaced
        earliest = await consumer.beginning_offsets(placing)
        ends = await consumer.end_offsets(placing)
        logs = {tp.partition: Log(earliest[tp], ends[tp]) for tp in placing}
        async with (
            ledger.translated(),
            asyncio.timeout(TRANSACTION_SECONDS),
            pool.acquire() as connection,
            connection.transaction(),
        ):
            offsets = await recorder.place(connection, self._topic, logs)
        if self._unplaced is not placing:
            return  # assigned anew meanwhile
        for tp in placing:
            consumer.seek(tp, offsets[tp.partition])
        consumer.resume(*placing)
        self._positions = offsets
        self._unplaced = frozenset()
        self._checked = time.monotonic()

    async def _record(self, pool: Pool, records: Records) -> None:
        """Records a batch, or nothing of it."""
        positions = self._positions  # those of the batch, whatever is assigned meanwhile
        sources: list[ConsumerRecord] = []
        batch: list[Event] = []
        letters: list[DeadLetter] = []
        for partition in records.values():
            for record in partition:
                try:
                    batch.append(events.decode(record.value))
                except ContractViolation as violation:
                    letters.append(DeadLetter(record, str(violation)))
                else:
                    sources.append(record)
        read = len(batch) + len(letters)
        offsets = {tp.partition: partition[-1].offset + 1 for tp, partition in records.items()}
        begun = time.monotonic()
        async with (
            ledger.translated(),
            asyncio.timeout(TRANSACTION_SECONDS),
            pool.acquire() as connection,
            connection.transaction(),
        ):
            outcome = await recorder.record(connection, self._topic, positions, offsets, batch)
            if outcome.broken:
                reasons = {id(event): reason for event, reason in outcome.broken}
                letters += [
                    DeadLetter(record, reasons[id(event)])
                    for record, event in zip(sources, batch, strict=True)
                    if id(event) in reasons
                ]
            # Before the offsets move past them, and only if the rest can be written.
            await self._publisher.publish(letters)
        if letters:
            self._dead_letters.back()
        positions.update(offsets)
        seconds = time.monotonic() - begun
        self._measure(read, batch, letters, outcome, seconds)
        pairs = zip(sources, batch, strict=True)
        known = {id(event): record for record, event in pairs} if outcome.refused else {}
        refused = [(known[id(event)], event, why) for event, why in outcome.refused]
        self._tell(refused, letters)
        if self._traces is not None:
            results = {id(letter.record): "dead_lettered" for letter in letters}
            results |= {id(record): "refused" for record, *_ in refused}
            self._traces.recorded(records, results, self._group_id, seconds)

    def _measure(
        self,
        read: int,
        batch: list[Event],
        letters: list[DeadLetter],
        outcome: Outcome,
        seconds: float,
    ) -> None:
        metrics, count = self.metrics, self.metrics.events.labels
        metrics.batches.inc()
        metrics.batch_size.observe(read)
        metrics.record_seconds.observe(seconds)
        count("recorded").inc(outcome.recorded)
        count("refused").inc(len(outcome.refused))
        count("dead_lettered").inc(len(letters))
        count("duplicate").inc(read - outcome.recorded - len(outcome.refused) - len(letters))
        now = datetime.now(UTC)
        metrics.end_to_end.observe_all((now - event.occurred_at).total_seconds() for event in batch)

    def _tell(
        self,
        refused: Sequence[tuple[ConsumerRecord, Event, str]],
        letters: Sequence[DeadLetter],
    ) -> None:
        for record, event, why in refused:
            log.error(
                "%s: reservation %s of %d units is refused: it %s",
                *(event.sale_id, event.reservation_id, event.quantity, why),
                extra=tracing.fields(events.traceparent(record.headers)),
            )
            log.debug("reservation %s is of user %s", event.reservation_id, event.user_id)
        if letters:
            record = letters[0].record
            log.error(
                "%d records went to %s; the first, %s/%d offset %d: %s",
                *(len(letters), self._dead_letter_topic),
                *(record.topic, record.partition, record.offset, letters[0].reason[:200]),
                extra=tracing.fields(events.traceparent(record.headers)),
            )

    async def _report(self) -> None:
        """Every second: the lag, and to Kafka what the ledger has, for tools that ask Kafka.

        Raises TimeoutError if the client lost its partitions and did not come back into the group
        in the time that joining may take: a new one does.
        """
        consumer = self._member()
        committed: dict[int, int] = {}
        while True:
            if time.monotonic() - (self._rejoining_since or math.inf) > JOIN_SECONDS:
                raise TimeoutError(f"no part in the group for {JOIN_SECONDS:.0f} s")
            positions = dict(self._positions)
            partitions = {TopicPartition(self._topic, number): number for number in positions}
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    for tp, end in (await consumer.end_offsets(list(partitions))).items():
                        if tp.partition in self._positions:
                            lag = max(end - self._positions[tp.partition], 0)
                            self.metrics.lag.labels(tp.partition).set(lag)
                    if positions and positions != committed:
                        with suppress(CommitFailedError, IllegalStateError):  # a rebalance
                            await consumer.commit(
                                {tp: positions[number] for tp, number in partitions.items()}
                            )
                            committed = positions
            except (KafkaError, TimeoutError) as error:
                self._kafka.away(error)
            else:
                if positions:
                    self._kafka.back()
            await asyncio.sleep(REPORT_SECONDS)

    def _member(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise RuntimeError("not a member of the group")
        return self._consumer


async def _leave(consumer: AIOKafkaConsumer) -> None:
    try:
        await consumer.stop()
    finally:
        await consumer._client.close()  # which stop() has not come to if it failed
