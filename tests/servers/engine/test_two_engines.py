"""Two engines on one Kafka, and an engine of the previous version that is upgraded."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import cast

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from dev.crowd import stampede
from dev.journal import Attempt, Journal
from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from dev.verdict import judge, quiet
from flashsale import events, redis_client
from flashsale.inventory import Applied, Inventory
from flashsale.keys import DEFAULT_ENGINE, ItemKeys, engine_id
from flashsale.outbox import Outbox
from flashsale.reservations import BatchReply, OutboxEntry, Request
from flashsale.sale import SaleSpec
from flashsale.settings import KafkaSettings
from flashsale_api.reservation_ids import reservation_id
from flashsale_consumer import topics
from tests.support.consumer import Log, Process
from tests.support.engine import flashsalectl, manifest
from tests.support.redis_users import OPERATOR, of_api, url_of
from tests.support.servers import database

pytestmark = pytest.mark.slow

EARLIER_MIGRATIONS = ("0001_ledger.sql", "0002_resource_uid.sql", "0003_rebuilds.sql")


@pytest.fixture
def other_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    with database(postgres_server) as url:
        yield url


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Addresses], tuple[ApiServer, ConsumerServer]]]:
    """A function that starts an API process and a consumer. They are killed after the test."""
    with ExitStack() as running:

        def start(addresses: Addresses) -> tuple[ApiServer, ConsumerServer]:
            folder = tmp_path / uuid.uuid4().hex
            api = ApiServer(folder / "api", of_api(addresses))
            consumer = ConsumerServer(folder / "consumer", addresses)
            for server in (api, consumer):
                running.callback(server.kill)
                server.start()
            return api, consumer

        yield start


def crowd(item: str, users: range) -> list[Attempt]:
    return [
        Attempt(f"user-{n}", {"userId": f"user-{n}", "itemId": item, "quantity": 1}, f"key-{n}")
        for n in users
    ]


async def apply(addresses: Addresses, item: str, stock: int) -> str:
    done = await flashsalectl(addresses, "apply", "-f", "-", stdin=manifest(item, stock=stock))
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


async def sold_exactly(addresses: Addresses, item: str, journal: Journal, units: int) -> None:
    """Wait until everything is recorded. The ledger and the audit must agree with the journal."""
    await quiet(addresses, [item])
    verdict, _ = await judge(addresses, f"default/{item}", journal)
    assert verdict.kept, verdict
    assert verdict.sold == units
    audit = await flashsalectl(addresses, "audit", item)
    assert audit.returncode == 0, audit.stdout + audit.stderr


async def ledger_value(addresses: Addresses, query: str) -> object:
    connection = await asyncpg.connect(addresses.database_url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def dead_letters(addresses: Addresses) -> int:
    """Return the number of records in the engine's dead letter topic."""
    name = events.dead_letter_topic(addresses.engine)
    consumer = AIOKafkaConsumer(name, bootstrap_servers=addresses.kafka_bootstrap)
    await consumer.start()
    try:
        return sum((await consumer.end_offsets(consumer.assignment())).values())
    finally:
        await consumer.stop()


async def test_engines_of_different_names_share_kafka_and_redis(
    redis_server: RedisServer,
    kafka_server: KafkaServer,
    database_url: str,
    other_database_url: str,
    item: str,
    start: Callable[[Addresses], tuple[ApiServer, ConsumerServer]],
) -> None:
    shop, brand = (
        Addresses(
            url_of(redis_server, OPERATOR), kafka_server.bootstrap, url, f"{name}-{uuid.uuid4()}"
        )
        for name, url in (("shop", database_url), ("brand", other_database_url))
    )
    apis = {}
    for addresses, stock in ((shop, 100), (brand, 20)):
        await apply(addresses, item, stock)
        apis[addresses.engine], _ = await asyncio.to_thread(start, addresses)
    journals = await asyncio.gather(
        *(
            stampede([apis[each.engine].url], crowd(item, range(300)), connections=20, tries=5)
            for each in (shop, brand)
        )
    )
    await sold_exactly(shop, item, journals[0], 100)
    await sold_exactly(brand, item, journals[1], 20)
    for each in (shop, brand):
        assert await dead_letters(each) == 0
        owner = await Log(each.kafka_bootstrap, each.engine).owner()
        assert owner == str(await ledger_value(each, "SELECT id FROM engine"))


