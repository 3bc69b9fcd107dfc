"""Connections that try to exhaust the memory or the descriptors of a pod. Needs Redis.

Each attack is sent as raw bytes. A pod's resident memory is read from /proc while it runs.
"""

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, nullcontext, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dev.services import Addresses, ApiServer
from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.sale import Sale
from flashsale_api.descriptors import CLIENT_BYTES
from flashsale_api.limits import (
    MAX_PIPELINED,
    MAX_UNFINISHED_BYTES,
    REQUEST_SECONDS,
    UNREAD_BYTES,
)
from tests.support.api import OWN_SALE
from tests.support.eventually import until
from tests.support.wire import (
    CHUNKED,
    GET,
    POST,
    Wire,
    connection,
    forget_peak,
    peak,
    reserve,
    resident,
    stopped,
)

GROWTH_BYTES = 64 * 1024 * 1024
"""Growth of resident memory that an attack may cause. Without limits each causes 100 MB to 1 GB."""


ENDLESS = {
    "trailers": (CHUNKED + b"1\r\n{\r\n0\r\n", b"a:\r\n" * 4_000),
    "long trailers": (CHUNKED + b"1\r\n{\r\n0\r\n", b"a: " + b"b" * 8_000 + b"\r\n"),
    "one endless trailer": (CHUNKED + b"1\r\n{\r\n0\r\na: ", b"b" * 16_000),
    "header fields": (b"GET / HTTP/1.1\r\n", b"a:\r\n" * 4_000),
    "one endless header": (b"GET / HTTP/1.1\r\na: ", b"b" * 16_000),
    "one endless path": (b"GET /", b"b" * 16_000),
    "chunk extensions": (CHUNKED, b"1;" + b"a" * 16_000 + b"\r\n{\r\n"),
    "one endless chunk extension": (CHUNKED + b"1;", b"a" * 16_000),
    "tiny chunks": (CHUNKED, b"1\r\n{\r\n" * 3_000),
    "blank lines": (b"", b"\r\n" * 8_000),
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_a_request_without_an_end_costs_little_memory_and_is_closed(
    api: ApiServer, untouched: Sale, name: str
) -> None:
    del untouched
    begin, more = ENDLESS[name]
    before = resident(api)

    async def send_on(wire: Wire) -> None:
        wire.send(begin)
        while True:
            wire.send(more)
            await wire.writer.drain()
            assert resident(api) - before < GROWTH_BYTES

    async with connection(api) as wire:
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(send_on(wire), 3 * REQUEST_SECONDS)


@pytest.mark.parametrize(
    "half",
    [
        b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 30_000,
        b"GET / HTTP/1.1\r\na: " + b"b" * 60_000,
        POST + b"Content-Length: 16000\r\n\r\n" + b"{" * 15_000,
        CHUNKED + b"3e80\r\n" + b"{" * 15_000,
        POST + b"Content-Length: 15\r\n\r\n" + GET * 2_000,
    ],
    ids=["fields", "a long field", "bodies", "chunks", "pipelined requests"],
)
async def test_four_hundred_half_requests_cost_little_memory(
    api: ApiServer, untouched: Sale, half: bytes
) -> None:
    del untouched
    before = resident(api)
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connection(api)) for _ in range(400)]
        for wire in wires:
            wire.send(half)
        async with connection(api) as other:
            other.send(GET)
            assert await other.status() == 200
        assert resident(api) - before < GROWTH_BYTES + 400 * 100_000


@pytest.mark.parametrize("at_once", [False, True], ids=["as they arrive", "all in one turn"])
async def test_half_requests_of_thousands_of_clients_take_bounded_memory(
    api: ApiServer, at_once: bool
) -> None:
    """Without the bound they take 257 MB. Those above it are reset, and others are served.

    A process that was stopped reads from all clients in one turn of its loop.
    """
    half = b"GET / HTTP/1.1\r\na: " + b"b" * 60_000
    forget_peak(api)
    before = peak(api)
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connection(api)) for _ in range(4_000)]
        with stopped(api) if at_once else nullcontext():
            for wire in wires:
                wire.send(half)
                await asyncio.sleep(0)
        async with connection(api) as other:
            other.send(GET)
            assert await other.status() == 200
        await until(lambda: any(wire.reader.at_eof() or wire.reader.exception() for wire in wires))
        assert peak(api) - before < 2 * GROWTH_BYTES
    async with connection(api) as later:
        later.send(half[:1_000])
        later.send(b"\r\nHost: x\r\n\r\n")
        assert await later.status() == 200


