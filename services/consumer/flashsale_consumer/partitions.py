"""The partitions that Kafka assigns to this consumer, and how far each is recorded and announced.

A partition is *placed* once the client reads from the offset that the ledger stores for it. It
loses its place if it is assigned again, if a batch could not be recorded, or if the ledger has less
than was recorded. No event is read until all partitions are placed again. So the consumer holds no
events during an outage. After a rebalance, a failover or a recreated topic it continues at the
ledger's offset. A partition without a leader is paused until it has one, and the others are read.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    LeaderNotAvailableError,
    UnknownTopicOrPartitionError,
)

from flashsale.ledger import Pool
from flashsale_consumer import clients, offsets
from flashsale_consumer.clients import Records
from flashsale_consumer.metrics import Metrics
from flashsale_consumer.offsets import Stored
from flashsale_consumer.recorder import Written

log = logging.getLogger(__name__)

BATCH_LIMIT: Final = 5_000
"""The most events in one transaction."""

RECENT_BATCHES: Final = 4
"""Recorded batches in memory, from which the announcer takes its next one."""


class RecordedBatch(NamedTuple):
    """A batch that the ledger has: its reservations, and where it begins and ends."""

    begin: Mapping[int, int]
    end: Mapping[int, int]
    written: Sequence[Written]
    """The rows that are known from their events."""
    names: Sequence[tuple[str, str]]
    """The sale id and the reservation id of each other reservation."""


class Partitions(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """One membership of the group, and the partitions that it reads."""

    def __init__(
        self, consumer: AIOKafkaConsumer, topic: str, metrics: Metrics, *, metadata: str
    ) -> None:
        """`metadata` is committed with each offset."""
        self._consumer = consumer
        self._topic = topic
        self._metrics = metrics
        self._metadata = metadata
        self._unplaced: frozenset[TopicPartition] = frozenset()
        self._leaderless: frozenset[TopicPartition] = frozenset()
        self._revoked_at: float | None = None
        self._answered = 0.0, time.monotonic()
        """The time of the newest metadata, and when this was noticed."""
        self._committed: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self.positions: dict[int, int] = {}
        """Next offset by partition. The ledger has everything before it."""
        self.announced: dict[int, int] = {}
        """Next offset by partition. Everything before it is announced."""
        self._stored: dict[int, int] = {}
        self._recent: deque[RecordedBatch] = deque(maxlen=RECENT_BATCHES)
        self._limit = BATCH_LIMIT
        self._moved = asyncio.Event()
        self._mark: dict[int, int] = {}
        self._marked_at = time.monotonic()

    @property
    def placed(self) -> bool:
        """Whether all assigned partitions that have a leader are placed."""
        return not self._unplaced

    def unassigned_seconds(self) -> float:
        """Seconds since the partitions were revoked, or 0 after the next assignment."""
        return 0.0 if self._revoked_at is None else time.monotonic() - self._revoked_at

    def unanswered_seconds(self) -> float:
        """Seconds without metadata. The client knows no broker if all have other addresses now."""
        newest, now = clients.metadata_time(self._consumer), time.monotonic()
        if newest != self._answered[0]:
            self._answered = newest, now
        return now - self._answered[1]

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:  # noqa: ARG002
        """Forgets all partitions. The next assignment includes those that stay."""
        self._at({})
        self._unplaced = frozenset()
        self._revoked_at = self._revoked_at or time.monotonic()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Pauses the partitions until they are placed.

        This must not wait, because the client sends no heartbeat meanwhile.
        """
        partitions = frozenset(assigned)
        self._at({})
        self._revoked_at = None
        self._consumer.pause(*partitions)
        log.info("assigned partitions %s", _numbers(partitions))
        self.displace()

    def displace(self) -> None:
        """Takes all partitions' places away. Pauses those without a leader."""
        assigned = frozenset(self._consumer.assignment())
        leaderless = clients.leaderless(self._consumer, assigned)
        if lost := leaderless - self._leaderless:
            text = "%s: partitions %s have no leader, reading the others"
            log.warning(text, self._topic, _numbers(lost))
        if found := assigned & (self._leaderless - leaderless):
            log.info("%s: partitions %s have a leader again", self._topic, _numbers(found))
        self._leaderless = leaderless
        self._consumer.pause(*leaderless)
        self._unplaced = assigned - leaderless
        if not self._unplaced:
            self._at({})

    async def place(self, pool: Pool) -> None:
        """Sets the client to the ledger's offsets. Raises `LedgerUnavailable` and `KafkaError`.

        The group gives no partitions to a member that is not needed, and to every member if the
        topic was deleted. The latter raises `UnknownTopicOrPartitionError`.
        """
        if not self._consumer.assignment():
            # Read all topics, because to ask for one by name can create it.
            if self._topic not in await self._consumer.topics():
                raise UnknownTopicOrPartitionError(f"the topic {self._topic} does not exist")
            return
        placing = self._unplaced
        numbers = [tp.partition for tp in placing]
        before = await offsets.read(pool, self._topic, numbers)
        earliest = await self._consumer.beginning_offsets(placing)
        ends = await self._consumer.end_offsets(placing)
        logs = {tp.partition: range(earliest[tp], ends[tp]) for tp in placing}
        placed = await offsets.place(pool, self._topic, logs, before=before)
        for number, stored in before.items():
            if stored.recorded < placed[number].recorded == logs[number].start:
                self._metrics.deleted.inc(logs[number].start - stored.recorded)
        if self._unplaced is not placing:
            return  # Kafka assigned partitions again in the meantime.
        for tp in placing:
            self._consumer.seek(tp, placed[tp.partition].recorded)
        self._consumer.resume(*placing)
        self._at(placed)
        self._ends = {number: kept.stop for number, kept in logs.items()}
        self._unplaced = frozenset()

    def reached_ends(self) -> bool:
        """Whether the ledger has all events that Kafka had when the partitions were placed."""
        ends = self._ends.items()
        return all(self.positions.get(number, end) >= end for number, end in ends)

    def _at(self, placed: Mapping[int, Stored]) -> None:
        """Replaces the offsets. An unfinished batch keeps the former objects."""
        if placed.keys() != self.positions.keys():
            self._metrics.lag.clear()
            self._metrics.unannounced.clear()
        self.positions = {number: stored.recorded for number, stored in placed.items()}
        self.announced = {number: stored.announced for number, stored in placed.items()}
        self._stored = self.announced.copy()
        self._recent.clear()
        self._mark = {
            number: min(self._mark.get(number, offset), offset)
            for number, offset in self.positions.items()
        }
        self._moved.set()

    def record(
        self,
        positions: dict[int, int],
        read: Mapping[int, int],
        written: Sequence[Written],
        names: Sequence[tuple[str, str]],
    ) -> None:
        """Notes that the ledger has everything before `read`. `positions` are the batch's."""
        if positions is self.positions:
            begin = {number: positions[number] for number in read}
            self._recent.append(RecordedBatch(begin, read, written, names))
        positions.update(read)
        self._moved.set()

    def next_batch(self) -> RecordedBatch | None:
        """Returns the batch that continues the announced offsets, if it is still in memory."""
        announced = self.announced
        while self._recent:
            batch = self._recent[0]
            if any(begin > announced[number] for number, begin in batch.begin.items()):
                return None
            self._recent.popleft()
            if any(end > announced[number] for number, end in batch.end.items()):
                return batch
        return None

    async def moved(self, seconds: float) -> None:
        """Waits until an offset changes, for some seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._moved.wait()
        self._moved.clear()

    async def recorded(self, announced: Mapping[int, int], read: Mapping[int, int]) -> bool:
        """Waits until the ledger has everything before `read`.

        Returns False if the partitions were placed again meanwhile. `announced` is of the former
        placement then.
        """
        while self.announced is announced:
            if all(self.positions.get(number, -1) >= end for number, end in read.items()):
                return True
            self._moved.clear()
            await self._moved.wait()
        return False

    def unstored(self) -> dict[int, int]:
        """Returns the announced offsets that the ledger does not have yet."""
        return {
            number: offset
            for number, offset in self.announced.items()
            if offset > self._stored[number]
        }

    @contextmanager
    def storing(self) -> Iterator[dict[int, int]]:
        """Gives the `unstored` offsets to a transaction. They count as stored if it succeeds."""
        stored, announced = self._stored, self.unstored()
        yield announced
        stored.update(announced)

    async def poll(self, seconds: float) -> Records:
        """Returns the events that arrive, at most one batch. This keeps the membership."""
        records = await clients.poll(
            self._consumer, self.positions, seconds=seconds, limit=self._limit
        )
        # Kafka can have revoked partitions in the meantime, so the positions can be others.
        return clients.with_skipped(self._consumer, records, self.positions)

    def shrink(self) -> None:
        """Halves the next batch. A batch that takes too long would otherwise fail again."""
        self._limit = max(1, self._limit // 2)

    def grow(self) -> None:
        """Doubles the next batch, up to `BATCH_LIMIT` events."""
        self._limit = min(2 * self._limit, BATCH_LIMIT)

    async def suspend(self, seconds: float) -> None:
        """Reads nothing for a while, but keeps the membership."""
        self.displace()
        self._consumer.pause(*self._unplaced)
        await self.poll(seconds)

    async def report(self, *, owned: bool) -> None:
        """Measures the lag and commits the ledger's offsets to Kafka.

        Tools read the offsets, and other engines read the metadata. If the group is not `owned`
        yet, offsets that have not changed are committed too. Raises `KafkaError`, also if a
        partition has no leader.
        """
        if clients.leaderless(self._consumer, self._consumer.assignment()) != self._leaderless:
            self.displace()
        self._measure_announcing()
        positions = dict(self.positions)
        assigned = {TopicPartition(self._topic, number): number for number in positions}
        for tp, end in (await self._consumer.end_offsets(list(assigned))).items():
            if tp.partition in self.positions:
                lag = max(end - self.positions[tp.partition], 0)
                self._metrics.lag.labels(tp.partition).set(lag)
        if positions and not (owned and positions == self._committed):
            with suppress(CommitFailedError, IllegalStateError):  # during a rebalance
                await self._consumer.commit(
                    {tp: (positions[number], self._metadata) for tp, number in assigned.items()}
                )
                self._committed = positions
        if self._leaderless:
            numbers = _numbers(self._leaderless)
            raise LeaderNotAvailableError(f"partitions {numbers} of {self._topic} have no leader")

    def _measure_announcing(self) -> None:
        """Measures how far the announcing is behind the recording.

        The mark is a state of the recording. Its age is the age of the oldest event that is not
        announced, to within the time between two reports.
        """
        for number, offset in self.announced.items():
            self._metrics.unannounced.labels(number).set(self.positions[number] - offset)
        now = time.monotonic()
        if all(
            self.announced.get(number, offset) >= offset for number, offset in self._mark.items()
        ):
            self._mark, self._marked_at = self.positions.copy(), now
        behind = self.announced != self.positions
        self._metrics.unannounced_seconds.set(now - self._marked_at if behind else 0)


def _numbers(partitions: Iterable[TopicPartition]) -> list[int]:
    return sorted(tp.partition for tp in partitions)
