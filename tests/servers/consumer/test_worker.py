"""The worker on real servers. It records each event once, whichever server or consumer fails."""

import asyncio
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from random import Random

import asyncpg
import pytest
from asyncpg.pool import Pool

from dev.stack.servers import KafkaServer, PostgresServer
from flashsale import events
from flashsale.requirements import TopicFacts
from flashsale.settings import KafkaSettings
from flashsale_consumer import topics, worker
from tests.support.consumer import (
    BEYOND_POSTGRESQL,
    Connection,
    Ledger,
    Log,
    Process,
    accepted,
    connected,
    database,
    opened,
    running,
)
from tests.support.eventually import until
from tests.support.recorded import received


async def test_bad_records_between_events_become_dead_letters(ledger: Ledger, log: Log) -> None:
    good = [accepted(number) for number in range(40)]
    valid = events.encode(accepted())
    bad: list[bytes | None] = [
        b"not JSON",
        b"[]",
        valid.replace(b'"quantity":1', b'"quantity":"1"'),
        valid.replace(b'"quantity":1', b'"quantity":-1'),
        valid.replace(b'"schema":1', b'"schema":2'),
        valid.replace(b'"default/phones"', b'"Phones"'),
        valid.replace(b'"user"', b'"us\\u0000er"'),
        valid.replace(b'"user"', b'"\xff\xfe"'),
        valid.replace(b'"user"', b'"' + b"u" * 900_000 + b'"'),
        b"[" * 100_000,
        b"",
        None,
        events.encode(accepted(accepted_at=BEYOND_POSTGRESQL)),
    ]
    async with running(ledger.url, log) as worker:
        for number, value in enumerate(bad):
            await log.write(*good[3 * number : 3 * number + 3], value, partition=0)
        await log.write(*good[3 * len(bad) :], partition=0)
        await ledger.until_has(*good)
        letters = await log.dead_letters(len(bad))
        assert worker.events("recorded") == len(good)
        assert worker.events("dead_lettered") == len(bad)

    assert sorted(letter.value or b"" for letter in letters) == sorted(v or b"" for v in bad)
    assert all(letter.key is not None for letter in letters)
    offsets = {4 * number + 3 for number in range(len(bad))}
    for letter in letters:
        headers = dict(letter.headers)
        assert headers["schema"] == b"1"
        assert headers["reason"]
        assert headers["original-topic"] == log.topic.encode()
        assert headers["original-partition"] == b"0"
        offsets.remove(int(headers["original-offset"]))
    assert len(await ledger.rows()) == len(good)


async def test_a_record_too_large_to_copy_does_not_stop_its_partition(
    ledger: Ledger, kafka_server: KafkaServer
) -> None:
    log = Log(kafka_server.bootstrap)
    await log.create(largest_dead_letter=1_000)
    good = accepted()
    await log.write(b"x" * 5_000, good, partition=0)
    async with running(ledger.url, log):
        await ledger.until_has(good)
        (letter,) = await log.dead_letters(1)
    headers = dict(letter.headers)
    assert (letter.value, headers["original-offset"]) == (b"", b"0")
    assert headers["omitted"] == b"too large to be copied"


