"""One connection on a real socket: its memory, its end, and the requests that it ignores."""

import asyncio
import gc
import json
import re
import resource
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import uvicorn
import uvloop
from starlette.applications import Starlette
from uvicorn.server import ServerState

from flashsale_api import descriptors, protocol
from flashsale_api import reserve as reserve_module
from flashsale_api import turns as turns_module
from flashsale_api.app import Application
from flashsale_api.batcher import Batcher
from flashsale_api.engine import Engine
from flashsale_api.limits import (
    FIELD_BYTES,
    MAX_HEAD_BYTES,
    MAX_PIPELINED,
    PIECE_BYTES,
    REQUEST_BYTES,
    UNREAD_BYTES,
)
from flashsale_api.metrics import Metrics
from flashsale_api.protocol import HttpProtocol
from flashsale_api.reserve import MAX_BODY_BYTES, Reserve
from flashsale_api.sales import Sales
from flashsale_api.servers import server_of
from tests.support.batcher import HeldInventory, RecordingPublisher
from tests.support.eventually import until

BODY = b'{"userId":"ann","itemId":"x","quantity":1}'
GOOD = b"POST /reserve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GOOD += b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
BAD = GOOD.replace(b'"quantity"', b'"quantite"')


class Client:
    """The client of a connection, with the connection's server side."""

    def __init__(self, connection: HttpProtocol, end: socket.socket) -> None:
        self.connection, self._socket = connection, end

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)
        await asyncio.sleep(0.01)

    async def answers(self) -> list[int]:
        """Return the statuses of the answers so far, and a final 0 if the connection was closed."""
        await asyncio.sleep(0.05)
        loop, heads = asyncio.get_running_loop(), b""
        try:
            while True:
                async with asyncio.timeout(0.05):
                    read = await loop.sock_recv(self._socket, 65536)
                if not read:
                    break
                heads += read
        except TimeoutError:
            closed = []
        else:
            closed = [0]
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", heads)] + closed


@pytest.fixture(autouse=True)
def turns_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the bytes that a test hands over parsed at once, on a slow machine, too."""
    monkeypatch.setattr(turns_module, "TURN_SECONDS", float("inf"))


@pytest.fixture
def turns_without_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "TURN_SECONDS", 0)


@asynccontextmanager
async def connected(
    inventory: HeldInventory, timeout_keep_alive: int = 75
) -> AsyncIterator[Client]:
    metrics = Metrics()
    batcher = Batcher(inventory, RecordingPublisher(), metrics, Engine("flashsale"))
    reserve = Reserve(batcher, metrics)
    config = uvicorn.Config(
        Application(reserve, Sales(inventory, Engine("flashsale")), Starlette()),
        http=HttpProtocol,
        ws="none",
        log_config=None,
        proxy_headers=False,
        timeout_keep_alive=timeout_keep_alive,
    )
    config.load()
    connection = HttpProtocol(config=config, server_state=ServerState(), app_state={})
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(lambda: connection, sock=ours)
    try:
        yield Client(connection, theirs)
    finally:
        transport.abort()
        await asyncio.sleep(0)
        theirs.close()


async def test_a_closed_connection_is_freed_without_the_garbage_collector() -> None:
    """A connection is in no reference cycle, so it does not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        async with connected(HeldInventory()) as client:
            await client.send(BAD + BAD)
            assert await client.answers() == [422, 422]
            gone = weakref.ref(client.connection)
        del client
        await asyncio.sleep(0.01)
        assert gone() is None
    finally:
        gc.enable()


async def test_a_body_that_is_too_large_is_dropped_and_the_keep_alive_timer_restarts() -> None:
    async with connected(HeldInventory(), timeout_keep_alive=1) as client:
        size = MAX_BODY_BYTES + 10
        head = GOOD.removesuffix(BODY).replace(b"Length: %d" % len(BODY), b"Length: %d" % size)
        await client.send(head)
        await client.send(b"a" * (size - 5))
        assert await client.answers() == [413]
        await client.send(b"a" * 5)
        await client.send(BAD)
        assert await client.answers() == [422]
        await client.send(head)
        await client.send(b"a" * (size - 5))
        await client.send(b"a" * 5)
        assert await client.answers() == [413]
        assert await until(client.answers) == [0]


