"""The worker: reads reservation events from Kafka and records them in the ledger."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeVar

from aiokafka import ConsumerRecord
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    IncompatibleBrokerVersion,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    UnknownTopicOrPartitionError,
    UnsupportedCodecError,
)

from flashsale import cancellation, events, kafka_clients, ledger, requirements, schema, tracing
from flashsale.errors import (
    ContractViolation,
    LedgerUnavailable,
    OtherEngine,
    SettingsError,
    UnmetRequirement,
)
from flashsale.events import Event
from flashsale.ledger import Pool
from flashsale.requirements import Checks
from flashsale_consumer import clients, offsets, ownership, recorder, topics
from flashsale_consumer.announcer import Announcer
from flashsale_consumer.availability import Availability
from flashsale_consumer.clients import Records, Skipped, Undecodable, transaction
from flashsale_consumer.dead_letters import DeadLetter, DeadLetters, DeadLettersUnavailable
from flashsale_consumer.metrics import Metrics
from flashsale_consumer.offsets import LedgerRewound
from flashsale_consumer.partitions import Partitions
from flashsale_consumer.recorder import BatchOutcome
from flashsale_consumer.settings import Settings

if TYPE_CHECKING:
    from flashsale_consumer.spans import Spans

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS: Final = 0.5
JOIN_SECONDS: Final = 60.0
ANSWER_SECONDS: Final = 60.0
"""A client that gets no metadata for this time is replaced. It asks every five seconds."""
REPORT_SECONDS: Final = 1.0
REPORT_TIMEOUT_SECONDS: Final = 5.0
CHECK_SECONDS: Final = 5.0
"""How often an idle worker checks that the ledger has not been rolled back.

