"""The HTTP server for health checks and metrics, and clients that misuse it."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest
import uvloop

from flashsale import monitoring
from flashsale.monitoring import MAX_CONNECTIONS, Answer, Scrapes, line, serving
from flashsale.sockets import bound
from tests.support.eventually import until
from tests.support.wire import GET, Wire, connection, reset

LARGE = b"x" * 16_000_000


async def healthz() -> Answer:
    return line("alive")


async def large() -> Answer:
    return Answer(200, LARGE)


async def failing() -> Answer:
    raise RuntimeError("secret")


@asynccontextmanager
async def served(handlers: Mapping[str, monitoring.Handler]) -> AsyncIterator[int]:
    """Serve and yield the port."""
    (listener,) = bound("LISTEN", "127.0.0.1:0")
    port = listener.getsockname()[1]
    async with serving([listener], handlers):
        yield port


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with served({"/healthz": healthz, "/large": large, "/failing": failing}) as port:
        yield port


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "EXCHANGE_SECONDS", 0.5)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection reaches its deadline."""
    monkeypatch.setattr(monitoring, "EXCHANGE_SECONDS", 600)


async def exchange(port: int, data: bytes) -> bytes:
    """Send bytes, and return all bytes of the answer."""
    async with connection(port) as wire:
        wire.send(data)
        return await wire.rest()


async def test_paths_are_answered(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        answer = await client.get("/healthz?verbose")
        assert (answer.status_code, answer.text) == (200, "alive\n")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        head = await client.head("/healthz")
        assert (head.status_code, head.headers["content-length"], head.text) == (200, "6", "")
        assert (await client.get("/large")).content == LARGE
        assert (await client.get("/nothing")).status_code == 404
        refused = await client.post("/healthz", content=b"x")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
        failed = await client.get("/failing")
        assert failed.status_code == 500
        assert "secret" not in failed.text


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"GET /healthz\r\n\r\n", 400),
        (b"GET  /healthz HTTP/1.1\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
        (b"GET /\xff\x00 HTTP/1.1\r\n\r\n", 404),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 10_000 + b"\r\n\r\n", 431),
        (GET * 100, 200),
    ],
)
async def test_odd_requests_are_answered_once(port: int, data: bytes, status: int) -> None:
    answer = await exchange(port, data)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.usefixtures("impatient")
async def test_silent_and_slow_clients_are_reset(port: int) -> None:
    async with connection(port) as silent, connection(port) as half, connection(port) as slow:
        half.send(GET[:-2])

        async def drip() -> None:
            slow.send(GET[:5])
            while True:
                slow.send(b"x")
                await slow.writer.drain()
                await asyncio.sleep(0.01)

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(drip(), 30)
        for wire in (silent, half, slow):
            assert await wire.rest() == b""


@pytest.mark.usefixtures("impatient")
async def test_a_client_that_does_not_read_is_reset(port: int) -> None:
    async with connection(port) as wire:
        wire.stop_reading()
        wire.send(GET.replace(b"healthz", b"large"))
        await asyncio.sleep(2 * monitoring.EXCHANGE_SECONDS)
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined] # it is a Transport
        assert len(await wire.rest()) < len(LARGE) / 2


async def test_a_half_closed_connection_gets_its_answer(port: int) -> None:
    for request, status in ((GET, 200), (GET[:-1], 0)):
        async with connection(port) as wire:
            wire.send(request)
            wire.writer.write_eof()
            assert await wire.status() == status


@pytest.mark.usefixtures("patient")
async def test_more_connections_than_allowed_close_the_oldest(port: int) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(30):
        wires: list[Wire] = [
            await stack.enter_async_context(connection(port)) for _ in range(3 * MAX_CONNECTIONS)
        ]
        assert (await exchange(port, GET)).startswith(b"HTTP/1.1 200 ")
        for wire in wires[: 2 * MAX_CONNECTIONS]:
            assert await wire.rest() == b""
        wires[-1].send(GET)
        assert await wires[-1].status() == 200


async def test_the_end_closes_open_connections() -> None:
    async with AsyncExitStack() as stack:
        async with served({"/healthz": healthz}) as port:
            wire = await stack.enter_async_context(connection(port))
            assert (await exchange(port, GET)).startswith(b"HTTP/1.1 200 ")
        assert await wire.rest() == b""
        with pytest.raises(ConnectionError):
            await exchange(port, GET)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_client_that_resets_while_its_answer_is_made_leaves_no_traceback(
    new_loop: Callable[[], asyncio.AbstractEventLoop], caplog: pytest.LogCaptureFixture
) -> None:
    """A scrape can wait for a second. A closed connection of uvloop raises a RuntimeError."""

    async def leave() -> None:
        asked, gone = asyncio.Event(), asyncio.Event()

        async def slow() -> Answer:
            asked.set()
            await gone.wait()
            return line("text")

        async with served({"/healthz": slow}) as port:
            async with connection(port) as wire:
                wire.send(GET)
                await asked.wait()
                reset(wire)
            await asyncio.sleep(0.2)  # the server's loop notices the reset
            gone.set()
            await asyncio.sleep(0.1)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(leave())
    gc.collect()
    assert not caplog.text


async def test_scrapes_at_the_same_time_share_a_text_made_after_they_began() -> None:
    generated = 0
    running, go_on = threading.Event(), threading.Event()

    def generate() -> bytes:
        nonlocal generated
        generated += 1
        running.set()
        go_on.wait(30)
        return b"text %d" % generated

    scrapes = Scrapes(generate)
    first = asyncio.create_task(scrapes.answer())
    await until(running.is_set, "the first text is being made")
    later = [asyncio.create_task(scrapes.answer()) for _ in range(50)]
    await asyncio.sleep(0)
    later[0].cancel()
    go_on.set()
    assert (await first).body == b"text 1"
    assert {(await each).body for each in later[1:]} == {b"text 2"}
    assert (await scrapes.answer()).body == b"text 3"
