"""The worker on real servers: what arrives, in whatever state they are, is recorded once."""

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
from flashsale.settings import KafkaSettings
from flashsale_consumer import topics, worker
from tests.support.consumer import (
    BEYOND_POSTGRESQL,
    Book,
    Connection,
    Log,
    Process,
    accepted,
    connected,
    database,
    opened,
    running,
    until,
)

pytestmark = pytest.mark.slow


async def test_events_land_whatever_is_between_them(book: Book, log: Log) -> None:
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
        events.encode(accepted(occurred_at=BEYOND_POSTGRESQL)),
    ]
    async with running(book.url, log) as worker:
        for number, value in enumerate(bad):
            await log.write(*good[3 * number : 3 * number + 3], value, partition=0)
        await log.write(*good[3 * len(bad) :], partition=0)
        await until(lambda: book.has(*good), "the good ones are recorded")
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
    assert len(await book.rows()) == len(good)


async def test_a_record_too_large_to_be_copied_does_not_stop_its_partition(
    book: Book, kafka: KafkaServer
) -> None:
    log = Log(kafka.bootstrap)
    await log.create(largest_dead_letter=1_000)
    good = accepted()
    await log.write(b"x" * 5_000, good, partition=0)
    async with running(book.url, log):
        await until(lambda: book.has(good), "the good one is recorded")
        (letter,) = await log.dead_letters(1)
    headers = dict(letter.headers)
    assert (letter.value, headers["original-offset"]) == (b"", b"0")
    assert headers["omitted"] == b"too large to be copied"


