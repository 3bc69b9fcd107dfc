"""The partitions that Kafka assigns to this consumer, and how far each is recorded.

A partition is *placed* once the client reads from the offset that the ledger stores for it. It
loses its place if it is assigned again, if a batch could not be recorded, or if the ledger has less
than was recorded. No event is read until all partitions are placed again. So the consumer holds no
events during an outage. After a rebalance, a failover or a recreated topic it continues at the
ledger's offset.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Final, TypeAlias

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError
from prometheus_client import Gauge

from flashsale.ledger import Pool
from flashsale_consumer import offsets

log = logging.getLogger(__name__)

BATCH_LIMIT: Final = 5_000
"""Events in one transaction."""

Records: TypeAlias = Mapping[TopicPartition, list[ConsumerRecord]]


class Partitions(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """One membership of the group, and the partitions that it reads."""

    def __init__(
        self, consumer: AIOKafkaConsumer, topic: str, lag: Gauge, *, metadata: str
    ) -> None:
        """`metadata` is committed with each offset."""
        self._consumer = consumer
        self._topic = topic
        self._lag = lag
        self._metadata = metadata
        self._unplaced: frozenset[TopicPartition] = frozenset()
        self._revoked_at: float | None = None
        self._committed: dict[int, int] = {}
        self.positions: dict[int, int] = {}
        """Next offset by partition. The ledger has everything before it."""

    @property
    def placed(self) -> bool:
        """Whether all assigned partitions are placed."""
        return not self._unplaced

    def unassigned_seconds(self) -> float:
        """Seconds since the partitions were revoked, or 0 after the next assignment."""
        return 0.0 if self._revoked_at is None else time.monotonic() - self._revoked_at

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:  # noqa: ARG002
        """Forget all partitions. The next assignment includes those that stay."""
        self.positions = {}
        self._unplaced = frozenset()
        self._revoked_at = self._revoked_at or time.monotonic()
        self._lag.clear()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Pause the partitions until they are placed.

        This must not wait, because the client sends no heartbeat meanwhile.
        """
        self._unplaced = frozenset(assigned)
        self.positions = {}
        self._revoked_at = None
        self._consumer.pause(*self._unplaced)
        log.info("assigned partitions %s", sorted(tp.partition for tp in self._unplaced))

    def displace(self) -> None:
        """Take all partitions' places away."""
        self._unplaced = frozenset(self._consumer.assignment())

    async def place(self, pool: Pool) -> None:
        """Set the client to the ledger's offsets. Raises `LedgerUnavailable` and `KafkaError`."""
        placing = self._unplaced
        earliest = await self._consumer.beginning_offsets(placing)
        ends = await self._consumer.end_offsets(placing)
        logs = {tp.partition: range(earliest[tp], ends[tp]) for tp in placing}
        placed = await offsets.place(pool, self._topic, logs)
        if self._unplaced is not placing:
            return  # Kafka assigned partitions again in the meantime.
        for tp in placing:
            self._consumer.seek(tp, placed[tp.partition])
        self._consumer.resume(*placing)
        self.positions = placed
        self._unplaced = frozenset()

    async def poll(self, seconds: float) -> Records:
        """Return the events that arrive, at most `BATCH_LIMIT`. This keeps the membership."""
        records: Records = await self._consumer.getmany(
            timeout_ms=int(seconds * 1000), max_records=BATCH_LIMIT
        )
        return records

    async def suspend(self, seconds: float) -> None:
        """Read nothing for a while, but keep the membership."""
        self.displace()
        self._consumer.pause(*self._unplaced)
        await self.poll(seconds)

    async def report(self, *, owned: bool) -> None:
        """Measure the lag and commit the ledger's offsets to Kafka.

        Tools read the offsets, and other engines read the metadata. If the group is not `owned`
        yet, offsets that have not changed are committed too.
        """
        positions = dict(self.positions)
        assigned = {TopicPartition(self._topic, number): number for number in positions}
        for tp, end in (await self._consumer.end_offsets(list(assigned))).items():
            if tp.partition in self.positions:
                lag = max(end - self.positions[tp.partition], 0)
                self._lag.labels(tp.partition).set(lag)
        if positions and not (owned and positions == self._committed):
            with suppress(CommitFailedError, IllegalStateError):  # during a rebalance
                await self._consumer.commit(
                    {tp: (positions[number], self._metadata) for tp, number in assigned.items()}
                )
                self._committed = positions
