"""The worker without the ledger, and while partitions move: nothing is lost."""

import asyncio
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from random import Random

import asyncpg
import pytest
from asyncpg.pool import Pool

from dev.stack.servers import KafkaServer, PostgresServer
from flashsale.errors import LedgerUnavailable
from flashsale.ledger import engine_id
from flashsale_consumer import offsets, recorder, worker
from flashsale_consumer.clients import transaction
from tests.support.consumer import Log, Process, accepted, running, until_recorded
from tests.support.eventually import until
from tests.support.ledgers import Connection, Ledger, connected, database, opened, waits


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


async def test_a_consumer_leaves_a_read_only_server_that_the_address_no_longer_names(
    ledger: Ledger, log: Log
) -> None:
    """After a failover, the address can lead to the former primary for a while."""
    name = ledger.url.rpartition("/")[2]
    await engine_id(ledger.pool, log.engine)
    async with connected(ledger.url) as admin:
        await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        async with running(ledger.url, log) as member:
            await until(lambda: member.worker.joined, "the group is joined")
            await until(lambda: member.value('flashsale_consumer_server_up{server="ledger"}') == 0)
            # A session keeps the settings it started with, as one to the former primary would.
            await admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            sold = accepted()
            await log.write(sold)
            await ledger.until_has(sold)


async def test_a_consumer_without_partitions_notices_an_outage_and_keeps_its_membership(
    own_postgres: PostgresServer, kafka_server: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "CHECK_SECONDS", 0.2)
    log, up = Log(kafka_server.bootstrap), 'flashsale_consumer_server_up{server="ledger"}'
    async with database(own_postgres) as url, running(url, log, partitions=1) as one:
        await until(lambda: one.partitions() == 1)
        async with running(url, log, partitions=1) as other:
            await until(lambda: other.worker.joined)
            await until(lambda: one.partitions() + other.partitions() == 1)
            [idle] = [each for each in (one, other) if not each.partitions()]
            membership = idle.worker._partitions
            own_postgres.stop()
            await until(lambda: idle.value(up) == 0)
            for _ in range(100):
                assert idle.value(up) == 0
                await asyncio.sleep(0.02)
            own_postgres.start()
            await until(lambda: idle.value(up) == 1)
            assert idle.worker._partitions is membership


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


async def test_a_worker_ends_although_the_ledger_stands_still_in_a_transaction(
    own_postgres: PostgresServer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction cannot be rolled back, and that error must not replace the cancellation."""
    monkeypatch.setattr("flashsale.ledger.COMMAND_TIMEOUT_SECONDS", 1.0)
    async with database(own_postgres) as url, AsyncExitStack() as stack:
        member = await stack.enter_async_context(running(url, log))
        await until(lambda: member.worker.joined, "the group is joined")
        await log.write(accepted())
        async with connected(url) as holder, holder.transaction():
            await holder.execute("LOCK TABLE reservations")
            await log.write(accepted(1))
            await until(lambda: waits(holder), "the worker waits in a transaction")
            own_postgres.pause()
            try:
                await stack.aclose()  # cancels the worker and waits for its end
            finally:
                own_postgres.resume()


@pytest.mark.slow
async def test_a_rebalance_while_the_ledger_is_away_loses_nothing(
    ledger: Ledger, log: Log, postgres_server: PostgresServer
) -> None:
    name = ledger.url.rpartition("/")[2]
    sold = [accepted(number) for number in range(2_000)]
    async with running(ledger.url, log) as one, connected(postgres_server.url) as admin:
        async with running(ledger.url, log) as other:
            await log.write(*sold[:500])
            await ledger.until_has(*sold[:500])
            await until(lambda: one.partitions() == other.partitions() == 6)
            await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            await terminate(admin, name)
            await log.write(*sold[500:1_500])
        await until(lambda: one.partitions() == 0, "the partitions are revoked")
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
        await until(lambda: one.partitions() == 12)
        async with holder.transaction():
            await holder.execute("SELECT FROM sales FOR UPDATE")
            await log.write(*sold[200:800])
            await until(lambda: waits(holder), "a batch waits for the sale's row")
            other = await stack.enter_async_context(running(ledger.url, log))
            await until(lambda: one.partitions() == 0, "the partitions are revoked")
        await log.write(*sold[800:])
        await ledger.until_has(*sold)
        await until_recorded(len(sold), one, other)


async def test_a_consumer_that_stands_still_in_a_transaction_does_not_stop_the_others(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL ends its transaction, which would lock the offsets and the sale."""
    monkeypatch.setattr("flashsale.ledger.IDLE_SECONDS", 3.0)
    sold, lost = [accepted(number) for number in range(200)], accepted()

    async def stand_still() -> None:
        beginning = dict.fromkeys(range(12), 0)
        async with transaction(ledger.pool) as connection:
            await recorder.record(connection, log.topic, beginning, beginning, [lost])
            await log.write(*sold[100:])
            await ledger.until_has(*sold)

    async with running(ledger.url, log) as other:
        await log.write(*sold[:100])
        await ledger.until_has(*sold[:100])
        await until(lambda: other.partitions() == 12)
        with pytest.raises(LedgerUnavailable):
            await stand_still()
        assert not await ledger.has(lost)
        await until_recorded(len(sold), other)


async def test_a_consumer_that_stands_still_while_another_records_reads_nothing_again(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has read the topic's end, which is before the ledger's offset when it continues."""
    first, second = ([accepted(number) for number in range(count)] for count in (20, 30))
    await log.write(*first, partition=0)
    async with running(ledger.url, log):
        await ledger.until_has(*first)
    place = offsets.place

    async def stand_still(
        pool: "Pool[asyncpg.Record]", topic: str, *known: object, **more: object
    ) -> object:
        monkeypatch.undo()
        await log.write(*second, partition=0)
        async with transaction(pool) as connection:
            await recorder.record(connection, topic, {0: 20}, {0: 50}, second)
        return await place(pool, topic, *known, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(offsets, "place", stand_still)
    third = accepted()
    async with running(ledger.url, log) as member:
        await until(lambda: member.partitions() == 12)
        await log.write(third, partition=0)
        await ledger.until_has(*first, *second, third)
        await until_recorded(1, member)
        assert member.events("duplicate") == 0
    assert "recreated" not in caplog.text


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
        await until_recorded(len(sold), member)


async def terminate(admin: Connection, database: str) -> None:
    """End the sessions on a database, because a session keeps the settings it started with."""
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", database
    )
