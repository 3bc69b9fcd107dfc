"""A consumer records only the events of its ledger's engine, and joins only that engine's group."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from confluent_kafka.admin import AdminClient

from dev.stack.servers import PostgresServer
from flashsale.schema import migrate
from flashsale_consumer import worker
from tests.support.consumer import Log, Process, accepted, running, until_recorded
from tests.support.eventually import until
from tests.support.ledgers import Ledger, database, migrate_to, opened

FOREIGN = "11111111-1111-1111-1111-111111111111"


@pytest.fixture
async def other_ledger(postgres_server: PostgresServer) -> AsyncIterator[Ledger]:
    """The empty ledger of another engine."""
    async with database(postgres_server) as url, opened(url) as other:
        await migrate(other.pool)
        yield other


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused worker looks often whether it is still refused."""
    monkeypatch.setattr(worker, "REFUSED_SECONDS", 0.2)


async def test_events_of_another_engine_become_dead_letters(ledger: Ledger, log: Log) -> None:
    own = await ledger.engine_id()
    foreign = [accepted(number, engine=FOREIGN, capacity=5_000_000) for number in range(3)]
    unknown = accepted(3, engine=FOREIGN, sale_id="default/unknown")
    good = [accepted(4), accepted(5, engine=own)]
    await log.write(*foreign, unknown, *good, partition=0)
    async with running(ledger.url, log) as member:
        await ledger.until_has(*good)
        letters = await log.dead_letters(4)
        await until(lambda: member.events("dead_lettered") == 4)
        assert member.events("recorded") == len(good)
    assert {letter.key.decode() for letter in letters} == {
        event.reservation_id for event in (*foreign, unknown)
    }
    for letter in letters:
        reason = dict(letter.headers)["reason"].decode()
        assert FOREIGN in reason
        assert own in reason
    assert len(await ledger.rows()) == len(good)
    assert (await ledger.sale()).capacity == good[0].capacity
    assert await ledger.rows("default/unknown") == {}
    assert await ledger.pool.fetchval("SELECT count(*) FROM sales") == 1


async def test_a_group_is_claimed_before_any_event_arrives(ledger: Ledger, log: Log) -> None:
    async with running(ledger.url, log):
        await log.until_owned()
    assert await log.owner() == await ledger.engine_id()


async def commit_without_metadata(log: Log) -> None:
    """Commit offsets as the previous version did."""
    consumer = AIOKafkaConsumer(bootstrap_servers=log.bootstrap, group_id=log.group_id)
    await consumer.start()
    partitions = [TopicPartition(log.topic, number) for number in range(12)]
    consumer.assign(partitions)
    await consumer.commit(dict.fromkeys(partitions, 0))
    await consumer.stop()


async def test_a_group_of_the_previous_version_is_adopted(ledger: Ledger, log: Log) -> None:
    await commit_without_metadata(log)
    assert await log.owner() is None
    async with running(ledger.url, log):
        await log.until_owned()
        event = accepted()
        await log.write(event)
        await ledger.until_has(event)
    assert await log.owner() == await ledger.engine_id()


async def test_a_claim_that_was_lost_is_repeated(ledger: Ledger, log: Log) -> None:
    """A consumer of the previous version commits the same offsets without an owner."""
    async with running(ledger.url, log) as member:
        await log.until_owned()
        consumer = member.worker._partitions._consumer
        await consumer.commit({TopicPartition(log.topic, 0): 0})
        await log.until_owned()


@pytest.mark.usefixtures("looks_often")
async def test_the_group_of_another_engine_is_left_alone_until_it_is_deleted(
    ledger: Ledger, other_ledger: Ledger, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    own, foreign = await other_ledger.engine_id(), await ledger.engine_id()
    first, second = ([accepted(number, engine=foreign) for number in range(50)] for _ in range(2))
    async with running(other_ledger.url, log) as refused:
        await until(lambda: refused.worker.joined)
        await log.write(accepted(engine=own))
        await log.until_owned()
    async with running(ledger.url, log) as member:
        await until(lambda: member.worker.conflict)
        assert not member.worker.joined
        assert foreign in member.worker.conflict
        assert own in member.worker.conflict
        await log.write(*first)
        assert await ledger.rows() == {}
        assert await log.owner() == own
        await delete_group(log)
        await log.write(*second)
        await ledger.until_has(*first, *second)
        assert member.worker.conflict == ""
        await log.until_owned()
        assert await log.owner() == foreign
    told = [record for record in caplog.records if "belongs to engine" in record.getMessage()]
    assert [record.levelno for record in told if record.name.endswith("worker")].count(
        logging.ERROR
    ) == 2  # the conflict, and the one event of the other engine


async def delete_group(log: Log) -> None:
    admin = AdminClient({"bootstrap.servers": log.bootstrap})
    (deleted,) = admin.delete_consumer_groups([log.group_id]).values()
    await asyncio.to_thread(deleted.result, 30)


@pytest.mark.usefixtures("looks_often")
@pytest.mark.slow
async def test_of_two_engines_that_start_together_one_leaves_the_group(
    ledger: Ledger, other_ledger: Ledger, log: Log
) -> None:
    async with running(ledger.url, log) as one, running(other_ledger.url, log) as other:
        await until(
            lambda: bool(one.worker.conflict) != bool(other.worker.conflict),
            "one of the two is refused",
        )
        winner, loser = (other, one) if one.worker.conflict else (one, other)
        kept, empty = (ledger, other_ledger) if winner is one else (other_ledger, ledger)
        await until(lambda: winner.partitions() == 12)
        own = await kept.engine_id()
        assert await log.owner() == own
        sold = [accepted(number, engine=own) for number in range(500)]
        await log.write(*sold)
        await kept.until_has(*sold)
        await until_recorded(len(sold), winner)
        assert loser.events("recorded") == loser.events("dead_lettered") == 0
        assert loser.worker.conflict
    assert await empty.rows() == {}


@pytest.mark.slow
async def test_the_ledger_of_an_engine_of_another_name_is_refused_until_it_is_replaced(
    ledger: Ledger, log: Log, start: Callable[..., Process]
) -> None:
    await ledger.pool.execute("UPDATE engine SET name = 'brand'")
    consumer = start(**log.environment(), FLASHSALE_DATABASE_URL=ledger.url)
    sentence = f"the ledger belongs to the engine brand, but FLASHSALE_ENGINE is {log.engine}"
    await consumer.until_prints(sentence)
    assert await consumer.status("/healthz") == 200
    async with httpx.AsyncClient(base_url=consumer.url) as client:
        answer = await client.get("/readyz")
    assert answer.status_code == 503
    assert answer.text.startswith(sentence)
    await ledger.pool.execute("UPDATE engine SET name = $1", log.engine)
    await consumer.until_serves("/readyz")
    assert consumer.output.count(sentence) == 1
    assert "Traceback" not in consumer.output


async def test_the_former_ledger_of_an_engine_of_another_name_is_not_migrated(
    database_url: str, log: Log
) -> None:
    """A new release with a wrong address must not stop the consumers of a former one."""
    async with opened(database_url) as former:
        await migrate_to(former.pool, 4)
        await former.pool.execute("UPDATE engine SET name = 'brand'")
        async with running(database_url, log) as member:
            await until(lambda: "belongs to the engine brand" in member.worker.conflict)
        assert await former.pool.fetchval("SELECT count(occurred_at) FROM reservations") == 0