async def test_a_second_engine_of_the_same_name_is_refused(
    tmp_path: Path,
    redis_server: RedisServer,
    kafka_server: KafkaServer,
    database_url: str,
    other_database_url: str,
    item: str,
    start: Callable[[Addresses], tuple[ApiServer, ConsumerServer]],
) -> None:
    """Two releases with their own Redis and PostgreSQL, and one Kafka."""
    name = f"shop-{uuid.uuid4()}"
    with RedisServer(tmp_path / "redis") as other_redis:
        first = Addresses(redis_server.url, kafka_server.bootstrap, database_url, name)
        second = Addresses(other_redis.url, kafka_server.bootstrap, other_database_url, name)
        await apply(first, item, 100)
        api, _ = await asyncio.to_thread(start, first)
        log = Log(kafka_server.bootstrap, name)
        await log.until_owned()
        await apply(second, item, 20)
        ids = [str(await ledger_value(each, "SELECT id FROM engine")) for each in (first, second)]
        refused = Process(tmp_path / "refused.log", **second.environment())
        try:
            journal = await stampede([api.url], crowd(item, range(300)), connections=20, tries=5)
            await refused.until_prints(
                f"belongs to engine {ids[0]}, but this ledger to engine {ids[1]}"
            )
            assert await refused.status("/readyz") == 503
            await sold_exactly(first, item, journal, 100)
            assert refused.output.count("belongs to engine") == 1
        finally:
            refused.kill()
        assert await log.owner() == ids[0]
        assert await dead_letters(first) == 0
        assert await ledger_value(second, "SELECT count(*) FROM reservations") == 0
        assert await ledger_value(second, "SELECT count(*) FROM kafka_offsets") == 0


