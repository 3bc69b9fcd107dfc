"""From POST /reserve to a row in the ledger, while processes die, stop and come back."""

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg
import pytest

from dev.crowd import stampede
from dev.journal import Attempt, Journal
from dev.verdict import Verdict, judge, quiet
from flashsale import redis_client
from tests.support.engine import Engine
from tests.support.eventually import until

pytestmark = pytest.mark.slow

BUYERS = 6_000


def buyers(item: str, number: int = BUYERS, quantity: int = 1) -> list[Attempt]:
    """Make a crowd in random order, in which every buyer asks twice with the same key."""
    crowd = [
        Attempt(
            f"user-{n}", {"userId": f"user-{n}", "itemId": item, "quantity": quantity}, f"key-{n}"
        )
        for n in range(number)
    ] * 2
    random.Random(item).shuffle(crowd)
    return crowd


@asynccontextmanager
async def a_crowd(engine: Engine, crowd: list[Attempt]) -> AsyncIterator[Journal]:
    """Run the body while the crowd is under way. The journal is complete afterwards."""
    journal = Journal()
    coming = asyncio.create_task(
        stampede(engine.urls, crowd, connections=40, tries=40, journal=journal)
    )
    try:
        await until(lambda: len(journal.entries) >= len(crowd) // 10 or coming.done(), pause=0.01)
        yield journal
        await coming
    finally:
        coming.cancel()


async def final_verdict(engine: Engine, item: str, journal: Journal) -> Verdict:
    """Wait until all events have arrived. Return the verdict, with which the audit must agree."""
    await quiet(engine.addresses, [item])
    verdict, _ = await judge(engine.addresses, f"default/{item}", journal)
    assert verdict.kept, verdict
    audit = await engine.ctl("audit", item)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert " ok" in audit.stdout
    return verdict


def given_up(journal: Journal) -> set[str]:
    """Return the users who never got a final answer."""
    final = {entry.attempt.user_id for entry in journal.entries if entry.status in (202, 409)}
    return {entry.attempt.user_id for entry in journal.entries} - final


async def test_two_apis_and_two_consumers_sell_exactly_the_stock(engine: Engine, item: str) -> None:
    await engine.apply(item, stock=99)
    async with a_crowd(engine, buyers(item)) as journal:
        pass
    assert not given_up(journal)
    verdict = await final_verdict(engine, item, journal)
    assert (verdict.sold, verdict.allocated) == (99, 99)
    assert {entry.status for entry in journal.entries} == {202, 409}


Fault = Callable[[Engine], Awaitable[None]]


async def kill_an_api(engine: Engine) -> None:
    engine.apis[0].kill()
    await asyncio.to_thread(engine.apis[0].start)


async def kill_a_consumer(engine: Engine) -> None:
    engine.consumers[0].kill()
    await asyncio.to_thread(engine.consumers[0].start)


async def stop_both_consumers(engine: Engine) -> None:
    for consumer in engine.consumers:
        await asyncio.to_thread(consumer.stop)
    for consumer in engine.consumers:
        await asyncio.to_thread(consumer.start)


async def restart_postgres(engine: Engine) -> None:
    await asyncio.to_thread(engine.postgres.stop)
    await asyncio.sleep(1)
    await asyncio.to_thread(engine.postgres.start)


async def make_postgres_read_only(engine: Engine) -> None:
    async def set_to(value: str) -> None:
        admin = await asyncpg.connect(engine.addresses.database_url)
        await admin.execute("SET default_transaction_read_only = off")
        await admin.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
        await admin.execute("SELECT pg_reload_conf()")
        await admin.close()

    await set_to("on")
    await asyncio.sleep(2)
    await set_to("off")


async def restart_kafka(engine: Engine) -> None:
    await asyncio.to_thread(engine.kafka.stop)
    await asyncio.to_thread(engine.kafka.start)


async def kill_kafka(engine: Engine) -> None:
    engine.kafka.kill()
    await asyncio.to_thread(engine.kafka.start)


async def freeze_an_api(engine: Engine) -> None:
    engine.apis[1].pause()
    await asyncio.sleep(2)
    engine.apis[1].resume()


@pytest.mark.parametrize(
    "fault",
    [
        kill_an_api,
        freeze_an_api,
        kill_a_consumer,
        stop_both_consumers,
        restart_postgres,
        make_postgres_read_only,
        restart_kafka,
        kill_kafka,
    ],
)
async def test_nothing_is_lost_or_sold_twice(engine: Engine, item: str, fault: Fault) -> None:
    await engine.apply(item, stock=BUYERS // 2)
    async with a_crowd(engine, buyers(item)) as journal:
        await fault(engine)
    assert not given_up(journal)
    verdict = await final_verdict(engine, item, journal)
    assert verdict.sold == BUYERS // 2
    # Buyers do not wait for Kafka or PostgreSQL.
    if fault not in (kill_an_api, freeze_an_api):
        assert {entry.status for entry in journal.entries} == {202, 409}


async def test_a_redis_killed_during_a_sale_is_fenced_and_rebuilt(
    engine: Engine, item: str
) -> None:
    await engine.apply(item, stock=10 * BUYERS)
    async with a_crowd(engine, buyers(item)) as journal:
        engine.redis.kill()
        await asyncio.to_thread(engine.redis.start)
        fenced = await stampede(engine.urls, buyers(item, 50), connections=5)
        applied = await engine.apply(item, stock=10 * BUYERS)
    assert {entry.status for entry in fenced.entries} == {503}
    assert " rebuilt: Selling" in applied.stdout
    assert not given_up(journal)
    # Redis had not written the last second to disk (everysec). The pods still had it in memory.
    verdict = await final_verdict(engine, item, journal)
    assert verdict.sold == BUYERS


async def test_a_redis_restored_from_an_older_copy_sells_nothing_again(
    engine: Engine, item: str
) -> None:
    """The copy lacks the latest reservations, so it would sell their units a second time."""
    files, copy = engine.redis.data / "appendonlydir", engine.folder / f"copy-of-{item}"
    await engine.apply(item, stock=300)
    journal = await stampede(engine.urls, buyers(item, 100), tries=5)
    await quiet(engine.addresses, [item])
    await asyncio.to_thread(engine.redis.stop)
    shutil.copytree(files, copy)
    await asyncio.to_thread(engine.redis.start)
    assert " rebuilt: Selling" in (await engine.apply(item, stock=300)).stdout
    journal.entries += (await stampede(engine.urls, buyers(item, 250), tries=5)).entries
    await quiet(engine.addresses, [item])
    await asyncio.to_thread(engine.redis.stop)
    shutil.rmtree(files)
    shutil.copytree(copy, files)
    await asyncio.to_thread(engine.redis.start)
    fenced = await stampede(engine.urls, buyers(item, 50), connections=5)
    assert {entry.outcome for entry in fenced.entries} == {"fenced"}
    rebuilt = await engine.ctl("rebuild", item)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert (
        "restored 250 accepted units in 250 reservations from the ledger; missing in Redis: 150"
        in rebuilt.stdout
    )
    journal.entries += (await stampede(engine.urls, buyers(item, 400), tries=5)).entries
    verdict = await final_verdict(engine, item, journal)
    assert verdict.sold == verdict.allocated == 300


async def test_a_redis_wiped_during_a_sale_is_rebuilt(engine: Engine, item: str) -> None:
    await engine.apply(item, stock=BUYERS // 2)
    client = redis_client.connect(engine.redis.url)
    async with a_crowd(engine, buyers(item)) as journal:
        await client.flushall()
        async with asyncio.timeout(90):
            while (done := await engine.ctl("rebuild", item)).returncode:
                assert "stays fenced" in done.stderr
    await client.aclose()
    assert " rebuilt in " in done.stdout
    again = await stampede(engine.urls, buyers(item), tries=5)
    journal.entries += again.entries
    verdict = await final_verdict(engine, item, journal)
    assert verdict.sold == verdict.allocated == BUYERS // 2


async def test_stock_changes_and_a_pause_during_a_sale_sell_exactly_the_last_stock(
    engine: Engine, item: str
) -> None:
    await engine.apply(item, stock=100)
    most = 400
    async with a_crowd(engine, buyers(item, 6_000)) as journal:
        for spec in (
            {"stock": 300},
            {"stock": 300},
            {"stock": 50},
            {"stock": 200, "paused": True},
            {"stock": most},
        ):
            await engine.apply(item, below_held=True, **spec)
    final = await stampede(engine.urls, buyers(item, most + 50), tries=5)
    journal.entries += final.entries
    verdict = await final_verdict(engine, item, journal)
    assert verdict.sold == verdict.allocated == most
