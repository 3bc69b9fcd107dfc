"""The worker without Kafka, and its clients that are replaced or end: nothing is lost."""

import asyncio
import gc
import signal
from asyncio import Transport
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path

import pytest
import trustme
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.cluster import ClusterMetadata
from aiokafka.conn import AIOKafkaConnection
from aiokafka.protocol.metadata import MetadataRequest

from dev.stack.ports import free_port
from dev.stack.servers import KafkaServer
from flashsale.events import Event
from flashsale.settings import KafkaSettings
from flashsale_consumer import worker
from flashsale_consumer.metrics import Metrics
from flashsale_consumer.settings import Settings
from tests.support.consumer import Log, Process, Running, accepted, running
from tests.support.eventually import until
from tests.support.ledgers import Ledger
from tests.support.topics import administering


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


@pytest.mark.parametrize("task", ["_fetcher._fetch_task", "_client._sync_task"])
async def test_clients_of_which_a_task_has_ended_are_replaced(
    task: str, ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The member of the group and the announcer's reader. aiokafka does not report such an end."""
    start = AIOKafkaConsumer.start
    starts = Counter[str | None]()

    async def start_and_end(client: AIOKafkaConsumer) -> None:
        await start(client)
        starts[client._group_id] += 1
        if starts[client._group_id] == 1:
            attrgetter(task)(client).cancel()

    def announced(member: Running) -> float:
        return member.value("flashsale_consumer_announced_total")

    first, second = accepted(), accepted()
    async with running(ledger.url, log) as member:
        await log.write(first)
        await until(lambda: announced(member) == 1)
    await ledger.pool.execute("UPDATE kafka_offsets SET announced_offset = 0")
    monkeypatch.setattr(AIOKafkaConsumer, "start", start_and_end)
    monkeypatch.setattr(worker, "ANSWER_SECONDS", 1_000)  # no other reason replaces them
    async with running(ledger.url, log) as member:
        await log.write(second)
        await ledger.until_has(second)
        await until(lambda: announced(member) == 2)
    assert starts.keys() == {log.group_id, None}
    assert min(starts.values()) >= 2


@pytest.mark.slow
async def test_a_consumer_without_partitions_finds_brokers_whose_addresses_have_changed(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka asks only the brokers that it knows. The settings name the new address, too."""
    monkeypatch.setattr(worker, "ANSWER_SECONDS", 15.0)
    with KafkaServer(tmp_path / "kafka") as kafka:
        moved = KafkaServer(kafka.data, free_port())
        log = Log(f"{kafka.bootstrap},{moved.bootstrap}")
        async with running(ledger.url, log, partitions=1) as one:
            await until(lambda: one.partitions() == 1)
            async with running(ledger.url, log, partitions=1) as other:
                await until(lambda: other.worker.joined)
                await until(lambda: one.partitions() + other.partitions() == 1)
                [idle] = [each for each in (one, other) if not each.partitions()]
                kafka.stop()
                with moved:
                    up = 'flashsale_consumer_server_up{server="kafka"}'
                    await until(lambda: idle.value(up) == 0)
                    await until(lambda: idle.value(up) == 1)


@pytest.mark.slow
async def test_a_partition_without_a_leader_does_not_stop_the_others(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flashsale_consumer")
    leader, sold = ClusterMetadata.leader_for_partition, [accepted(number) for number in range(24)]

    def known(cluster: ClusterMetadata, tp: TopicPartition) -> int | None:
        """Return the leader as the client learns it from Kafka while a broker is away."""
        return -1 if tp == (log.topic, 3) else leader(cluster, tp)

    async def write(events: Sequence[Event]) -> None:
        for partition, event in enumerate(events):
            if partition != 3:
                await log.write(event, partition=partition)

    async with running(ledger.url, log) as one:
        await until(lambda: one.partitions() == 12)
        monkeypatch.setattr(ClusterMetadata, "leader_for_partition", known)
        monkeypatch.setattr(worker, "CHECK_SECONDS", 0.1)
        await until(lambda: one.value('flashsale_consumer_server_up{server="kafka"}') == 0)
        await write(sold[:12])
        await ledger.until_has(*sold[:3], *sold[4:12])
        await until(lambda: one.partitions() == 11)
        async with running(ledger.url, log) as other:
            await until(lambda: one.partitions() + other.partitions() == 11)
            await write(sold[12:24])
            await ledger.until_has(*sold[12:15], *sold[16:24])
        await until(lambda: one.partitions() == 11)
        assert f"{log.topic}: partitions [3] have no leader" in caplog.text
        monkeypatch.undo()
        await log.write(sold[3], partition=3)
        await ledger.until_has(sold[3])
        await until(lambda: one.partitions() == 12)
        assert f"{log.topic}: partitions [3] have a leader again" in caplog.text
        await until(lambda: one.value('flashsale_consumer_server_up{server="kafka"}') == 1)


async def test_events_that_kafka_deleted_before_they_were_recorded_are_counted(
    ledger: Ledger, log: Log
) -> None:
    first, *lost, last = [accepted(number) for number in range(4)]
    await log.create()
    async with running(ledger.url, log):
        await log.write(first, partition=0)
        await ledger.until_has(first)
    await log.write(*lost, last, partition=0)
    async with administering(log.bootstrap) as admin:
        await admin.delete_records({TopicPartition(log.topic, 0): RecordsToDelete(3)})
    async with running(ledger.url, log) as member:
        await ledger.until_has(last)
        assert member.value("flashsale_consumer_deleted_events_total") == 2
    assert not await ledger.has(lost[0])


@pytest.mark.slow
async def test_a_consumer_without_partitions_is_connected_again_after_an_outage(
    ledger: Ledger, tmp_path_factory: pytest.TempPathFactory
) -> None:
    up = 'flashsale_consumer_server_up{server="kafka"}'
    with KafkaServer(tmp_path_factory.mktemp("spare-kafka")) as kafka:
        log = Log(kafka.bootstrap)
        async with (
            running(ledger.url, log, partitions=1) as one,
            running(ledger.url, log, partitions=1) as other,
        ):
            await until(lambda: one.partitions() + other.partitions() == 1)
            await until(lambda: one.value(up) == other.value(up) == 1)
            kafka.stop()
            await until(lambda: one.value(up) == other.value(up) == 0)
            kafka.start()
            await until(lambda: one.partitions() + other.partitions() == 1)
            await until(lambda: one.value(up) == other.value(up) == 1)


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


@pytest.mark.parametrize("started", range(3), ids=["topics", "facts and owner", "member"])
async def test_a_worker_stopped_while_a_client_starts_leaves_no_connection_open(
    started: int, ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has sent its first request for metadata, see filterwarnings in pyproject.toml."""
    transports: list[Transport] = []
    first = asyncio.Event()
    send = AIOKafkaConnection.send

    def noted(
        connection: AIOKafkaConnection, request: object, expect_response: bool = True
    ) -> object:
        if isinstance(request, MetadataRequest) and request._topics == []:
            transports.append(connection._writer.transport)
            if len(transports) > started:
                first.set()
        return send(connection, request, expect_response)

    monkeypatch.setattr(AIOKafkaConnection, "send", noted)
    async with running(ledger.url, log):
        await first.wait()
    assert len(transports) == started + 1

    def closed() -> bool:
        gc.collect()  # a cycle can hold a connection that only its destructor can close
        return all(transport.is_closing() for transport in transports)

    await until(closed)


async def test_a_certificate_that_is_wrong_after_its_renewal_is_an_outage(
    ledger: Ledger, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted, refused = tmp_path / "ca.pem", 0
    trustme.CA().cert_pem.write_to_path(trusted)
    settings = Settings(
        kafka_bootstrap=log.bootstrap,
        kafka_tls=True,
        kafka_ca_file=str(trusted),
        database_url=ledger.url,
        engine=log.engine,
    )
    trusted.write_text("half a certificate")
    made = KafkaSettings.kafka_client

    def counted(own: KafkaSettings) -> dict[str, object]:
        nonlocal refused
        refused += 1
        return made(own)

    monkeypatch.setattr(KafkaSettings, "kafka_client", counted)
    working = asyncio.create_task(worker.Worker(settings, Metrics()).run())
    await until(lambda: refused >= 2 or working.done(), "the worker tries again")
    assert not working.done()
    working.cancel()
    with suppress(asyncio.CancelledError):
        await working


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
