"""aiokafka survives connections that have just closed. Needs Kafka."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import uvloop
from aiokafka import conn
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.metadata import MetadataRequest

from dev.stack.servers import KafkaServer
from flashsale_api import connections
from flashsale_consumer import clients
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


@pytest.mark.parametrize(
    "survive", [connections.survive_closed_connections, clients.survive_closed_connections]
)
def test_a_write_to_a_connection_that_was_just_reset_fails_as_an_outage(
    survive: Callable[[], None], kafka_server: KafkaServer, monkeypatch: pytest.MonkeyPatch
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

    monkeypatch.setattr(conn, "AIOKafkaConnection", conn.AIOKafkaConnection)  # ends with the test
    survive()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        failure = runner.run(write_until_it_fails())
    assert isinstance(failure, KafkaConnectionError)
    assert "the handler is closed" in str(failure.__cause__)