@asynccontextmanager
async def connection(url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    opened = await asyncpg.connect(url)
    try:
        yield opened
    finally:
        await opened.close()


async def old_ledger(url: str, item: str, stock: int, recorded: list[OutboxEntry]) -> None:
    """Make the ledger of the previous version, with the recorded reservations of a sale."""
    async with connection(url) as ledger:
        await ledger.execute(
            "CREATE TABLE schema_migrations ("
            "version integer PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        for script in EARLIER_MIGRATIONS:
            text = (files("flashsale") / "migrations" / script).read_text("utf-8")
            await ledger.execute(text)
            await ledger.execute("INSERT INTO schema_migrations VALUES ($1)", int(script[:4]))
        await ledger.execute(
            "INSERT INTO sales (sale_id, item_id, allocated, revision, capacity, accepted)"
            " VALUES ($1, $2, $3, 1, $3, $4)",
            f"default/{item}",
            item,
            stock,
            len(recorded),
        )
        await ledger.executemany(
            "INSERT INTO reservations VALUES ($1, $2, $3, 1, 'accepted', 1, $4, now())",
            [
                (f"default/{item}", e.reservation_id, e.record.user_id, e.record.request_key)
                for e in recorded
            ],
        )


async def old_sale(inventory: Inventory, item: str, stock: int, buyers: int) -> list[OutboxEntry]:
    """Make the Redis keys of a sale in the previous version's form. Returns its outbox."""
    redis, own = inventory.redis, ItemKeys.of(item)
    now_ms = (await inventory.server()).now_ms
    spec = SaleSpec(f"default/{item}", item, stock)
    assert await inventory.apply(spec, 1, seed_until_ms=now_ms + 60_000) is Applied.SEEDED
    keys = [(f"user-{n}", f"key-{n}") for n in range(buyers)]
    requests = [Request(reservation_id(item, user, key), user, 1, key) for user, key in keys]
    assert isinstance(await inventory.reserve(item, requests, timeout_seconds=5), BatchReply)
    await redis.hdel(own.sale, "engine")
    entries = cast("list[tuple[str, dict[str, str]]]", await redis.xrange(own.outbox))
    await redis.delete(own.outbox)
    for entry_id, fields in entries:
        assert fields.pop("engine") == ""
        pairs = chain.from_iterable(fields.items())
        await redis.execute_command(  # type: ignore[no-untyped-call] # redis-py has no type for it
            "XADD", own.outbox, entry_id, *pairs
        )
    assert await redis.exists(engine_id(DEFAULT_ENGINE)) == 0
    return [OutboxEntry.parse(item, entry_id, fields) for entry_id, fields in entries]


async def publish(bootstrap: str, item: str, entries: list[OutboxEntry]) -> None:
    """Publish events as the previous version does: without an engine."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
    await producer.start()
    try:
        for entry in entries:
            event = events.Event.of(item, entry.reservation_id, entry.record, entry.snapshot)
            assert b"engine" not in events.encode(event)
            await producer.send_and_wait(
                events.topic(), events.encode(event), event.reservation_id.encode()
            )
    finally:
        await producer.stop()


async def commit_recorded(bootstrap: str, database_url: str) -> None:
    """Store and commit that everything in the topic is recorded, without an owner."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, group_id=events.consumer_group(), enable_auto_commit=False
    )
    await consumer.start()
    try:
        partitions = [TopicPartition(events.topic(), number) for number in range(12)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        await consumer.commit(ends)
    finally:
        await consumer.stop()
    async with connection(database_url) as ledger:
        await ledger.executemany(
            "INSERT INTO kafka_offsets VALUES ($1, $2, $3)",
            [(tp.topic, tp.partition, end) for tp, end in ends.items()],
        )


async def test_an_engine_of_the_previous_version_is_upgraded_in_the_middle_of_a_sale(
    tmp_path: Path,
    database_url: str,
    item: str,
    start: Callable[[Addresses], tuple[ApiServer, ConsumerServer]],
) -> None:
    """60 reservations are recorded, 20 are only in Kafka, and 20 are only in the outbox."""
    with RedisServer(tmp_path / "redis") as redis, KafkaServer(tmp_path / "kafka") as kafka:
        addresses = Addresses(redis.url, kafka.bootstrap, database_url)
        await topics.create(KafkaSettings(kafka_bootstrap=kafka.bootstrap))
        client = redis_client.connect(redis.url)
        inventory = Inventory(client)
        try:
            entries = await old_sale(inventory, item, 300, 100)
            await old_ledger(database_url, item, 300, entries[:60])
            await publish(kafka.bootstrap, item, entries[:60])
            await commit_recorded(kafka.bootstrap, database_url)
            await publish(kafka.bootstrap, item, entries[60:80])
            await Outbox(client).settle(
                item,
                [
                    (entry.entry_id, entry.reservation_id, entry.record.version)
                    for entry in entries[:80]
                ],
            )

            api, _ = await asyncio.to_thread(start, addresses)
            journal = await stampede([api.url], crowd(item, range(200)), connections=20, tries=5)
            assert {entry.status for entry in journal.entries} == {202}
            assert "rebuilt" not in await apply(addresses, item, 300)
            last = await stampede([api.url], crowd(item, range(500)), connections=20, tries=5)
            assert {entry.status for entry in last.entries} == {202, 409}
            journal.entries += last.entries
            await sold_exactly(addresses, item, journal, 300)

            own = str(await ledger_value(addresses, "SELECT id FROM engine"))
            sale = (await inventory.sales([item]))[item]
            assert (sale.engine, await inventory.index.engine_id()) == (own, own)
            assert await Log(kafka.bootstrap, "flashsale").owner() == own
        finally:
            await client.aclose()
        assert await dead_letters(addresses) == 0
        async with connection(database_url) as ledger:
            rows = await ledger.fetch(
                "SELECT reservation_id::text AS id FROM reservations WHERE state = 'confirmed'"
            )
            found = await ledger.fetchrow("SELECT name, redis_address FROM engine")
        assert {entry.reservation_id for entry in entries} <= {row["id"] for row in rows}
        assert found is not None
        assert found["name"] == "flashsale"
        assert found["redis_address"] is not None
