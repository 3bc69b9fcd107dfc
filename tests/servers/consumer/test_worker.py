"""The worker on real servers. It records each event once, also with several consumers."""

import asyncio
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
)

from flashsale import kafka_clients
from flashsale.requirements import TopicFacts
from flashsale_consumer import recorder
from flashsale_consumer.clients import Records
from flashsale_consumer.partitions import BATCH_LIMIT, Partitions
from flashsale_consumer.recorder import BatchOutcome
from tests.support.consumer import (
    Log,
    Process,
    accepted,
    changed,
    held,
    running,
    until_recorded,
)
from tests.support.eventually import until
from tests.support.ledgers import Ledger
from tests.support.recorded import received
from tests.support.topics import administering


async def test_a_batch_that_takes_too_long_is_divided(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction of a whole batch would end at its deadline each time."""
    poll, limits = Partitions.poll, [BATCH_LIMIT]

    async def look_and_poll(self: Partitions, seconds: float) -> Records:
        limits.append(self._limit)
        return await poll(self, seconds)

    async def slow(*arguments: Any, **options: Any) -> BatchOutcome:  # noqa: ANN401
        if len(arguments[-1]) > 1_000:
            raise TimeoutError
        return await recorder.record(*arguments, **options)

    monkeypatch.setattr(Partitions, "poll", look_and_poll)
    monkeypatch.setattr("flashsale_consumer.worker.recorder", SimpleNamespace(record=slow))
    sold = [accepted(number) for number in range(2_000)]
    await log.write(*sold, partition=0)
    async with running(ledger.url, log):
        await ledger.until_has(*sold)
        assert min(limits) <= 1_000

        async def large() -> bool:
            await log.write(accepted(), partition=0)
            return limits[-1] == BATCH_LIMIT

        await until(large, "small batches, which are quick, become large again")


async def test_reservations_over_capacity_are_refused_counted_and_logged(
    ledger: Ledger, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    oversold = [accepted(number, allocated=2, capacity=2) for number in range(3)]
    await log.write(*oversold, partition=0)
    async with running(ledger.url, log) as worker:
        await ledger.until_has(*oversold)
        await until(lambda: worker.events("refused") >= 1)
    assert (await ledger.sale()).accepted == 2
    (line,) = (record for record in caplog.records if "refused" in record.message)
    assert line.levelname == "ERROR"
    assert oversold[2].sale_id in line.message
    assert oversold[2].reservation_id in line.message


async def test_void_changes_are_counted_and_logged(
    ledger: Ledger, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    known, last = held(revision=4), accepted(revision=5)
    await log.write(known, partition=0)
    async with running(ledger.url, log) as worker:
        await ledger.until_has(known)
        await ledger.pool.execute("UPDATE sales SET rebuilt_revision = 5, revision = 5")
        await log.write(changed(known, "expired"), last, partition=0)
        await ledger.until_has(last)
        await until(lambda: worker.value("flashsale_consumer_voided_total") == 1)
        assert (worker.events("refused"), worker.events("duplicate")) == (0, 0)
    (line,) = (record for record in caplog.records if "void" in record.message)
    assert line.levelname == "WARNING"
    assert known.sale_id in line.message
    assert known.reservation_id in line.message


async def test_the_time_to_the_ledger_is_measured_from_the_change(ledger: Ledger, log: Log) -> None:
    """A cancellation, an expiry and a late order reference have no time of their own."""
    now = datetime.now(UTC)
    past = now - timedelta(hours=2)
    first, second = held(accepted_at=past), held(accepted_at=past)
    ordered = accepted(accepted_at=past, confirmed_at=past, order_ref="order-1", version=2)
    confirmed = changed(first, "confirmed", confirmed_at=now)
    last = accepted(accepted_at=past, confirmed_at=past)
    own = [first, second, confirmed, changed(second, "expired"), ordered, last]
    await log.write(*own, partition=0)
    name = "flashsale_consumer_end_to_end_seconds"
    async with running(ledger.url, log) as worker:
        await ledger.until_has(*own)
        await until(lambda: worker.value(f"{name}_count") == 4)
        assert worker.value(f'{name}_bucket{{le="3600.0"}}') == 1


async def test_reading_from_the_beginning_again_changes_nothing(ledger: Ledger, log: Log) -> None:
    first = [accepted(number) for number in range(100)]
    await log.write(*first)
    async with running(ledger.url, log):
        await ledger.until_has(*first)
    before = await ledger.rows()
    await ledger.pool.execute("UPDATE kafka_offsets SET next_offset = 0")
    async with running(ledger.url, log) as worker:
        await until(lambda: worker.events("duplicate") >= 100)
        assert worker.events("recorded") == 0
    assert await ledger.rows() == before
    assert (await ledger.sale()).accepted == 100


async def test_a_restart_continues_at_the_ledgers_offset_not_at_kafkas(
    ledger: Ledger, log: Log
) -> None:
    first = [accepted(number) for number in range(50)]
    await log.write(*first)
    async with running(ledger.url, log):
        await ledger.until_has(*first)
        await until(
            lambda: log.is_committed(50),
            "the offsets are committed to Kafka",
            ignoring=(KafkaError,),
        )
    # An older copy of the ledger lacks events that are committed in Kafka. They are read again.
    await ledger.pool.execute("DELETE FROM reservations")
    await ledger.pool.execute("DELETE FROM sales")
    await ledger.pool.execute("DELETE FROM kafka_offsets")
    async with running(ledger.url, log):
        await ledger.until_has(*first)


async def test_a_ledger_replaced_by_an_older_copy_is_refilled(ledger: Ledger, log: Log) -> None:
    first, second = ([accepted(number) for number in range(50)] for _ in range(2))
    async with running(ledger.url, log):
        await log.write(*first)
        await ledger.until_has(*first)
        async with ledger.pool.acquire() as connection, connection.transaction():
            await connection.execute("DELETE FROM reservations")
            await connection.execute("DELETE FROM sales")
            await connection.execute("UPDATE kafka_offsets SET next_offset = 0")
        # The worker notices it without a new event.
        await ledger.until_has(*first)
        await log.write(*second)
        await ledger.until_has(*first, *second)


async def test_a_recreated_topic_is_read_from_its_beginning(ledger: Ledger, log: Log) -> None:
    first, second = ([accepted(number) for number in range(n)] for n in (60, 5))
    await log.write(*first, partition=0)
    async with running(ledger.url, log):
        await ledger.until_has(*first)
    await log.delete(log.topic)
    await log.create()
    await log.write(*second, partition=0)
    async with running(ledger.url, log):
        await ledger.until_has(*first, *second)
    assert await ledger.pool.fetchval("SELECT max(next_offset) FROM kafka_offsets") == 5


async def test_a_topic_recreated_under_a_running_consumer_is_read(ledger: Ledger, log: Log) -> None:
    first, second = ([accepted(number) for number in range(n)] for n in (60, 5))
    async with running(ledger.url, log):
        await log.write(*first, partition=0)
        await ledger.until_has(*first)
        await log.delete(log.topic)
        await log.create()
        await log.write(*second, partition=0)
        await ledger.until_has(*first, *second)


@pytest.mark.parametrize("reply_is_lost", [False, True])
async def test_a_topic_recreated_by_the_consumer_is_read_even_if_it_is_already_longer(
    ledger: Ledger,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    reply_is_lost: bool,
) -> None:
    """Kafka came back without its data, and the API published its outbox at once."""
    first, second = ([accepted(number) for number in range(*span)] for span in ((3,), (3, 8)))
    await log.write(*first, partition=0)
    async with running(ledger.url, log):
        await ledger.until_has(*first)
    await log.delete(log.topic)
    create, topic_facts = AIOKafkaAdminClient.create_topics, kafka_clients.topic_facts
    failures = [KafkaConnectionError("no reply")]

    async def create_and_publish(admin: AIOKafkaAdminClient, wanted: list[NewTopic]) -> object:
        reply = await create(admin, wanted)
        if log.topic in [topic.name for topic in wanted]:
            monkeypatch.setattr(AIOKafkaAdminClient, "create_topics", create)
            await log.write(*second, partition=0)  # before the consumer reads the end offset
            if reply_is_lost:
                raise RequestTimedOutError
        return reply

    async def fail_once(admin: AIOKafkaAdminClient, topic: str) -> TopicFacts | None:
        if failures:
            raise failures.pop()
        return await topic_facts(admin, topic)

    monkeypatch.setattr(AIOKafkaAdminClient, "create_topics", create_and_publish)
    monkeypatch.setattr(kafka_clients, "topic_facts", fail_once)
    async with running(ledger.url, log):
        await ledger.until_has(*first, *second)
    assert await ledger.pool.fetchval("SELECT max(next_offset) FROM kafka_offsets") == 5


async def test_a_topic_deleted_under_running_consumers_is_created_again(
    ledger: Ledger, log: Log
) -> None:
    """Its former offsets are forgotten, although the new topic is soon longer."""
    first, second = ([accepted(number) for number in range(n)] for n in (3, 8))
    async with running(ledger.url, log) as one, running(ledger.url, log) as other:
        await log.write(*first, partition=0)
        await ledger.until_has(*first)
        await until(lambda: one.partitions() == other.partitions() == 6)
        await log.delete(log.topic)
        await until_exists(log)
        await log.write(*second, partition=0)
        await ledger.until_has(*first, *second)
        await until(lambda: one.partitions() == other.partitions() == 6)
    assert await ledger.pool.fetchval("SELECT max(next_offset) FROM kafka_offsets") == 8


async def test_consumers_that_may_not_create_a_deleted_topic_say_so_until_it_exists(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = f"not allowed to create {log.topic}, waiting"
    up = 'flashsale_consumer_server_up{server="kafka"}'

    async def refuse(_: AIOKafkaAdminClient, wanted: list[NewTopic]) -> SimpleNamespace:
        code = TopicAuthorizationFailedError.errno
        return SimpleNamespace(topic_errors=[(topic.name, code, "") for topic in wanted])

    async with running(ledger.url, log) as member:
        await until(lambda: member.partitions() == 12)
        with monkeypatch.context() as patch:
            patch.setattr(AIOKafkaAdminClient, "create_topics", refuse)
            await log.delete(log.topic)
            await until(lambda: caplog.text.count(refused) == 1)
            while caplog.text.count(refused) < 4:
                assert member.value(up) == 0
                await asyncio.sleep(0.02)
        assert f"the topic {log.topic} does not exist" in caplog.text
        await log.create()
        sold = accepted()
        await log.write(sold)
        await ledger.until_has(sold)
        await until(lambda: member.value(up) == 1)


async def test_two_consumers_share_the_work_and_count_each_event_once(
    ledger: Ledger, log: Log
) -> None:
    sold = [accepted(number) for number in range(3_000)]
    async with running(ledger.url, log) as one:
        await log.write(*sold[:1_000])
        async with running(ledger.url, log) as other:
            for number in range(1_000, 2_500, 50):
                await log.write(*sold[number : number + 50])
            await ledger.until_has(*sold[:2_500])
            await until(lambda: one.partitions() == other.partitions() == 6)
            await log.write(*sold[2_500:])
            await ledger.until_has(*sold)
            await until_recorded(len(sold), one, other)
        await until(lambda: one.partitions() == 12)
    assert (await ledger.sale()).accepted == len(sold)


async def test_two_groups_on_one_ledger_count_each_event_once(ledger: Ledger, log: Log) -> None:
    """The second group is like a consumer that lost its partitions without noticing."""
    sold = [accepted(number, sale_id=f"default/sale-{number % 7}") for number in range(2_000)]
    async with (
        running(ledger.url, log) as one,
        running(ledger.url, log, group_id="zombies") as other,
    ):
        for number in range(0, 2_000, 100):
            await log.write(*sold[number : number + 100])
        await ledger.until_has(*sold)
        await until_recorded(len(sold), one, other)


@pytest.mark.slow
async def test_killed_consumers_lose_and_double_nothing(
    ledger: Ledger, log: Log, start: Callable[..., Process]
) -> None:
    environment = {
        **log.environment(),
        "FLASHSALE_DATABASE_URL": ledger.url,
    }
    sold = [accepted(number) for number in range(20_000)]

    consumer = start(**environment)
    writing = asyncio.create_task(log.write(*sold))
    for least in (1, 8_000):
        await ledger.until_rows(least)
        consumer.signal(signal.SIGKILL)
        assert await consumer.ended() == -signal.SIGKILL
        consumer = start(**environment)
    await writing
    await ledger.until_rows(len(sold))
    assert await ledger.has(*sold)

    async def announced() -> bool:
        return await (await received(log.bootstrap, log.engine)).agrees(ledger.pool)

    await until(announced, "every reservation is announced", pause=1)
    consumer.signal(signal.SIGTERM)
    assert await consumer.ended() == 0


async def until_exists(log: Log) -> None:
    async with administering(log.bootstrap) as admin:

        async def exists() -> bool:
            return log.topic in await admin.list_topics()

        await until(exists, "the topic exists")
