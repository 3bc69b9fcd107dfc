"""`flashsalectl republish` publishes the reservations of a sale again, from Redis."""

import asyncio
import uuid
from collections import Counter
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from redis.asyncio import Redis

from dev.stack.servers import KafkaServer, RedisServer
from flashsale import events, ledger, schema
from flashsale.events import Event
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Outbox
from flashsale.reservations import BatchReply, Request
from flashsale.sale import SaleSpec
from flashsale.settings import KafkaSettings
from flashsale_consumer import topics
from flashsale_operator.ctl.commands import run
from flashsale_operator.sales import engine
from tests.support.redis_users import OPERATOR, url_of
from tests.support.topics import administering

PAGE = 500
"""Reservations per page of `Inventory.reservation_pages`."""


def environ(redis_server: RedisServer, kafka: str) -> dict[str, str]:
    return {
        "FLASHSALE_REDIS_URL": url_of(redis_server, OPERATOR),
        "FLASHSALE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "FLASHSALE_KAFKA_BOOTSTRAP": kafka,
    }


async def published(kafka: KafkaServer, item: str) -> list[Event]:
    """Return all events of the item on the topic."""
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.subscribe([events.topic()])
        found: list[Event] = []
        async with asyncio.timeout(60):
            while not consumer.assignment():
                await asyncio.sleep(0.05)
            ends = await consumer.end_offsets(consumer.assignment())
            for tp, end in ends.items():
                while await consumer.position(tp) < end:
                    for records in (await consumer.getmany(tp, timeout_ms=500)).values():
                        found += [events.decode(record.value) for record in records]
    finally:
        await consumer.stop()
    return [event for event in found if event.item_id == item]


async def sell_one(redis: Redis, item: str) -> None:
    inventory = Inventory(redis)
    await inventory.apply(SaleSpec(f"default/{item}", item, 5), 1, seed_until_ms=2**53)
    await inventory.reserve(item, [Request(str(uuid.uuid4()), "ann", 1)], timeout_seconds=10)