async def test_a_client_that_is_not_accepted_keeps_few_bytes_in_the_kernel(api: ApiServer) -> None:
    address = urlsplit(api.url)
    sent = 0
    with stopped(api), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least
        client.settimeout(0.5)
        client.connect((address.hostname, address.port))
        with suppress(TimeoutError):
            while sent <= UNREAD_BYTES:
                sent += client.send(bytes(1024))
    assert 0 < sent <= UNREAD_BYTES


@pytest.mark.slow
async def test_clients_that_do_not_read_are_reset(api: ApiServer, untouched: Sale) -> None:
    """Takes 20 s, which is the longest time that the API waits for a reader."""
    del untouched
    description = GET.replace(b"/healthz", b"/openapi.json")
    before = resident(api)

    async def flood(wire: Wire) -> None:
        wire.stop_reading()
        for _ in range(1_000):
            wire.send(description * MAX_PIPELINED)
            await asyncio.sleep(0.1)
            if wire.writer.transport.is_closing():
                return
        raise AssertionError("the connection is still open")

    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connection(api)) for _ in range(120)]
        floods = [asyncio.create_task(flood(wire)) for wire in wires]
        while not all(task.done() for task in floods):
            assert resident(api) - before < GROWTH_BYTES + 120 * 500_000
            await asyncio.sleep(0.2)
        await asyncio.gather(*floods)


async def reading_nothing(stack: AsyncExitStack, api: ApiServer, clients: int) -> list[Wire]:
    """Connect clients that send a full pipeline of requests and read no answer."""
    description = GET.replace(b"/healthz", b"/openapi.json")
    wires = [await stack.enter_async_context(connection(api)) for _ in range(clients)]
    for wire in wires:
        wire.stop_reading()
        wire.send(description * MAX_PIPELINED)
        await asyncio.sleep(0)
    return wires


async def test_unread_answers_cost_little_memory_of_the_kernel(
    api: ApiServer, untouched: Sale
) -> None:
    """Without a limit, a buffer of the kernel grows to 4 MB."""
    del untouched
    async with AsyncExitStack() as stack:
        wires = await reading_nothing(stack, api, 10)
        await until(lambda: sum(size > 0 for size in unread_bytes(api)) == len(wires))
        await asyncio.sleep(0.5)
        assert max(unread_bytes(api)) <= UNREAD_BYTES


async def test_unread_answers_of_many_clients_take_bounded_memory(
    api: ApiServer, untouched: Sale
) -> None:
    """Clients above the bound are reset, and others are served."""
    del untouched
    async with AsyncExitStack() as stack:
        await reading_nothing(stack, api, 1_500)
        await until(lambda: len(unread_bytes(api)) < MAX_UNFINISHED_BYTES / UNREAD_BYTES + 100)
        assert sum(unread_bytes(api)) < MAX_UNFINISHED_BYTES
        async with connection(api) as other:
            other.send(GET)
            assert await other.status() == 200


def unread_bytes(api: ApiServer) -> list[int]:
    """Return the bytes of answers that the kernel keeps for each client of the pod."""
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]]
    return [
        int(queues.partition(":")[0], 16)
        for _, local, _, state, queues, *_ in sockets
        if state == "01" and int(local.partition(":")[2], 16) == api.port
    ]


async def test_an_idle_client_takes_as_little_memory_as_the_limit_of_clients_supposes(
    stopping: ApiServer,
) -> None:
    """The other half of `CLIENT_BYTES` is for the kernel."""
    before, clients = resident(stopping), 2_000
    async with AsyncExitStack() as stack:
        for _ in range(clients):
            wire = await stack.enter_async_context(connection(stopping))
            wire.send(GET)
            assert await wire.status() == 200
        assert resident(stopping) - before < clients * CLIENT_BYTES * 3 / 4