async def test_dead_letters_that_cannot_be_written_hold_the_offset(
    book: Book, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    good = accepted()
    async with running(book.url, log) as worker:
        await until(lambda: counted(worker.partitions(), 12), "it reads")
        await log.delete(log.dead_letter_topic)
        await log.write(b"bad", good, partition=0)
        await until(lambda: said(caplog, f"waiting for {log.dead_letter_topic}"), "it is noticed")
        assert await book.rows() == {}
        await log.create()
        await until(lambda: book.has(good), "the good one is recorded")
        assert worker.events("dead_lettered") == 1
    (letter,) = await log.dead_letters(1)
    assert letter.value == b"bad"


async def test_over_capacity_is_refused_counted_and_logged(
    book: Book, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    oversold = [accepted(number, allocated=2, capacity=2) for number in range(3)]
    await log.write(*oversold, partition=0)
    async with running(book.url, log) as worker:
        await until(lambda: book.has(*oversold), "all have a row")
        await until(lambda: counted(worker.events("refused"), 1), "it is counted")
    assert (await book.sale()).accepted == 2
    (line,) = (record for record in caplog.records if "refused" in record.message)
    assert line.levelname == "ERROR"
    assert oversold[2].sale_id in line.message
    assert oversold[2].reservation_id in line.message


async def test_reading_again_from_the_beginning_changes_nothing(book: Book, log: Log) -> None:
    first = [accepted(number) for number in range(100)]
    await log.write(*first)
    async with running(book.url, log):
        await until(lambda: book.has(*first), "they are recorded")
    before = await book.rows()
    await book.pool.execute("UPDATE kafka_offsets SET next_offset = 0")
    async with running(book.url, log) as worker:
        await until(lambda: counted(worker.events("duplicate"), 100), "all were read again")
        assert worker.events("recorded") == 0
    assert await book.rows() == before
    assert (await book.sale()).accepted == 100


async def test_a_restart_reads_on_from_the_ledger_not_from_kafka(book: Book, log: Log) -> None:
    first = [accepted(number) for number in range(50)]
    await log.write(*first)
    async with running(book.url, log):
        await until(lambda: book.has(*first), "they are recorded")
        await until(lambda: log.is_committed(50), "Kafka knows it, too")
    # What an older copy of the ledger lacks is read again, though Kafka has it as consumed.
    await book.pool.execute("DELETE FROM reservations")
    await book.pool.execute("DELETE FROM sales")
    await book.pool.execute("DELETE FROM kafka_offsets")
    async with running(book.url, log):
        await until(lambda: book.has(*first), "they are recorded again")


async def test_a_ledger_that_is_replaced_by_an_older_copy_is_refilled(book: Book, log: Log) -> None:
    first, second = ([accepted(number) for number in range(50)] for _ in range(2))
    async with running(book.url, log):
        await log.write(*first)
        await until(lambda: book.has(*first), "the first are recorded")
        async with book.pool.acquire() as connection, connection.transaction():
            await connection.execute("DELETE FROM reservations")
            await connection.execute("DELETE FROM sales")
            await connection.execute("UPDATE kafka_offsets SET next_offset = 0")
        # Nobody needs to buy anything for it to be noticed.
        await until(lambda: book.has(*first), "the first are recorded again")
        await log.write(*second)
        await until(lambda: book.has(*first, *second), "all are recorded")


async def test_a_topic_that_was_created_anew_is_read_from_its_beginning(
    book: Book, log: Log
) -> None:
    first, second = ([accepted(number) for number in range(n)] for n in (60, 5))
    await log.write(*first, partition=0)
    async with running(book.url, log):
        await until(lambda: book.has(*first), "the first are recorded")
    await log.delete(log.topic)
    await log.create()
    await log.write(*second, partition=0)
    async with running(book.url, log):
        await until(lambda: book.has(*first, *second), "all are recorded")
    assert await book.pool.fetchval("SELECT max(next_offset) FROM kafka_offsets") == 5


async def test_a_topic_that_is_created_anew_under_a_running_consumer_is_read(
    book: Book, log: Log
) -> None:
    first, second = ([accepted(number) for number in range(n)] for n in (60, 5))
    async with running(book.url, log):
        await log.write(*first, partition=0)
        await until(lambda: book.has(*first), "the first are recorded")
        await log.delete(log.topic)
        await log.create()
        await log.write(*second, partition=0)
        await until(lambda: book.has(*first, *second), "all are recorded")


async def test_a_topic_that_the_consumer_creates_anew_is_read_even_if_it_is_the_longer_one(
    book: Book, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Kafka comes back without its data, and the API publishes what waited at once."""
    first, second = ([accepted(number) for number in range(*span)] for span in ((3,), (3, 8)))
    await log.write(*first, partition=0)
    async with running(book.url, log):
        await until(lambda: book.has(*first), "the first are recorded")
    await log.delete(log.topic)
    create = topics.create

    async def create_and_publish(kafka: KafkaSettings, *names: str) -> frozenset[str]:
        created = await create(kafka, *names)
        await log.write(*second, partition=0)  # before the consumer looks where it ends
        return created

    monkeypatch.setattr(topics, "create", create_and_publish)
    async with running(book.url, log):
        await until(lambda: book.has(*first, *second), "all are recorded")
    assert await book.pool.fetchval("SELECT max(next_offset) FROM kafka_offsets") == 5


async def test_two_consumers_share_the_work_and_count_once(book: Book, log: Log) -> None:
    sold = [accepted(number) for number in range(3_000)]
    async with running(book.url, log) as one:
        await log.write(*sold[:1_000])
        async with running(book.url, log) as other:
            for number in range(1_000, 2_500, 50):
                await log.write(*sold[number : number + 50])
            await until(lambda: book.has(*sold[:2_500]), "all so far are recorded")
            await until(lambda: counted(min(one.partitions(), other.partitions()), 6), "shared")
            await log.write(*sold[2_500:])
            await until(lambda: book.has(*sold), "all are recorded")
            assert one.events("recorded") + other.events("recorded") == len(sold)
        await until(lambda: counted(one.partitions(), 12), "one has all again")
    assert (await book.sale()).accepted == len(sold)


async def test_two_groups_on_one_ledger_count_once(book: Book, log: Log) -> None:
    """As a consumer does that lost its partitions and does not know it yet."""
    sold = [accepted(number, sale_id=f"default/sale-{number % 7}") for number in range(2_000)]
    zombie = Log(log.bootstrap, log.topic, log.dead_letter_topic)
    async with running(book.url, log) as one, running(book.url, zombie) as other:
        for number in range(0, 2_000, 100):
            await log.write(*sold[number : number + 100])
        await until(lambda: book.has(*sold), "all are recorded")
        assert one.events("recorded") + other.events("recorded") == len(sold)


async def test_killed_consumers_lose_and_double_nothing(
    book: Book, default_log: Log, start: Callable[..., Process]
) -> None:
    environment = {
        "FLASHSALE_KAFKA_BOOTSTRAP": default_log.bootstrap,
        "FLASHSALE_DATABASE_URL": book.url,
    }
    sold = [accepted(number) for number in range(20_000)]

    async def some(least: int) -> bool:
        return len(await book.rows()) >= least

    consumer = start(**environment)
    writing = asyncio.create_task(default_log.write(*sold))
    for least in (1, 8_000):
        await until(lambda least=least: some(least), f"{least} are recorded")  # type: ignore[misc]
        consumer.signal(signal.SIGKILL)
        assert await consumer.ended() == -signal.SIGKILL
        consumer = start(**environment)
    await writing
    await until(lambda: some(len(sold)), "all are recorded")
    assert await book.has(*sold)
    consumer.signal(signal.SIGTERM)
    assert await consumer.ended() == 0


async def test_a_read_only_ledger_loses_nothing(
    book: Book, default_log: Log, start: Callable[..., Process], postgres: PostgresServer
) -> None:
    name = book.url.rpartition("/")[2]
    consumer = start(
        FLASHSALE_KAFKA_BOOTSTRAP=default_log.bootstrap, FLASHSALE_DATABASE_URL=book.url
    )
    sold = [accepted(number) for number in range(3_000)]
    await default_log.write(*sold[:1_000])
    await until(lambda: book.has(*sold[:1_000]), "the first are recorded")

    async with connected(postgres.url) as admin:
        await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await terminate(admin, name)
        await default_log.write(*sold[1_000:2_000], b"bad")
        await until(lambda: consumer.prints("waiting for the ledger"), "it is noticed")
        assert await consumer.status("/healthz") == 200
        assert not await book.has(sold[1_999])
        await default_log.write(*sold[2_000:])
        await admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        await terminate(admin, name)

    await until(lambda: book.has(*sold), "all are recorded")
    await until(lambda: consumer.prints("the ledger is back"), "it is said")
    assert await consumer.status("/healthz") == 200
    assert consumer.output.count("waiting for the ledger") == 1
    assert len(await default_log.dead_letters(1)) == 1


@pytest.mark.parametrize("fault", ["stopped", "frozen"])
async def test_a_ledger_that_is_away_loses_nothing(
    fault: str,
    own_postgres: PostgresServer,
    default_log: Log,
    start: Callable[..., Process],
) -> None:
    async with database(own_postgres) as url:
        consumer = start(
            FLASHSALE_KAFKA_BOOTSTRAP=default_log.bootstrap, FLASHSALE_DATABASE_URL=url
        )
        sold = [accepted(number) for number in range(2_000)]
        async with opened(url) as book:
            await default_log.write(*sold[:1_000])
            await until(lambda: book.has(*sold[:1_000]), "the first are recorded")
        if fault == "stopped":
            own_postgres.stop()
        else:
            own_postgres.pause()
        await default_log.write(*sold[1_000:])
        await until(lambda: consumer.prints("waiting for the ledger"), "it is noticed")
        assert await consumer.status("/healthz") == 200
        if fault == "stopped":
            own_postgres.start()
        else:
            own_postgres.resume()
        async with opened(url) as book:
            await until(lambda: book.has(*sold), "all are recorded")
        assert await consumer.status("/healthz") == 200
        assert consumer.output.count("waiting for the ledger") == 1
        consumer.signal(signal.SIGTERM)
        assert await consumer.ended() == 0


async def test_a_rebalance_while_the_ledger_is_away_loses_nothing(
    book: Book, log: Log, postgres: PostgresServer
) -> None:
    name = book.url.rpartition("/")[2]
    sold = [accepted(number) for number in range(2_000)]
    async with running(book.url, log), connected(postgres.url) as admin:
        await log.write(*sold[:500])
        await until(lambda: book.has(*sold[:500]), "the first are recorded")
        await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await terminate(admin, name)
        await log.write(*sold[500:1_500])
        async with running(book.url, log), running(book.url, log):
            await admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            await terminate(admin, name)
            await log.write(*sold[1_500:])
            await until(lambda: book.has(*sold), "all are recorded")
    assert (await book.sale()).accepted == len(sold)


async def test_a_rebalance_in_the_middle_of_a_transaction_loses_nothing(
    book: Book, log: Log
) -> None:
    sold = [accepted(number) for number in range(1_000)]
    async with (
        running(book.url, log) as one,
        connected(book.url) as holder,
        AsyncExitStack() as stack,
    ):
        await log.write(*sold[:200])
        await until(lambda: book.has(*sold[:200]), "the first are recorded")
        async with holder.transaction():
            await holder.execute("SELECT FROM sales FOR UPDATE")
            await log.write(*sold[200:800])
            await until(lambda: waits(holder), "a batch waits for the sale's row")
            other = await stack.enter_async_context(running(book.url, log))
            await until(lambda: counted(-one.partitions(), 0), "the partitions were revoked")
        await log.write(*sold[800:])
        await until(lambda: book.has(*sold), "all are recorded")
        assert one.events("recorded") + other.events("recorded") == len(sold)


async def test_rebalances_at_any_moment_lose_nothing(
    book: Book, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, acquire = Random(1), Pool.acquire
    sold = [accepted(number) for number in range(3_000)]
    async with running(book.url, log) as member:
        await until(lambda: counted(member.partitions(), 12), "it reads")

        def rebalanced(pool: "Pool[asyncpg.Record]") -> object:
            if random.random() < 0.3:
                assigned = member.worker._member().assignment()
                member.worker.on_partitions_revoked(assigned)
                member.worker.on_partitions_assigned(assigned)
            return acquire(pool)

        monkeypatch.setattr(Pool, "acquire", rebalanced)
        for number in range(0, len(sold), 100):
            await log.write(*sold[number : number + 100])
        await until(lambda: book.has(*sold), "all are recorded")
        assert member.events("recorded") == len(sold)


async def test_a_client_that_does_not_come_back_into_the_group_is_replaced(
    book: Book, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partitions were taken away, and no assignment follows."""
    await log.create()
    async with running(book.url, log) as member:
        first = accepted()
        await log.write(first)
        await until(lambda: book.has(first), "it records")
        monkeypatch.setattr(worker, "JOIN_SECONDS", 1.0)
        stuck = member.worker._consumer
        member.worker.on_partitions_revoked([])
        await until(lambda: counted(member.worker._consumer is not stuck, 1), "it is replaced")
        monkeypatch.undo()
        second = accepted()
        await log.write(second)
        await until(lambda: book.has(first, second), "the new one records")


async def test_a_client_whose_end_fails_without_kafka_is_replaced(
    book: Book,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """aiokafka's stop() ends by a cancellation while a fetch waits for its retry."""
    with KafkaServer(tmp_path_factory.mktemp("short-kafka")) as kafka:
        log = Log(kafka.bootstrap, events.TOPIC, events.DEAD_LETTER_TOPIC)
        await log.create()
        async with running(book.url, log) as member:
            first, second = accepted(), accepted()
            await log.write(first)
            await until(lambda: book.has(first), "it records")
            kafka.stop()
            await until(lambda: said(caplog, "Failed fetch messages"), "fetches are tried again")
            monkeypatch.setattr(worker, "JOIN_SECONDS", 1.0)
            member.worker.on_partitions_revoked([])
            await until(lambda: said(caplog, "the membership: not closed cleanly"), "it fails")
            monkeypatch.undo()
            kafka.start()
            await log.write(second)
            await until(lambda: book.has(first, second), "the new one records")


async def test_kafka_may_come_later_and_go_for_a_while(
    book: Book, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Process]
) -> None:
    kafka = KafkaServer(tmp_path_factory.mktemp("late-kafka"))
    log = Log(kafka.bootstrap, events.TOPIC, events.DEAD_LETTER_TOPIC)
    consumer = start(FLASHSALE_KAFKA_BOOTSTRAP=log.bootstrap, FLASHSALE_DATABASE_URL=book.url)
    await until(lambda: consumer.prints("waiting for Kafka"), "it is noticed")
    assert await consumer.status("/healthz") == 200
    assert await consumer.status("/readyz") == 503
    first, second = ([accepted(number) for number in range(100)] for _ in range(2))
    with kafka:
        await until(lambda: consumer.serves("/readyz"), "ready")
        await log.write(*first)
        await until(lambda: book.has(*first), "the first are recorded")
        kafka.stop()
        await until(lambda: consumer.prints("waiting for Kafka", times=2), "it is noticed")
        assert await consumer.status("/healthz") == 200
        assert await consumer.status("/readyz") == 200
        kafka.start()
        await log.write(*second)
        await until(lambda: book.has(*first, *second), "all are recorded")
        assert consumer.output.count("waiting for Kafka") <= 3
        assert len(consumer.output.splitlines()) < 50
        consumer.signal(signal.SIGTERM)
        assert await consumer.ended() == 0


async def counted(number: float, least: float) -> bool:
    return number >= least


async def waits(connection: Connection) -> bool:
    """Whether somebody waits for what this connection has locked."""
    return bool(
        await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE pg_backend_pid() = ANY(pg_blocking_pids(pid))"
        )
    )


async def said(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


async def terminate(admin: Connection, database: str) -> None:
    """Ends the sessions on a database, which keep the settings that they began with."""
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", database
    )