@pytest.mark.slow
async def test_a_missing_topic_is_left_to_the_consumer(
    tmp_path: Path,
    redis: Redis,
    redis_server: RedisServer,
    item: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A broker that creates the topic gives it one partition and a retention of its own."""
    await sell_one(redis, item)
    with KafkaServer(tmp_path / "kafka", options={"auto.create.topics.enable": "true"}) as kafka:
        variables = environ(redis_server, kafka.bootstrap)
        assert await asyncio.to_thread(run, ["republish", item], variables) == 1
        assert "Kafka does not show the topic" in capsys.readouterr().err
        async with administering(kafka.bootstrap) as admin:
            assert events.topic() not in await admin.list_topics()


@pytest.mark.slow
async def test_all_reservations_are_published_again_by_each_run(
    redis: Redis,
    redis_server: RedisServer,
    kafka_server: KafkaServer,
    item: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inventory = Inventory(redis)
    kafka = KafkaSettings(kafka_bootstrap=kafka_server.bootstrap)
    await topics.create(kafka)
    many = PAGE + 7
    await inventory.apply(SaleSpec(f"default/{item}", item, many + 5), 3, seed_until_ms=2**53)
    requests = [
        Request(str(uuid.uuid4()), f"user{number}", 1, f"key{number}" if number % 2 else "")
        for number in range(many)
    ]
    for first in range(0, many, 100):
        batch = requests[first : first + 100]
        reply = await inventory.reserve(item, batch, timeout_seconds=10)
        assert isinstance(reply, BatchReply)
        # Settle the entries as if Kafka had acknowledged the events.
        entries = zip(reply.answers, batch, strict=True)
        await Outbox(redis).settle(
            item, [(answer.detail, request.reservation_id, 1) for answer, request in entries]
        )
    before = await redis.hgetall(ItemKeys.of(item).sale)

    for times in (1, 2):
        variables = environ(redis_server, kafka_server.bootstrap)
        assert await asyncio.to_thread(run, ["republish", item], variables) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith(f"{item}: {many} reservations published again")
        assert printed.err == ""
        found = await published(kafka_server, item)
        assert Counter(event.reservation_id for event in found) == {
            request.reservation_id: times for request in requests
        }
    by_id = {event.reservation_id: event for event in found}
    for request in requests:
        event = by_id[request.reservation_id]
        assert (event.user_id, event.quantity) == (request.user_id, request.quantity)
        assert (event.request_key or "") == request.request_key
        assert (event.state, event.version, event.sale_id) == ("confirmed", 1, f"default/{item}")
        assert (event.allocated, event.capacity, event.revision) == (many + 5, many + 5, 3)
    assert await redis.hgetall(ItemKeys.of(item).sale) == before


async def test_without_kafka_the_error_is_one_line(
    redis: Redis, redis_server: RedisServer, item: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await Inventory(redis).apply(SaleSpec(f"default/{item}", item, 5), 1, seed_until_ms=2**53)
    variables = environ(redis_server, "127.0.0.1:1")
    assert await asyncio.to_thread(run, ["republish", item], variables) == 1
    error = capsys.readouterr().err
    assert error.startswith("flashsalectl: Kafka is away, run it again: ")
    assert error.count("\n") == 1


@pytest.mark.slow
async def test_a_fenced_sale_is_not_published(
    redis: Redis,
    redis_server: RedisServer,
    kafka_server: KafkaServer,
    item: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its keys may be an older copy, with reservations that a rebuild has dropped."""
    await sell_one(redis, item)
    await redis.hset(ItemKeys.of(item).sale, "run_id", "an earlier run")
    variables = environ(redis_server, kafka_server.bootstrap)
    assert await asyncio.to_thread(run, ["republish", item], variables) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"flashsalectl: {item}: the sale is fenced: rebuild it first\n"


def test_a_sale_that_redis_does_not_have_is_not_published(
    redis_server: RedisServer, item: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["republish", item], environ(redis_server, "127.0.0.1:1")) == 1
    assert f"{item}: Redis has no sale of this item" in capsys.readouterr().err


@pytest.mark.slow
async def test_nothing_is_published_to_the_kafka_of_another_engine(
    redis: Redis,
    redis_server: RedisServer,
    kafka_server: KafkaServer,
    database_url: str,
    item: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A shell names the servers of another installation. A confirmation there would be lost."""
    name = f"shop-{uuid.uuid4().hex[:8]}"
    settings = KafkaSettings(kafka_bootstrap=kafka_server.bootstrap, engine=name)
    await topics.create(settings)
    decisive = TopicPartition(events.topic(name), 0)
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka_server.bootstrap,
        group_id=events.consumer_group(name),
        enable_auto_commit=False,
    )
    await consumer.start()
    consumer.assign([decisive])
    await consumer.commit({decisive: (0, events.owner_metadata("another"))})
    await consumer.stop()
    pool = await ledger.connect(database_url)
    await schema.migrate(pool)
    inventory, reservation = Inventory(redis, name), str(uuid.uuid4())
    own = await engine.claimed_id(inventory, pool)
    await pool.close()
    spec = SaleSpec(f"default/{item}", item, 5, hold_seconds=60)
    await inventory.apply(spec, 1, engine_id=own, seed_until_ms=2**53)
    await inventory.reserve(item, [Request(reservation, "ann", 1)], timeout_seconds=10)
    variables = environ(redis_server, kafka_server.bootstrap) | {
        "FLASHSALE_DATABASE_URL": database_url,
        "FLASHSALE_ENGINE": name,
    }
    for command in (
        ["republish", item],
        ["confirm", item, reservation, "--order-ref", "order-1"],
        ["cancel", item, reservation],
    ):
        assert await asyncio.to_thread(run, command, variables) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "in this Kafka belongs to engine another, but the sale to engine" in printed.err
    sale = (await inventory.sales([item]))[item]
    assert (sale.held, sale.released, sale.outbox_length) == (1, 0, 1)