Without partitions it checks that the ledger and the topic are there.
"""
QUICK_SECONDS: Final = clients.TRANSACTION_SECONDS / 4
"""After a batch that took less time, the next one can be twice as large."""
REFUSED_SECONDS: Final = 10.0
"""How often a worker checks again after it met another engine or an unmet requirement."""
_KAFKA_MISTAKE: Final = (
    "Kafka has records or a version that this consumer cannot read ({!r}), but needs Kafka 2.4 or "
    "newer and the package cramjam for compressed topics: install the consumer's requirements.txt"
)
_UNDECODABLE: Final = "a header in the record's batch has a name that is not UTF-8"
_FOREIGN: Final = "the event is of engine {}, but this ledger belongs to engine {}"


class Worker:
    """A member of the consumer group."""

    _partitions: Partitions
    """Those of the current membership, or of the last one."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        spans: "Spans | None" = None,
    ) -> None:
        self._spans = spans
        self._settings = settings
        self.metrics = metrics
        self._topic = events.topic(settings.engine)
        self._dead_letter_topic = events.dead_letter_topic(settings.engine)
        self._group_id = events.consumer_group(settings.engine)
        up = metrics.server_up.labels
        self._ledger = Availability("the ledger", up("ledger"))
        self._kafka = Availability("Kafka", up("kafka"))
        self._dead_letters = Availability(self._dead_letter_topic, up("dead_letters"), there=True)
        self._publisher = DeadLetters(settings, self._dead_letter_topic)
        self._announcer = Announcer(settings, metrics, settings.kafka_partitions)
        self._engine_id = ""
        self._unsure: set[str] = set()
        self._checked = 0.0
        self._checks = Checks(log)
        self.joined = False
        """Whether the worker migrated the ledger and joined the group since its start."""
        self.conflict = ""
        """One line that names two engines that meet, or an unmet requirement, or nothing."""

    @property
    def problem(self) -> str:
        """Why the worker has not joined the group: a conflict, or a server that is away."""
        return (
            self.conflict or self._ledger.problem or self._kafka.problem or "not in the group yet"
        )

    async def run(self) -> None:
        """Records events until cancelled. A cancellation rolls back the unfinished batch."""
        kafka_clients.adapt_aiokafka()
        # A commit that a failover of PostgreSQL loses is repeated from Kafka.
        pool = await ledger.connect(
            self._settings.database_url, max_connections=3, synchronous=False
        )
        migrated = False
        try:
            while True:
                try:
                    if not migrated:
                        version = await self._when_served(lambda: self._migrate(pool))
                        log.info("the ledger has schema version %d", version)
                        migrated = True
                    await self._consume(pool)
                except* (OtherEngine, UnmetRequirement) as errors:
                    self._refuse(str(errors.exceptions[0]))
                except* (UnsupportedCodecError, IncompatibleBrokerVersion) as errors:
                    self._refuse(_KAFKA_MISTAKE.format(errors.exceptions[0]))
                except* (KafkaError, SettingsError, TimeoutError) as errors:
                    # A wrong certificate after a renewal counts as an outage.
                    self._kafka.away(errors.exceptions[0])
                await asyncio.sleep(REFUSED_SECONDS if self.conflict else self._kafka.delay())
        finally:
            await self._publisher.close()
            await kafka_clients.close("the ledger's connections", pool.close())

    async def _migrate(self, pool: Pool) -> int:
        self._checks.require(requirements.LEDGER, await schema.facts(pool))
        return await schema.migrate(pool, self._settings.engine)

    def _refuse(self, conflict: str) -> None:
        if conflict != self.conflict:
            log.error("%s", conflict)
        self.conflict = conflict

    async def _when_served(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeats a call until the ledger serves it."""
        while True:
            try:
                answer = await call()
            except LedgerUnavailable as error:
                self._ledger.away(error)
                await asyncio.sleep(self._ledger.delay())
            else:
                self._ledger.back()
                return answer

    async def _consume(self, pool: Pool) -> None:
        """Reads as a member of the group, until an error from which the client cannot recover.

        Raises `OtherEngine` if the ledger or the group belongs to another engine, and `KafkaError`,
        also if the topic does not exist and the consumer may not create it.
        """
        name = self._settings.engine
        self._engine_id = await self._when_served(lambda: ledger.engine_id(pool, name))
        partitions = self._settings.kafka_partitions
        created = await topics.create(self._settings, partitions, unsure=self._unsure)
        if self._topic in created:
            # Before any other call can fail, because after it the topic is not a new one any more.
            await self._when_served(lambda: offsets.forget(pool, self._topic))
        async with clients.admin(self._settings) as admin:
            facts = await kafka_clients.topic_facts(admin, self._topic)
            if facts is None:
                raise UnknownTopicOrPartitionError(f"the topic {self._topic} does not exist yet")
            self._checks.require(requirements.topic(partitions), facts)
            await ownership.check(admin, name, self._engine_id)
            await self._join(pool, admin)

    async def _join(self, pool: Pool, admin: AIOKafkaAdminClient) -> None:
        consumer = clients.group_member(self._settings, self._group_id)
        self._partitions = Partitions(
            consumer,
            self._topic,
            self.metrics,
            metadata=events.owner_metadata(self._engine_id),
        )
        consumer.subscribe([self._topic], listener=self._partitions)
        try:
            async with asyncio.timeout(JOIN_SECONDS):
                await consumer.start()
            self.joined = True
            self._kafka.back()
            await cancellation.in_own_task(self._read_and_report(pool, admin))
        finally:
            await kafka_clients.close("the group membership", clients.leave(consumer))

    async def _read_and_report(self, pool: Pool, admin: AIOKafkaAdminClient) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(pool))
            tasks.create_task(self._report(admin))
            tasks.create_task(self._announcer.run(pool, self._partitions, self._engine_id))

    async def _read(self, pool: Pool) -> None:
        partitions = self._partitions
        while True:
            try:
                if not partitions.placed:
                    await self._place(pool)
                    continue
                records = await partitions.poll(POLL_SECONDS)
                if records or partitions.reached_ends():
                    self.conflict = ""  # not before the records can be read
                if records:
                    await self._record(pool, records)
                    self._checked = time.monotonic()
                elif partitions.unstored():
                    with partitions.storing() as announced:
                        await offsets.announce(pool, self._topic, partitions.positions, announced)
                    self._checked = time.monotonic()
                elif time.monotonic() - self._checked > CHECK_SECONDS:
                    partitions.displace()
                    if partitions.placed:  # because there is none to place
                        await self._place(pool)
                        self._ledger.back()
                if partitions.placed and partitions.positions:
                    self._ledger.back()
            except LedgerUnavailable as error:
                self._ledger.away(error)
                partitions.shrink()
                await partitions.suspend(self._ledger.delay())
            except DeadLettersUnavailable as error:
                self._dead_letters.away(error)
                partitions.shrink()
                await partitions.suspend(self._dead_letters.delay())
            except LedgerRewound as rewound:
                log.error("the ledger lost events, reading them again: %s", rewound)  # noqa: TRY400 - a traceback adds nothing
                partitions.displace()
            except (OffsetOutOfRangeError, NoOffsetForPartitionError):
                partitions.displace()

    async def _place(self, pool: Pool) -> None:
        """Continues at the offsets of the ledger, which may be a restored backup now.

        Raises `OtherEngine` if it is the ledger of another engine, and `KafkaError`.
        """
        name = self._settings.engine
        await schema.migrate(pool, name, known=True)
        engine_id = await ledger.engine_id(pool, name)
        if engine_id != self._engine_id:
            raise OtherEngine(
                f"the ledger belongs to engine {engine_id}, but this consumer has recorded for "
                f"engine {self._engine_id}"
            )
        await self._partitions.place(pool)
        self._checked = time.monotonic()

    async def _record(self, pool: Pool, records: Records) -> None:
        """Records a batch completely or not at all."""
        positions = self._partitions.positions  # the batch's, even after another assignment
        batch, sources, letters = self._decode(records)
        size = len(batch) + len(letters)
        read = {tp.partition: partition[-1].offset + 1 for tp, partition in records.items()}
        # Before the transaction, which locks rows that other processes need, because Kafka can be
        # slow. A batch that is read again publishes them again.
        await self._publisher.publish(letters)
        begun = time.monotonic()
        with self._partitions.storing() as announced:
            async with transaction(pool) as connection:
                outcome = await recorder.record(
                    connection, self._topic, positions, read, batch, announced=announced
                )
                broken = [DeadLetter(sources[id(event)], why) for event, why in outcome.broken]
                # PostgreSQL has just rejected these events. Publish them before the offsets move
                # past them.
                await self._publisher.publish(broken)
        letters += broken
        if letters:
            self._dead_letters.back()
        self._partitions.record(positions, read, outcome.written, _unknown(batch, outcome))
        seconds = time.monotonic() - begun
        if seconds < QUICK_SECONDS:
            self._partitions.grow()
        self._measure(size, len(letters), batch, outcome, seconds)
        refused = [(sources[id(event)], event, why) for event, why in outcome.refused]
        voided = [(sources[id(event)], event) for event in outcome.voided]
        self._log_failures(refused, voided, letters)
        if self._spans is not None:
            results = {id(letter.record): "dead_lettered" for letter in letters}
            results |= {id(record): "refused" for record, *_ in refused}
            results |= {id(record): "voided" for record, _ in voided}
            self._spans.recorded(records, results, self._group_id, seconds)

    def _decode(
        self, records: Records
    ) -> tuple[list[Event], dict[int, ConsumerRecord], list[DeadLetter]]:
        """Returns the events, their records by the id() of the event, and the dead letters."""
        batch: list[Event] = []
        sources: dict[int, ConsumerRecord] = {}
        letters: list[DeadLetter] = []
        for record in chain.from_iterable(records.values()):
            if isinstance(record, Skipped):
                continue
            if isinstance(record, Undecodable):
                letters.append(DeadLetter(record, _UNDECODABLE))
                continue
            try:
                event = events.decode(record.value)
            except ContractViolation as violation:
                letters.append(DeadLetter(record, str(violation)))
                continue
            if event.engine not in (None, self._engine_id):
                letters.append(DeadLetter(record, _FOREIGN.format(event.engine, self._engine_id)))
                continue
            batch.append(event)
            sources[id(event)] = record
        return batch, sources, letters

    def _measure(
        self, size: int, dead: int, batch: list[Event], outcome: BatchOutcome, seconds: float
    ) -> None:
        metrics, count = self.metrics, self.metrics.events.labels
        metrics.batches.inc()
        metrics.batch_size.observe(size)
        metrics.record_seconds.observe(seconds)
        count("recorded").inc(outcome.recorded)
        count("refused").inc(len(outcome.refused))
        count("dead_lettered").inc(dead)
        voided = len(outcome.voided)
        metrics.voided.inc(voided)
        count("duplicate").inc(size - outcome.recorded - len(outcome.refused) - dead - voided)
        now = datetime.now(UTC)
        metrics.end_to_end.observe_all((now - at).total_seconds() for at in _changed_at(batch))

    def _log_failures(
        self,
        refused: Sequence[tuple[ConsumerRecord, Event, str]],
        voided: Sequence[tuple[ConsumerRecord, Event]],
        letters: Sequence[DeadLetter],
    ) -> None:
        for record, event, why in refused:
            log.error(
                "%s: reservation %s of %d units is refused: it %s",
                event.sale_id,
                event.reservation_id,
                event.quantity,
                why,
                extra=tracing.fields(events.traceparent(record.headers)),
            )
            log.debug("reservation %s is of user %s", event.reservation_id, event.user_id)
        if voided:
            record, event = voided[0]
            log.warning(
                "%d changes are void, because their sale was rebuilt without them; the first, %s: "
                "reservation %s is not %s",
                len(voided),
                event.sale_id,
                event.reservation_id,
                event.state,
                extra=tracing.fields(events.traceparent(record.headers)),
            )
        if letters:
            record = letters[0].record
            log.error(
                "%d records went to %s; the first, %s/%d offset %d: %s",
                len(letters),
                self._dead_letter_topic,
                record.topic,
                record.partition,
                record.offset,
                letters[0].reason[:200],
                extra=tracing.fields(events.traceparent(record.headers)),
            )

    async def _report(self, admin: AIOKafkaAdminClient) -> None:
        """Reports to Prometheus and Kafka every second.

        Raises TimeoutError if the client lost its partitions and has not rejoined the group within
        `JOIN_SECONDS`, or if no broker has answered it for `ANSWER_SECONDS`. The worker then
        replaces the client. Raises `OtherEngine` if the group belongs to another engine. That is
        checked before each commit, so that no commit takes a group from its engine.
        """
        partitions = self._partitions
        while True:
            if partitions.unassigned_seconds() > JOIN_SECONDS:
                raise TimeoutError(f"not in the group for {JOIN_SECONDS:.0f} s")
            if partitions.unanswered_seconds() > ANSWER_SECONDS:
                raise TimeoutError(f"no broker has answered for {ANSWER_SECONDS:.0f} s")
            try:
                async with asyncio.timeout(REPORT_TIMEOUT_SECONDS):
                    owned = await ownership.check(admin, self._settings.engine, self._engine_id)
                    await partitions.report(owned=owned)
            except (KafkaError, TimeoutError) as error:
                self._kafka.away(error)
            else:
                # A consumer to which the group gives no partition is connected, too.
                if not partitions.unassigned_seconds():
                    self._kafka.back()
            await asyncio.sleep(REPORT_SECONDS)


def _unknown(batch: Sequence[Event], outcome: BatchOutcome) -> list[tuple[str, str]]:
    """Returns the names of the reservations whose rows have to be read to know them."""
    if len(batch) == sum(len(written.events) for written in outcome.written):
        return []
    names = dict.fromkeys((event.sale_id, event.reservation_id) for event in batch)
    for written in outcome.written:
        for event in written.events:
            del names[event.sale_id, event.reservation_id]
    return list(names)


def _changed_at(batch: Iterable[Event]) -> Iterator[datetime]:
    """Returns the times at which Redis made the changes. The events of some changes have none."""
    for event in batch:
        if event.state == "held":
            yield event.accepted_at
        # A reservation that was never a hold can get its order long after it was confirmed.
        elif event.state == "confirmed" and (event.expires_at or not event.order_ref):
            yield event.confirmed_at or event.accepted_at