@pytest.mark.usefixtures("turns_without_time")
async def test_bytes_that_wait_for_a_later_turn_count_and_are_parsed_in_their_order() -> None:
    async with connected(HeldInventory()) as client, connected(HeldInventory()) as other:
        for each, size in ((client, 100), (other, 200)):
            each.connection.data_received(BAD + LONG + b"y" * size)
        assert HttpProtocol.unfinished == 2 * len(BAD + LONG) + 300
        assert not client.connection._completed
        assert await client.answers() == [422]
        await client.send(b"\r\n\r\n" + BAD)
        assert await client.answers() == [405, 422]
        assert await other.answers() == [422]
    assert HttpProtocol.unfinished == 0


@pytest.mark.usefixtures("turns_without_time")
async def test_bytes_that_may_not_wait_are_parsed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd of whole requests would otherwise be reset because it waits."""
    monkeypatch.setattr(protocol, "MAX_UNFINISHED_BYTES", len(BAD) - 1)
    async with connected(HeldInventory()) as client:
        client.connection.data_received(BAD)
        assert await client.answers() == [422]


async def test_pipelined_requests_share_the_time_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = HeldInventory()
    async with connected(inventory) as client, connected(inventory) as other:
        clients = (client, other)
        for each in clients:
            each.connection.data_received(GOOD + BAD * 3)
        monkeypatch.setattr(turns_module, "TURN_SECONDS", 0)
        inventory.go.release()
        inventory.go.release()
        waiting = [6]
        async with asyncio.timeout(60):
            while waiting[-1]:
                await asyncio.sleep(0)
                waiting.append(sum(len(each.connection._waiting) for each in clients))
        assert {before - after for before, after in pairwise(waiting)} == {0, 1}
        for each in clients:
            assert await each.answers() == [202, 422, 422, 422]


@pytest.mark.usefixtures("turns_without_time")
async def test_a_server_that_stops_answers_requests_that_wait_for_a_later_turn() -> None:
    async with connected(HeldInventory()) as client:
        client.connection.data_received(BAD)
        client.connection.shutdown()
        assert await client.answers() == [422, 0]


@pytest.mark.usefixtures("turns_without_time")
async def test_a_client_that_goes_while_its_bytes_wait_is_forgotten() -> None:
    async with connected(HeldInventory()) as client:
        client.connection.data_received(GOOD)
        client.connection._abort()
        await asyncio.sleep(0.01)
        assert not client.connection._completed
    assert HttpProtocol.unfinished == 0


async def test_a_client_that_goes_while_its_request_waits_for_redis_is_forgotten() -> None:
    inventory = HeldInventory()
    async with connected(inventory) as client:
        await client.send(GOOD)
        waiting = client.connection._current
        assert waiting is not None
        client.connection._abort()
        await until(lambda: waiting.answered)
        inventory.go.release()


LONG = b"GET /reserve HTTP/1.1\r\nHost: x\r\nA: "


@pytest.mark.parametrize("before", [b"", BAD, BAD * 3], ids=["alone", "second", "fourth"])
@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["without an end", "complete"])
async def test_the_limit_of_a_head_holds_behind_other_requests(before: bytes, end: bytes) -> None:
    async with connected(HeldInventory()) as client:
        client.connection.data_received(before + LONG + b"y" * 60_000 + end)
        assert await client.answers() == [422] * before.count(BAD) + [405] * bool(end)
    async with connected(HeldInventory()) as client:
        client.connection.data_received(before + LONG + b"y" * 100_000 + end)
        assert await client.answers() == [422] * before.count(BAD) + [431, 0]


@pytest.mark.parametrize("before", [b"", BAD], ids=["alone", "second"])
async def test_a_half_head_counts_also_behind_another_request(before: bytes) -> None:
    async with connected(HeldInventory()) as client:
        client.connection.data_received(before + LONG + b"y" * 60_000)
        assert 60_000 < HttpProtocol.unfinished < 60_000 + 2 * PIECE_BYTES
    assert HttpProtocol.unfinished == 0


async def test_a_body_behind_another_request_lowers_no_count() -> None:
    head = GOOD.removesuffix(BODY).replace(b"Length: %d" % len(BODY), b"Length: 1000000")
    async with connected(HeldInventory()) as client:
        client.connection.data_received(BAD + head + b"z" * 200_000)
        assert 0 <= HttpProtocol.unfinished < 2 * PIECE_BYTES
        client.connection.data_received(b"z" * 200_000)
        assert 0 <= HttpProtocol.unfinished < 2 * PIECE_BYTES
        assert await client.answers() == [422, 413]


async def test_the_objects_of_waiting_requests_count_until_they_are_answered() -> None:
    request = BAD.replace(b"Host", b"A: b\r\n" * 50 + b"Host")
    inventory = HeldInventory()
    async with connected(inventory) as client:
        client.connection.data_received(GOOD)
        assert HttpProtocol.unfinished == 0
        client.connection.data_received(request * MAX_PIPELINED)
        objects = REQUEST_BYTES + 53 * FIELD_BYTES
        assert 0 < HttpProtocol.unfinished - MAX_PIPELINED * objects < MAX_HEAD_BYTES
        inventory.go.release()
        assert await client.answers() == [202] + [422] * MAX_PIPELINED
        assert HttpProtocol.unfinished == 0


async def test_waiting_requests_share_the_limit_of_a_head() -> None:
    request = BAD.replace(b"Host", b"A: %b\r\nHost" % (b"a" * 30_000))
    inventory = HeldInventory()
    async with connected(inventory) as client:
        client.connection.data_received(GOOD + request * 3)
        inventory.go.release()
        assert await client.answers() == [202, 422, 422, 400, 0]


async def test_a_client_is_asked_for_its_body_after_the_answers_before() -> None:
    head = GOOD.removesuffix(BODY).replace(b"Host", b"Expect: 100-continue\r\nHost")
    inventory = HeldInventory()
    async with connected(inventory) as client:
        await client.send(GOOD + head)
        assert await client.answers() == []
        inventory.go.release()
        assert await client.answers() == [202, 100]
        inventory.go.release()
        await client.send(BODY)
        assert await client.answers() == [202]


async def test_a_request_that_waits_for_redis_keeps_nothing_that_was_sent() -> None:
    """Clients could otherwise fill the memory of a pod while Redis is silent."""
    inventory = HeldInventory()
    async with connected(inventory) as client:
        client.connection.data_received(GOOD.replace(b"Host", b"A: %b\r\nHost" % (b"a" * 60_000)))
        await until(lambda: inventory.calls)
        waiting = client.connection._current
        assert waiting is not None
        assert waiting.size() == 0
        inventory.go.release()
        assert await client.answers() == [202]


async def test_a_client_too_large_is_forgotten_before_the_loop_reads_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "MAX_UNFINISHED_BYTES", 10_000)
    async with connected(HeldInventory()) as client:
        client.connection.data_received(GOOD + BAD * MAX_PIPELINED)
        assert HttpProtocol.unfinished == 0
        assert await client.answers() == [0]


async def test_bytes_behind_those_for_which_a_client_is_reset_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "MAX_UNFINISHED_BYTES", UNREAD_BYTES - 1)
    async with connected(HeldInventory()) as client:
        client.connection.data_received(BAD * 4_000)  # the kernel takes only some of the answers
        assert client.connection._last
        assert HttpProtocol.unfinished == 0


async def test_unread_answers_count_until_they_are_read() -> None:
    async with connected(HeldInventory()) as client:
        sent = 0
        while HttpProtocol.unfinished == 0:
            client.connection.data_received(BAD)
            sent += 1
        assert HttpProtocol.unfinished >= UNREAD_BYTES
        assert await client.answers() == [422] * sent
        assert HttpProtocol.unfinished == 0


async def test_requests_after_the_last_answer_of_a_connection_are_ignored() -> None:
    inventory = HeldInventory()
    async with connected(inventory) as client:
        await client.send(BAD[:-5])
        client.connection.shutdown()
        await client.send(BAD[-5:] + GOOD)
        assert await client.answers() == [422, 0]
        assert inventory.calls == []


async def test_a_request_before_the_shutdown_is_answered() -> None:
    inventory = HeldInventory()
    async with connected(inventory) as client:
        await client.send(GOOD)
        client.connection.shutdown()
        inventory.go.release()
        assert await client.answers() == [202, 0]


async def test_a_server_that_stops_closes_after_the_answer_to_a_body_that_is_too_large() -> None:
    """The rest of the body may never come."""
    size = MAX_BODY_BYTES + 10
    head = GOOD.removesuffix(BODY).replace(b"Length: %d" % len(BODY), b"Length: %d" % size)
    async with connected(HeldInventory()) as client:
        await client.send(head)
        await client.send(b"a" * (size - 5))
        assert await client.answers() == [413]
        client.connection.shutdown()
        assert await client.answers() == [0]


async def test_an_answer_restarts_the_keep_alive_timer() -> None:
    inventory = HeldInventory()
    # One check is the whole time.
    async with connected(inventory, timeout_keep_alive=10) as client:
        await client.send(GOOD)
        client.connection._check_client()
        inventory.go.release()
        assert await client.answers() == [202]
        client.connection._check_client()
        assert await client.answers() == []
        client.connection._check_client()
        assert await client.answers() == [0]


async def test_a_client_that_does_not_read_gets_no_further_answers_until_it_reads() -> None:
    """Otherwise, the process would keep all of them."""
    async with connected(HeldInventory()) as client:
        sent = 0
        while not client.connection._unread:
            client.connection.data_received(BAD)
            sent += 1
        client.connection.data_received(BAD)
        client.connection._go_on()
        assert len(client.connection._waiting) == 1
        assert await client.answers() == [422] * (sent + 1)


async def test_a_client_too_many_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "most_connections", lambda: 0)
    async with connected(HeldInventory()) as client:
        assert await client.answers() == [0]
    monkeypatch.undo()
    async with connected(HeldInventory()) as client:
        await client.send(BAD)
        assert await client.answers() == [422]


@pytest.mark.parametrize(
    ("limit", "buyers", "orders"), [(65_536, 63_488, 1_024), (1_024, 512, 256), (256, 128, 64)]
)
def test_clients_leave_descriptors_to_the_process(
    monkeypatch: pytest.MonkeyPatch, limit: int, buyers: int, orders: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert descriptors.most_connections() == buyers
    assert descriptors.most_order_connections() == orders


@pytest.mark.parametrize(
    ("files", "buyers"),
    [
        ({"memory.max": "max\n"}, 63_488),
        ({"memory.max": f"{512 * 1024**2}\n"}, 32_768),
        ({"memory.limit_in_bytes": f"{256 * 1024**2}\n"}, 16_384),
        ({}, 63_488),
    ],
    ids=["no limit", "512 MiB", "256 MiB", "no container"],
)
def test_idle_clients_leave_memory_to_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], buyers: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    places = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    limits = [(1_024, resource.RLIM_INFINITY)]
    monkeypatch.setattr(descriptors, "_MEMORY_LIMITS", places)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.append(wanted))
    descriptors.set_limit()
    assert descriptors.most_connections() == buyers


async def test_a_failure_is_answered_500_and_the_connection_stays_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reserve_module, "_answer", json.loads)  # raises TypeError for a decision
    inventory = HeldInventory()
    async with connected(inventory) as client:
        inventory.go.release()
        await client.send(GOOD)
        assert await client.answers() == [500]
        monkeypatch.undo()
        inventory.go.release()
        await client.send(GOOD)
        assert await client.answers() == [202]


def test_a_turn_accepts_several_clients() -> None:
    clients = 40

    async def serve() -> int:
        """Return the turns of the loop until all clients are connected."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=clients)
        server = server_of(Starlette(), *listener.getsockname())
        serving = asyncio.create_task(server.serve([listener]))
        await until(lambda: server.started)
        ends = [socket.create_connection(listener.getsockname()) for _ in range(clients)]
        turns = 0
        async with asyncio.timeout(60):
            while len(server.server_state.connections) < clients:
                await asyncio.sleep(0)
                turns += 1
        for end in ends:
            end.close()
        server.should_exit = True
        await serving
        return turns

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(serve()) < clients / 2
