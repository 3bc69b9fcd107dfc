"""The publisher on topics that other people configure. Needs Redis and Kafka."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from redis.asyncio import Redis

from dev.stack.servers import KafkaServer
from flashsale import events
from flashsale.outbox import Outbox
from flashsale.reservations import OutboxEntry, Record, Snapshot, State
from flashsale.settings import KafkaSettings
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher
from flashsale_consumer import topics
from tests.support.eventually import until
from tests.support.producers import silence_first
from tests.support.topics import administering, create_topic


@dataclass
class Publishing:
    """A publisher of an engine that only this test has."""

    publisher: Publisher
    metrics: Metrics

    def add(self, number: int, user_id: str = "ann", accepted_ms: int = 1_795_561_067_887) -> None:
        for n in range(number):
            record = Record(State.CONFIRMED, 1, 1, accepted_ms, user_id, "")
            snapshot = Snapshot("default/phone", 9, 9, 1)
            self.publisher.add(
                OutboxEntry("phone", "", f"01a208bd-5117-7f0d-b8d8-{n:012}", record, snapshot, "")
            )

    def published(self) -> int:
        return int(
            self.metrics.registry.get_sample_value("flashsale_api_events_published_total") or 0
        )

    def failures(self) -> int:
        name = "flashsale_api_publish_failures_total"
        return int(self.metrics.registry.get_sample_value(name) or 0)


@asynccontextmanager
async def publishing(bootstrap: str, engine: str, redis: Redis) -> AsyncIterator[Publishing]:
    metrics = Metrics()
    publisher = Publisher(
        KafkaSettings(kafka_bootstrap=bootstrap, engine=engine),
        Outbox(redis, engine),
        metrics,
        Engine(engine),
    )
    tasks = [asyncio.create_task(publisher.run()), asyncio.create_task(publisher.settler.run())]
    yield Publishing(publisher, metrics)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def create(bootstrap: str, engine: str, *, max_message_bytes: int) -> None:
    limit = {"max.message.bytes": str(max_message_bytes)}
    await create_topic(bootstrap, events.topic(engine), 3, limit)


async def test_a_batch_that_is_too_large_for_the_topic_is_split(
    kafka_server: KafkaServer, redis: Redis, new_item: Callable[[], str]
) -> None:
    engine = new_item()
    await create(kafka_server.bootstrap, engine, max_message_bytes=8_000)
    async with publishing(kafka_server.bootstrap, engine, redis) as own:
        own.add(2_000)
        await until(lambda: own.published() == 2_000, own.published)
        assert own.failures() == 0


async def test_only_an_event_that_is_too_large_waits_for_a_larger_limit(
    kafka_server: KafkaServer,
    redis: Redis,
    new_item: Callable[[], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = new_item()
    await create(kafka_server.bootstrap, engine, max_message_bytes=550)
    async with publishing(kafka_server.bootstrap, engine, redis) as own:
        own.publisher.add(
            OutboxEntry(
                "phone",
                "1-1",
                "01a208bd-5117-7f0d-b8d8-4e8e9760b87e",
                Record(State.CONFIRMED, 1, 1, 1_795_561_067_887, "u" * 128, "k" * 128),
                Snapshot("default/phone", 9, 9, 1),
                "",
            )
        )
        own.add(50)
        await until(lambda: own.published() == 50, own.published)
        assert own.publisher.held == 1
    [line] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "01a208bd-5117-7f0d-b8d8-4e8e9760b87e is larger than the topic" in line.message
    assert "max.message.bytes" in line.message


async def test_an_event_that_was_too_large_is_published_once_the_limit_is_raised(
    kafka_server: KafkaServer,
    redis: Redis,
    new_item: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next sweep finds its entry. A rebuild would otherwise wait for this pod for ever."""
    monkeypatch.setattr("flashsale_api.publisher.SET_ASIDE_SECONDS", 0.1)
    engine = new_item()
    await create(kafka_server.bootstrap, engine, max_message_bytes=100)
    async with publishing(kafka_server.bootstrap, engine, redis) as own:
        own.add(1)
        await until(lambda: own.failures() == 1)
        await until(lambda: own.publisher.held == 0)
        assert own.publisher.unacknowledged == 0
        async with administering(kafka_server.bootstrap) as admin:
            raised = {"max.message.bytes": "1000000"}
            topic = ConfigResource(ConfigResourceType.TOPIC, events.topic(engine), raised)
            await admin.alter_configs([topic])

        def swept() -> bool:
            own.add(1)
            return own.published() > 0

        await until(swept)


