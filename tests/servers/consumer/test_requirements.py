"""The consumer with servers that other people configure. Needs PostgreSQL and Kafka."""

import logging
import uuid

import aiokafka.codec
import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.cluster import ClusterMetadata

from dev.stack.servers import KafkaServer, PostgresServer
from flashsale import events
from flashsale.settings import KafkaSettings
from flashsale_consumer import clients, worker
from tests.support.consumer import Log, accepted, running
from tests.support.eventually import until
from tests.support.ledgers import Ledger
from tests.support.topics import administering, create_topic


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_a_compressed_topic_is_read(
    ledger: Ledger, kafka_server: KafkaServer, codec: str
) -> None:
    log = Log(kafka_server.bootstrap)
    await create_topic(log.bootstrap, log.topic, 1, {"compression.type": codec})
    sold = [accepted(number) for number in range(100)]
    await log.write(*sold)
    async with running(ledger.url, log) as member:
        await ledger.until_has(*sold)
        assert not member.worker.conflict


async def test_a_codec_that_is_not_installed_is_a_mistake_and_no_outage(
    ledger: Ledger,
    kafka_server: KafkaServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(worker, "REFUSED_SECONDS", 0.1)
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.001)  # most fetches take longer
    log = Log(kafka_server.bootstrap)
    await create_topic(log.bootstrap, log.topic, 1, {"compression.type": "zstd"})
    sold = accepted()
    await log.write(sold)
    joins = clients.group_member
    attempts = []

    def join(kafka: KafkaSettings, group_id: str) -> AIOKafkaConsumer:
        attempts.append(group_id)
        return joins(kafka, group_id)

    monkeypatch.setattr(clients, "group_member", join)
    async with running(ledger.url, log) as member:
        with monkeypatch.context() as patch:
            patch.setattr(aiokafka.codec, "has_zstd", lambda: False)
            await until(lambda: "the package cramjam" in member.worker.conflict)
            await until(lambda: len(attempts) > 3)
            assert member.worker.conflict
        await ledger.until_has(sold)
        assert not member.worker.conflict
    errors = [each.message for each in caplog.records if each.levelno == logging.ERROR]
    assert len([line for line in errors if "cramjam" in line]) == 1


async def test_the_consumer_warns_of_a_topic_with_few_partitions_and_a_short_retention(
    ledger: Ledger, kafka_server: KafkaServer, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log(kafka_server.bootstrap)
    await create_topic(log.bootstrap, log.topic, 1, {"retention.ms": "3600000"})
    sold = accepted()
    await log.write(sold)
    async with running(ledger.url, log):
        await ledger.until_has(sold)
    warnings = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert [line for line in warnings if "only 1 of the topic, but needs 12" in line]
    assert [line for line in warnings if "retention.ms=3600000" in line]
    assert [line for line in warnings if "retention.bytes=-1" in line]


async def test_the_consumer_creates_its_topics_with_the_given_number_of_partitions(
    ledger: Ledger, kafka_server: KafkaServer
) -> None:
    log = Log(kafka_server.bootstrap)
    names = {log.topic, log.dead_letter_topic, events.recorded_topic(log.engine)}
    async with running(ledger.url, log, partitions=3), administering(log.bootstrap) as admin:

        async def created() -> bool:
            return names <= set(await admin.list_topics())

        await until(created, "the topics are created")
        described = await admin.describe_topics(sorted(names))
    assert [len(each["partitions"]) for each in described] == [3, 3, 3]


async def test_the_consumer_warns_of_a_topic_with_fewer_partitions_than_its_setting(
    ledger: Ledger, kafka_server: KafkaServer, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log(kafka_server.bootstrap)
    await log.create()
    async with running(ledger.url, log, partitions=24) as member:
        await until(lambda: member.worker.joined)
    warnings = [each.message for each in caplog.records if "partitions" in each.message]
    assert [line for line in warnings if "only 12 of the topic, but needs 24" in line]


async def test_the_consumer_does_not_warn_of_its_own_topics(
    ledger: Ledger, kafka_server: KafkaServer, caplog: pytest.LogCaptureFixture
) -> None:
    log = Log(kafka_server.bootstrap)
    async with running(ledger.url, log) as member:
        await until(lambda: member.worker.joined)
    assert not [each for each in caplog.records if "but needs" in each.message]


async def test_a_consumer_with_a_wrong_database_says_so_once_and_goes_on_when_it_is_right(
    postgres_server: PostgresServer,
    log: Log,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "REFUSED_SECONDS", 0.1)
    name = f"latin_{uuid.uuid4().hex}"
    latin = f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE_PROVIDER libc LOCALE 'C'"
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f"{latin} TEMPLATE template0")
    url = f"{postgres_server.url.rpartition('/')[0]}/{name}"
    try:
        async with running(url, log) as member:
            await until(lambda: member.worker.conflict)
            assert "PostgreSQL has encoding LATIN1, but needs" in member.worker.conflict
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
            await admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
            await until(lambda: member.worker.joined and not member.worker.conflict)
        errors = [each.message for each in caplog.records if each.levelno == logging.ERROR]
        assert [line for line in errors if "LATIN1" in line] == errors
        assert len(errors) == 1
    finally:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.close()


async def test_a_kafka_without_a_controller_is_an_outage(
    ledger: Ledger,
    kafka_server: KafkaServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log, sold = Log(kafka_server.bootstrap), accepted()
    with monkeypatch.context() as patch:
        nobody = property(lambda _: None, lambda *_: None)
        patch.setattr(ClusterMetadata, "controller", nobody, raising=False)
        async with running(ledger.url, log):
            await until(lambda: "no controller" in caplog.text)
            patch.undo()
            await log.write(sold)
            await ledger.until_has(sold)
