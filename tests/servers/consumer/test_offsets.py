"""The stored offsets in a real PostgreSQL."""

from collections.abc import Iterable, Mapping, Sequence

import pytest
from aiokafka import TopicPartition

from flashsale.events import Event
from flashsale.ledger import Pool
from flashsale_consumer import clients, offsets, recorder
from flashsale_consumer.clients import transaction
from flashsale_consumer.metrics import Metrics
from flashsale_consumer.offsets import LedgerRewound, Stored
from flashsale_consumer.partitions import Partitions
from tests.support.consumer import accepted
from tests.support.ledgers import Ledger

TOPIC = "reservations"
FOREVER = range(1_000_000)


async def place(ledger: Ledger, logs: dict[int, range]) -> dict[int, int]:
    """Return the next offsets to record."""
    before = await offsets.read(ledger.pool, TOPIC, logs)
    placed = await offsets.place(ledger.pool, TOPIC, logs, before=before)
    return {partition: stored.recorded for partition, stored in placed.items()}


async def record(
    ledger: Ledger, events: Sequence[Event], *, at: dict[int, int], to: dict[int, int]
) -> None:
    async with transaction(ledger.pool) as connection:
        await recorder.record(connection, TOPIC, at, to, events)


async def test_offsets_advance_with_the_events_and_never_go_back(ledger: Ledger) -> None:
    assert await place(ledger, {0: FOREVER, 1: FOREVER}) == {0: 0, 1: 0}
    at = {0: 0, 1: 0}
    await record(ledger, [accepted(0)], at=at, to={0: 5})
    # By a consumer that lost its partitions.
    await record(ledger, [accepted(1)], at=at, to={0: 3, 1: 2})
    assert await place(ledger, {0: FOREVER, 1: FOREVER}) == {0: 5, 1: 2}


async def test_no_more_is_announced_than_the_ledger_had(ledger: Ledger) -> None:
    """The events could be recorded differently after the ledger went back."""
    await place(ledger, {0: FOREVER})
    await record(ledger, [], at={0: 0}, to={0: 5})
    await offsets.announce(ledger.pool, TOPIC, {0: 5}, {0: 9})
    assert await offsets.read(ledger.pool, TOPIC, [0]) == {0: Stored(5, 5)}


async def test_a_ledger_that_lost_its_last_transactions_is_detected(ledger: Ledger) -> None:
    await place(ledger, {0: FOREVER, 1: FOREVER})
    await record(ledger, [], at={0: 0, 1: 0}, to={0: 10, 1: 10})
    await ledger.pool.execute("UPDATE kafka_offsets SET next_offset = 7 WHERE partition = 1")
    with pytest.raises(LedgerRewound, match=r"reservations/1 .* up to 10.* up to 7"):
        await record(ledger, [accepted()], at={0: 10, 1: 10}, to={0: 11})
    await ledger.pool.execute("DELETE FROM kafka_offsets")
    with pytest.raises(LedgerRewound):
        await record(ledger, [accepted()], at={0: 10}, to={0: 11})
    assert await ledger.rows() == {}


async def test_a_stored_offset_beyond_the_end_means_a_new_topic(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    await place(ledger, {0: FOREVER, 1: FOREVER})
    await record(ledger, [], at={0: 0, 1: 0}, to={0: 10, 1: 10})
    assert await place(ledger, {0: range(9), 1: range(10)}) == {0: 0, 1: 10}
    assert await place(ledger, {0: FOREVER, 1: FOREVER}) == {0: 0, 1: 10}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_events_that_kafka_deleted_before_they_were_recorded_are_reported(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    await place(ledger, {0: range(0)})
    assert await place(ledger, {0: range(40, 50)}) == {0: 40}
    assert "deleted 40 events" in caplog.text


class Member:
    """A member of the group, as the partitions see it. It has its partitions from `assigned`."""

    def __init__(self) -> None:
        self.assigned: set[TopicPartition] = set()
        self.paused: set[TopicPartition] = set()

    def assignment(self) -> set[TopicPartition]:
        return self.assigned

    def pause(self, *partitions: TopicPartition) -> None:
        self.paused |= set(partitions)

    def resume(self, *partitions: TopicPartition) -> None:
        self.paused -= set(partitions)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Nothing is read."""

    async def beginning_offsets(
        self, partitions: Iterable[TopicPartition]
    ) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 9)


async def test_partitions_assigned_while_others_are_placed_are_placed_too(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, place = Member(), offsets.place
    partitions = Partitions(member, TOPIC, Metrics(), metadata="")
    monkeypatch.setattr(clients, "leaderless", lambda *_: frozenset())

    def assign(*numbers: int) -> None:
        member.assigned = {TopicPartition(TOPIC, number) for number in numbers}
        partitions.on_partitions_assigned(member.assigned)

    async def place_and_assign(
        pool: Pool, topic: str, logs: Mapping[int, range], *, before: Mapping[int, Stored]
    ) -> dict[int, Stored]:
        placed = await place(pool, topic, logs, before=before)
        if len(logs) == 1:
            assign(0, 1)
        return placed

    monkeypatch.setattr(offsets, "place", place_and_assign)
    assign(0)
    await partitions.place(ledger.pool)
    assert not partitions.placed
    assert member.paused == member.assigned
    await partitions.place(ledger.pool)
    assert partitions.placed
    assert (member.paused, partitions.positions) == (set(), {0: 0, 1: 0})


async def test_events_that_another_consumer_recorded_in_time_do_not_count_as_deleted(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It records them after this one has read the offsets, and Kafka deletes them then."""
    member, metrics, place = Member(), Metrics(), offsets.place
    partitions = Partitions(member, TOPIC, metrics, metadata="")
    monkeypatch.setattr(clients, "leaderless", lambda *_: frozenset())
    await place(ledger.pool, TOPIC, {0: FOREVER}, before={})

    async def beginning_offsets(given: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        await record(ledger, [accepted()], at={0: 0}, to={0: 9})
        return dict.fromkeys(given, 5)

    monkeypatch.setattr(member, "beginning_offsets", beginning_offsets)
    member.assigned = {TopicPartition(TOPIC, 0)}
    partitions.on_partitions_assigned(member.assigned)
    await partitions.place(ledger.pool)
    assert partitions.positions == {0: 9}
    name = "flashsale_consumer_deleted_events_total"
    assert f"{name} 0.0" in metrics.text().decode()