async def test_a_producer_without_acknowledgements_is_replaced(
    kafka_server: KafkaServer,
    redis: Redis,
    new_item: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """aiokafka sends to a broker that was killed again and again."""
    engine = new_item()
    await create(kafka_server.bootstrap, engine, max_message_bytes=1_000_000)
    silence_first(monkeypatch, "send_batch", events.topic(engine))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashsale_api.publisher.BATCH_SECONDS", 1.0)
        async with publishing(kafka_server.bootstrap, engine, redis) as own:
            own.add(10)
            await until(lambda: own.failures() > 0)
            patch.undo()
            await until(lambda: own.published() == 10, own.published)


async def test_the_api_leaves_the_topic_to_the_consumer(tmp_path: Path, redis: Redis) -> None:
    """By default, a broker creates a topic that is asked for, with one partition."""
    options = {"auto.create.topics.enable": "true"}
    with KafkaServer(tmp_path / "kafka", options=options) as kafka:
        async with (
            publishing(kafka.bootstrap, "shop", redis) as own,
            administering(kafka.bootstrap) as admin,
        ):
            own.add(10)
            await until(lambda: own.failures() > 2, own.failures)
            assert events.topic("shop") not in await admin.list_topics()
            await create(kafka.bootstrap, "shop", max_message_bytes=1_000_000)
            await until(lambda: own.published() == 10, own.published)
            [described] = await admin.describe_topics([events.topic("shop")])
            assert len(described["partitions"]) == 3


@pytest.mark.parametrize("hours", [-8 * 24, 2])
async def test_a_topic_of_the_consumer_dates_events_by_kafkas_clock(
    kafka_server: KafkaServer,
    redis: Redis,
    new_item: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    hours: int,
) -> None:
    begun = time.time()
    kafka = KafkaSettings(kafka_bootstrap=kafka_server.bootstrap, engine=new_item())
    await topics.create(kafka)
    monkeypatch.setattr("flashsale_api.publisher.time", other_clock(hours))
    async with publishing(kafka_server.bootstrap, kafka.engine, redis) as own:
        own.add(1)
        await until(lambda: own.published() == 1, own.failures)
    assert int(begun * 1000) <= await first_time(kafka) <= time.time() * 1000


async def test_a_pod_whose_clock_is_wrong_says_so_on_a_topic_of_other_people(
    kafka_server: KafkaServer,
    redis: Redis,
    new_item: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = new_item()
    await create(kafka_server.bootstrap, engine, max_message_bytes=1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr("flashsale_api.publisher.time", other_clock(2))
        async with publishing(kafka_server.bootstrap, engine, redis) as own:
            own.add(1)
            await until(lambda: own.failures() > 0)
            assert "Kafka refuses the time of this machine's clock" in caplog.text
            patch.undo()
            await until(lambda: own.published() == 1, own.failures)


@pytest.mark.parametrize("hours", [-8 * 24, 2])
async def test_an_event_of_another_time_is_published_like_any_other(
    kafka_server: KafkaServer, redis: Redis, new_item: Callable[[], str], hours: int
) -> None:
    """Kafka deletes records by their time, and refuses one that is an hour ahead."""
    begun = time.time()
    kafka = KafkaSettings(kafka_bootstrap=kafka_server.bootstrap, engine=new_item())
    await create(kafka_server.bootstrap, kafka.engine, max_message_bytes=1_000_000)
    async with publishing(kafka_server.bootstrap, kafka.engine, redis) as own:
        own.add(1, accepted_ms=int((begun + hours * 3600) * 1000))
        await until(lambda: own.published() == 1, own.failures)
    assert int(begun * 1000) <= await first_time(kafka) <= time.time() * 1000


def other_clock(hours: int) -> SimpleNamespace:
    return SimpleNamespace(time=lambda: time.time() + hours * 3600)


async def first_time(kafka: KafkaSettings) -> int:
    """Return the time of a topic's first record in Unix milliseconds."""
    async with AIOKafkaConsumer(
        events.topic(kafka.engine),
        bootstrap_servers=kafka.kafka_bootstrap,
        auto_offset_reset="earliest",
    ) as reader:
        record = await asyncio.wait_for(reader.getone(), 30)
    return int(record.timestamp)
