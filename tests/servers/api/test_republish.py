"""Reservations that Kafka acknowledged and lost are published again from Redis."""

import asyncio
import os
import subprocess
import sys
import uuid
from collections import Counter

import pytest
from aiokafka import AIOKafkaConsumer
from redis.asyncio import Redis

from dev.stack.servers import KafkaServer, RedisServer
from flashsale import events
from flashsale.events import Event
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale.reservations import BatchReply, Request
from flashsale.sale import SaleSpec
from flashsale.settings import KafkaSettings
from flashsale_api.republish import PAGE
from flashsale_consumer import topics

pytestmark = pytest.mark.slow


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {f"FLASHSALE_{name}": value for name, value in environment.items()}
    return subprocess.run(
        [sys.executable, "-m", "flashsale_api.republish", *arguments],
        env={name: value for name, value in os.environ.items() if "FLASHSALE" not in name} | own,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


async def published(kafka: KafkaServer, item: str) -> list[Event]:
    """Every event of the item on the topic."""
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.subscribe([events.TOPIC])
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


async def test_what_redis_has_is_published_again_and_again(
    stock: Inventory,
    outbox: Outbox,
    redis: Redis,
    redis_server: RedisServer,
    kafka_server: KafkaServer,
    item: str,
) -> None:
    kafka = KafkaSettings(kafka_bootstrap=kafka_server.bootstrap)
    await topics.create(kafka, events.TOPIC, events.DEAD_LETTER_TOPIC)
    many = PAGE + 7  # more than are read at once
    await stock.apply(SaleSpec(f"default/{item}", item, many + 5), 3, seed_until_ms=2**53)
    wanted = [
        Request(str(uuid.uuid4()), f"user{number}", 1, f"key{number}" if number % 2 else "")
        for number in range(many)
    ]
    for first in range(0, many, 100):
        reply = await stock.reserve(item, wanted[first : first + 100], timeout_seconds=10)
        assert isinstance(reply, BatchReply)
        # As if Kafka had acknowledged them: the outbox lets go.
        entries = zip(reply.answers, wanted[first : first + 100], strict=True)
        await outbox.settle(item, [(answer.detail, it.reservation_id) for answer, it in entries])
    assert await outbox.lengths([item]) == {item: 0}
    before = await redis.hgetall(f"flashsale:{{{item}}}:sale")

    environment = {"REDIS_URL": redis_server.url, "KAFKA_BOOTSTRAP": kafka_server.bootstrap}
    for times in (1, 2):
        done = await asyncio.to_thread(command, item, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{item}: {many} reservations published again")
        found = await published(kafka_server, item)
        assert Counter(event.reservation_id for event in found) == {
            request.reservation_id: times for request in wanted
        }
    by_id = {event.reservation_id: event for event in found}
    for request in wanted:
        event = by_id[request.reservation_id]
        assert (event.user_id, event.quantity) == (request.user_id, request.quantity)
        assert (event.request_key or "") == request.request_key
        assert (event.state, event.version, event.sale_id) == ("accepted", 1, f"default/{item}")
        assert (event.allocated, event.capacity, event.revision) == (many + 5, many + 5, 3)
    assert await redis.hgetall(f"flashsale:{{{item}}}:sale") == before


def test_what_cannot_be_done_is_said(redis_server: RedisServer, item: str) -> None:
    nobody = {"REDIS_URL": redis_server.url, "KAFKA_BOOTSTRAP": "127.0.0.1:1"}
    for arguments, environment, code, words in (
        (["--help"], {}, 0, "Publishes every reservation"),
        ([], nobody, 2, "item"),
        ([item], {"REDIS_URL": redis_server.url}, 2, "FLASHSALE_KAFKA_BOOTSTRAP is not set"),
        ([item], nobody, 1, "Kafka is away, run it again"),
    ):
        done = command(*arguments, **environment)
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


async def test_a_sale_that_redis_does_not_have_is_not_published(
    redis_server: RedisServer, kafka_server: KafkaServer, item: str
) -> None:
    done = await asyncio.to_thread(
        command, item, REDIS_URL=redis_server.url, KAFKA_BOOTSTRAP=kafka_server.bootstrap
    )
    assert done.returncode == 1
    assert f"{item}: Redis has no sale of this item" in done.stderr