async def test_connections_leave_descriptors_to_the_process(
    own_api: ApiServer, own_redis: RedisServer
) -> None:
    """Without them, a pod can neither be scraped nor reach Redis again."""
    assert own_api.pid is not None
    limit = 300
    resource.prlimit(own_api.pid, resource.RLIMIT_NOFILE, (limit, limit))
    admin = redis_client.connect(own_redis.url)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(admin.aclose)
        served = []
        for _ in range(limit):
            with suppress(ConnectionError):  # the API resets a client too many
                wire = await stack.enter_async_context(connection(own_api))
                wire.send(GET)
                if await wire.status() == 200:
                    served.append(wire)
        assert 0 < len(served) <= limit / 2
        scrape = await stack.enter_async_context(
            connection(urlsplit(own_api.metrics_url).port or 0)
        )
        scrape.send(GET.replace(b"/healthz", b"/metrics"))
        assert await scrape.status() == 200
        await admin.client_kill_filter(_type="normal", skipme=True)

        async def bought() -> bool:
            served[0].send(reserve(OWN_SALE.item_id))
            return await served[0].status() == 202

        await until(bought)
        for wire in served:
            wire.writer.close()

        async def healthy() -> bool:
            async with connection(own_api) as wire:
                wire.send(GET)
                return await wire.status() == 200

        await until(healthy, ignoring=(ConnectionError,))


async def test_clients_of_both_ports_leave_descriptors_to_the_process(
    tmp_path: Path, without_kafka: Addresses
) -> None:
    limit = 300
    with ApiServer(tmp_path, without_kafka, order_tokens="t" * 32) as server:
        assert server.pid is not None
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, limit))
        ports = [urlsplit(url).port or 0 for url in (server.url, server.orders_url)]
        served = dict.fromkeys(ports, 0)
        async with AsyncExitStack() as stack:
            for port in [each for each in ports for _ in range(limit)]:
                with suppress(ConnectionError):  # the API resets a client too many
                    wire = await stack.enter_async_context(connection(port))
                    wire.send(GET)
                    served[port] += await wire.status() > 0
            assert list(served.values()) == [limit // 2, limit // 4]
            scrape = await stack.enter_async_context(
                connection(urlsplit(server.metrics_url).port or 0)
            )
            scrape.send(GET.replace(b"/healthz", b"/metrics"))
            assert await scrape.status() == 200
        server.kill()  # a graceful stop would wait for Kafka


async def test_buyers_take_no_memory_from_the_order_port(
    tmp_path: Path, without_kafka: Addresses
) -> None:
    """Many HTTP clients send the head and the body of a call apart. In between, the call counts."""
    token = b"t" * 32
    call = GET.replace(b"/healthz", b"/openapi.json")[:-2]
    with ApiServer(tmp_path, without_kafka, order_tokens=token.decode()) as server:
        port = urlsplit(server.orders_url).port or 0
        async with AsyncExitStack() as stack:
            # Ever smaller requests fill the space that each reset leaves.
            for size, clients in ((60_000, 1_200), (8_000, 50), (1_000, 50), (100, 50), (10, 50)):
                for _ in range(clients):
                    wire = await stack.enter_async_context(connection(server))
                    wire.send(b"GET / HTTP/1.1\r\na: " + b"b" * size)
                    await asyncio.sleep(0)
                await asyncio.sleep(0.2)
            answered = []
            for _ in range(10):
                async with connection(port) as wire:
                    wire.send(call)
                    await asyncio.sleep(0.02)
                    with suppress(ConnectionError):  # the API has reset it
                        wire.send(b"Authorization: Bearer " + token + b"\r\n\r\n")
                    answered.append(await wire.status())
            assert answered == [200] * 10
        server.kill()  # a graceful stop would wait for Kafka


@pytest.fixture
async def stopping(
    api: ApiServer, tmp_path: Path, without_kafka: object
) -> AsyncIterator[ApiServer]:
    """An API process that only this test uses."""
    del api
    server = ApiServer(tmp_path / "stopping", without_kafka)  # type: ignore[arg-type] # Addresses
    await asyncio.to_thread(server.start)
    yield server
    server.kill()


async def test_a_client_that_does_not_read_does_not_delay_the_end_of_a_pod(
    stopping: ApiServer,
) -> None:
    async with connection(stopping) as wire:
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined] # it is a Transport
        for _ in range(100):
            wire.send(GET.replace(b"/healthz", b"/openapi.json") * MAX_PIPELINED)
            await asyncio.sleep(0.01)
        await asyncio.to_thread(stopping.stop)
    log = stopping.log.read_text("utf-8")
    assert "Traceback" not in log
    assert "Cancel" not in log


async def test_an_idle_connection_keeps_no_head(api: ApiServer) -> None:
    head = b"GET /sales/bad:item HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 60_000 + b"\r\n\r\n"
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connection(api)) for _ in range(1_500)]
        before = resident(api)
        for wire in wires:
            wire.send(head)
            await wire.reader.readuntil(b"\r\n\r\n")
        assert resident(api) - before < GROWTH_BYTES / 2
