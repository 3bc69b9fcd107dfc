"""Closed connections, cancellations and unsent batches of Kafka's clients. Needs Kafka."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import uvloop
from aiokafka import AIOKafkaProducer, TopicPartition, conn
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaConnectionError, KafkaError
from aiokafka.protocol.metadata import MetadataRequest

from dev.stack.servers import KafkaServer
from flashsale import kafka_clients
from flashsale.settings import KafkaSettings
from flashsale_api.engine import GroupOwner
from flashsale_consumer import clients, topics
from flashsale_operator.sales import offsets
from tests.support.consumer import Log
from tests.support.eventually import until
from tests.support.wire import Wire, reset


@asynccontextmanager
async def proxied(bootstrap: str) -> AsyncIterator[tuple[int, list[Wire]]]:
    """Relay connections to a broker. Yield the proxy's port, and its clients' connections."""
    host, _, port = bootstrap.partition(":")
    clients: list[Wire] = []
    writers: list[asyncio.StreamWriter] = []
    async with asyncio.TaskGroup() as pumps:

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            with suppress(ConnectionError):
                while data := await reader.read(65_536):
                    writer.write(data)

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            clients.append(Wire(reader, writer))
            from_broker, to_broker = await asyncio.open_connection(host, int(port))
            pumps.create_task(pump(reader, to_broker))
            pumps.create_task(pump(from_broker, writer))

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1], clients
        finally:
            server.close()
            for writer in writers:
                writer.transport.abort()


async def test_a_client_that_cannot_connect_in_time_is_not_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A broker that stands still answers later. By then, its caller has forgotten the client."""
    monkeypatch.setattr(kafka_clients, "CLOSE_SECONDS", 0.05)
    asked = asyncio.Event()

    async def stand_still(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        asked.set()
        await reader.read()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(stand_still, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()[:2]
        before = asyncio.all_tasks()
        client = clients.reader(KafkaSettings(kafka_bootstrap=f"{host}:{port}"))
        starting = asyncio.create_task(clients.start(client))
        async with asyncio.timeout(30):
            await asked.wait()
            starting.cancel()
            await asyncio.wait([starting])
        assert starting.cancelled()
        await kafka_clients.close("the client", client.stop())
        await until(lambda: asyncio.all_tasks() <= before)
    gc.collect()
    assert not caplog.records


def test_a_write_to_a_connection_that_was_just_reset_fails_as_an_outage(
    kafka_server: KafkaServer,
) -> None:
    """A busy process writes in the turn of the loop before aiokafka notices the reset."""

    async def write_until_it_fails() -> Exception:
        async with proxied(kafka_server.bootstrap) as (port, clients):
            connection = await conn.create_conn("127.0.0.1", port)
            reset(clients[0])
            sent = []
            try:
                while True:
                    request = connection.send(MetadataRequest([]))
                    sent.append(asyncio.ensure_future(request))
                    await asyncio.sleep(0)
            except Exception as error:  # noqa: BLE001 - the test compares it
                await asyncio.gather(*sent, return_exceptions=True)
                return error
            finally:
                connection.close()

    kafka_clients.adapt_aiokafka()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        failure = runner.run(write_until_it_fails())
    assert isinstance(failure, KafkaConnectionError)
    assert "the handler is closed" in str(failure.__cause__)


async def administer(kafka: KafkaSettings) -> None:
    async with clients.admin(kafka):
        pass


async def discard(kafka: KafkaSettings) -> None:
    producer = AIOKafkaProducer(**kafka.kafka_client())
    await producer.start()
    await kafka_clients.close("the producer", kafka_clients.discard(producer))


async def test_a_client_that_fails_to_close_is_logged_with_the_kind_of_its_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A producer of aiokafka can raise a KeyError of a batch. Its text is only an address."""

    async def stop() -> None:
        raise KeyError(object())

    await kafka_clients.close("the producer", stop())
    assert "the producer: not closed cleanly: KeyError(" in caplog.text


@pytest.mark.parametrize(
    "call",
    [
        topics.create_recorded,
        administer,
        discard,
        lambda kafka: GroupOwner(kafka).read(),
        offsets.spans,
        lambda kafka: offsets.require_own(kafka, "engine-id"),
    ],
)
async def test_a_call_obeys_a_cancellation_while_it_closes_its_client(
    call: Callable[[KafkaSettings], Awaitable[object]],
    kafka_server: KafkaServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that goes on after it can run for ever. aiokafka itself swallows it."""
    close = AIOKafkaClient.close
    closing: list[asyncio.Task[object]] = []

    async def close_while_cancelled(client: AIOKafkaClient) -> None:
        if not closing:
            asyncio.get_running_loop().call_soon(task.cancel)
        if (closer := asyncio.current_task()) is not None:
            closing.append(closer)
        await close(client)

    log = Log(kafka_server.bootstrap)
    await log.create()
    monkeypatch.setattr(AIOKafkaClient, "close", close_while_cancelled)
    kafka = KafkaSettings(kafka_bootstrap=log.bootstrap, engine=log.engine)
    task = asyncio.ensure_future(call(kafka))
    await asyncio.wait([task])
    await asyncio.wait(closing)
    assert closing
    assert task.cancelled()


@pytest.mark.parametrize("repeated", [False, True])
async def test_a_discarded_producer_drops_its_unsent_batches_and_logs_nothing(
    repeated: bool, kafka_server: KafkaServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A repeated batch was sent once, failed, and waits to be sent again."""
    log = Log(kafka_server.bootstrap)
    await log.create()
    producer = AIOKafkaProducer(bootstrap_servers=kafka_server.bootstrap)
    await producer.start()
    await producer.send_and_wait(log.topic, b"{}", partition=0)
    caplog.clear()
    batch = producer.create_batch()
    batch.append(key=None, value=b"{}", timestamp=None)
    waiting = await producer.send_batch(batch, log.topic, partition=0)
    if repeated:
        accumulator = producer._message_accumulator
        accumulator.reenqueue(accumulator._pop_batch(TopicPartition(log.topic, 0)))
    await kafka_clients.close("the producer", kafka_clients.discard(producer))
    with pytest.raises(KafkaError, match="discarded"):
        await waiting
    del producer, batch, waiting
    gc.collect()
    assert not caplog.text