@pytest.mark.slow
async def test_the_offset_waits_until_dead_letters_are_written(
    ledger: Ledger, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    good = accepted()
    async with running(ledger.url, log) as worker:
        await until(lambda: worker.partitions() == 12)
        await log.delete(log.dead_letter_topic)
        await log.write(b"bad", good, partition=0)
        await until(lambda: f"waiting for {log.dead_letter_topic}" in caplog.text)
        assert await ledger.rows() == {}
        await log.create()
        await ledger.until_has(good)
        assert worker.events("dead_lettered") == 1
    (letter,) = await log.dead_letters(1)
    assert letter.value == b"bad"


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
        await until(lambda: log.is_committed(50), "the offsets are committed to Kafka")
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


async def test_a_topic_recreated_by_the_consumer_is_read_even_if_it_is_already_longer(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka came back without its data, and the API published its outbox at once."""
    first, second = ([accepted(number) for number in range(*span)] for span in ((3,), (3, 8)))
    await log.write(*first, partition=0)
    async with running(ledger.url, log):
        await ledger.until_has(*first)
    await log.delete(log.topic)
    create = topics.create

    async def create_and_publish(
        kafka: KafkaSettings, *names: str
    ) -> tuple[frozenset[str], TopicFacts | None]:
        created = await create(kafka, *names)
        await log.write(*second, partition=0)  # before the consumer reads the end offset
        return created

    monkeypatch.setattr(topics, "create", create_and_publish)
    async with running(ledger.url, log):
        await ledger.until_has(*first, *second)
    assert await ledger.pool.fetchval("SELECT max(next_offset) FROM kafka_offsets") == 5


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
            assert one.events("recorded") + other.events("recorded") == len(sold)
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
        assert one.events("recorded") + other.events("recorded") == len(sold)


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


@pytest.mark.slow
async def test_a_read_only_ledger_loses_nothing(
    ledger: Ledger, log: Log, start: Callable[..., Process], postgres_server: PostgresServer
) -> None:
    name = ledger.url.rpartition("/")[2]
    consumer = start(**log.environment(), FLASHSALE_DATABASE_URL=ledger.url)
    sold = [accepted(number) for number in range(3_000)]
    await log.write(*sold[:1_000])
    await ledger.until_has(*sold[:1_000])

    async with connected(postgres_server.url) as admin:
        await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await terminate(admin, name)
        await log.write(*sold[1_000:2_000], b"bad")
        await consumer.until_prints("waiting for the ledger")
        assert await consumer.status("/healthz") == 200
        assert not await ledger.has(sold[1_999])
        await log.write(*sold[2_000:])
        await admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        await terminate(admin, name)

    await ledger.until_has(*sold)
    await consumer.until_prints("the ledger is back")
    assert await consumer.status("/healthz") == 200
    assert consumer.output.count("waiting for the ledger") == 1
    assert len(await log.dead_letters(1)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stopped", "frozen"])
async def test_a_ledger_that_is_away_loses_nothing(
    fault: str,
    own_postgres: PostgresServer,
    log: Log,
    start: Callable[..., Process],
) -> None:
    async with database(own_postgres) as url:
        consumer = start(**log.environment(), FLASHSALE_DATABASE_URL=url)
        sold = [accepted(number) for number in range(2_000)]
        async with opened(url) as ledger:
            await log.write(*sold[:1_000])
            await ledger.until_has(*sold[:1_000])
        if fault == "stopped":
            own_postgres.stop()
        else:
            own_postgres.pause()
        await log.write(*sold[1_000:])
        await consumer.until_prints("waiting for the ledger")
        assert await consumer.status("/healthz") == 200
        if fault == "stopped":
            own_postgres.start()
        else:
            own_postgres.resume()
        async with opened(url) as ledger:
            await ledger.until_has(*sold)
        assert await consumer.status("/healthz") == 200
        assert consumer.output.count("waiting for the ledger") == 1
        consumer.signal(signal.SIGTERM)
        assert await consumer.ended() == 0


async def test_a_rebalance_while_the_ledger_is_away_loses_nothing(
    ledger: Ledger, log: Log, postgres_server: PostgresServer
) -> None:
    name = ledger.url.rpartition("/")[2]
    sold = [accepted(number) for number in range(2_000)]
    async with running(ledger.url, log), connected(postgres_server.url) as admin:
        await log.write(*sold[:500])
        await ledger.until_has(*sold[:500])
        await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await terminate(admin, name)
        await log.write(*sold[500:1_500])
        async with running(ledger.url, log), running(ledger.url, log):
            await admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            await terminate(admin, name)
            await log.write(*sold[1_500:])
            await ledger.until_has(*sold)
    assert (await ledger.sale()).accepted == len(sold)


async def test_a_rebalance_in_the_middle_of_a_transaction_loses_nothing(
    ledger: Ledger, log: Log
) -> None:
    sold = [accepted(number) for number in range(1_000)]
    async with (
        running(ledger.url, log) as one,
        connected(ledger.url) as holder,
        AsyncExitStack() as stack,
    ):
        await log.write(*sold[:200])
        await ledger.until_has(*sold[:200])
        async with holder.transaction():
            await holder.execute("SELECT FROM sales FOR UPDATE")
            await log.write(*sold[200:800])
            await until(lambda: waits(holder), "a batch waits for the sale's row")
            other = await stack.enter_async_context(running(ledger.url, log))
            await until(lambda: one.partitions() == 0)
        await log.write(*sold[800:])
        await ledger.until_has(*sold)
        assert one.events("recorded") + other.events("recorded") == len(sold)


async def test_rebalances_at_any_moment_lose_nothing(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, acquire = Random(1), Pool.acquire
    sold = [accepted(number) for number in range(3_000)]
    async with running(ledger.url, log) as member:
        await until(lambda: member.partitions() == 12)

        partitions = member.worker._partitions

        def rebalanced(pool: "Pool[asyncpg.Record]") -> object:
            if random.random() < 0.3:
                assigned = partitions._consumer.assignment()
                partitions.on_partitions_revoked(assigned)
                partitions.on_partitions_assigned(assigned)
            return acquire(pool)

        monkeypatch.setattr(Pool, "acquire", rebalanced)
        for number in range(0, len(sold), 100):
            await log.write(*sold[number : number + 100])
        await ledger.until_has(*sold)
        assert member.events("recorded") == len(sold)


async def test_a_client_that_does_not_rejoin_the_group_is_replaced(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partitions are revoked, and no assignment follows."""
    await log.create()
    async with running(ledger.url, log) as member:
        first = accepted()
        await log.write(first)
        await ledger.until_has(first)
        monkeypatch.setattr(worker, "JOIN_SECONDS", 1.0)
        stuck = member.worker._partitions
        stuck.on_partitions_revoked([])
        await until(lambda: member.worker._partitions is not stuck)
        monkeypatch.undo()
        second = accepted()
        await log.write(second)
        await ledger.until_has(first, second)


@pytest.mark.slow
async def test_a_client_that_fails_to_close_without_kafka_is_replaced(
    ledger: Ledger,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """aiokafka cancels its own stop() while a fetch waits for its retry."""
    with KafkaServer(tmp_path_factory.mktemp("short-kafka")) as kafka:
        log = Log(kafka.bootstrap)
        await log.create()
        async with running(ledger.url, log) as member:
            first, second = accepted(), accepted()
            await log.write(first)
            await ledger.until_has(first)
            kafka.stop()
            await until(lambda: "Failed fetch messages" in caplog.text)
            monkeypatch.setattr(worker, "JOIN_SECONDS", 1.0)
            member.worker._partitions.on_partitions_revoked([])
            await until(lambda: "the group membership: not closed cleanly" in caplog.text)
            monkeypatch.undo()
            kafka.start()
            await log.write(second)
            await ledger.until_has(first, second)


@pytest.mark.slow
async def test_kafka_may_start_later_and_go_away(
    ledger: Ledger, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Process]
) -> None:
    kafka = KafkaServer(tmp_path_factory.mktemp("late-kafka"))
    log = Log(kafka.bootstrap)
    consumer = start(**log.environment(), FLASHSALE_DATABASE_URL=ledger.url)
    await consumer.until_prints("waiting for Kafka")
    assert await consumer.status("/healthz") == 200
    assert await consumer.status("/readyz") == 503
    first, second = ([accepted(number) for number in range(100)] for _ in range(2))
    with kafka:
        await consumer.until_serves("/readyz")
        await log.write(*first)
        await ledger.until_has(*first)
        kafka.stop()
        await consumer.until_prints("waiting for Kafka", times=2)
        assert await consumer.status("/healthz") == 200
        assert await consumer.status("/readyz") == 200
        kafka.start()
        await log.write(*second)
        await ledger.until_has(*first, *second)
        assert consumer.output.count("waiting for Kafka") <= 3
        assert len(consumer.output.splitlines()) < 50
        consumer.signal(signal.SIGTERM)
        assert await consumer.ended() == 0


async def waits(connection: Connection) -> bool:
    """Whether another session waits for a lock of this connection."""
    return bool(
        await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE pg_backend_pid() = ANY(pg_blocking_pids(pid))"
        )
    )


async def terminate(admin: Connection, database: str) -> None:
    """End the sessions on a database, because a session keeps the settings it started with."""
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", database
    )
