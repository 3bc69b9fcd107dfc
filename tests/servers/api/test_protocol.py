"""A connection by itself, on a real socket: what it keeps, ends and does not begin."""

import asyncio
import gc
import json
import re
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from uvicorn.server import ServerState

from flashsale_api import reserve as reserve_module
from flashsale_api.app import Application
from flashsale_api.batcher import Batcher
from flashsale_api.metrics import Metrics
from flashsale_api.protocol import HttpProtocol
from flashsale_api.reserve import MAX_BODY_BYTES, Reserve
from tests.unit.api.test_batcher import Publications, StandingInventory

BODY = b'{"userId":"ann","itemId":"x","quantity":1}'
GOOD = b"POST /reserve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GOOD += b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
BAD = GOOD.replace(b'"quantity"', b'"quantite"')


class Talk:
    """A connection and the client at its other end."""

    def __init__(self, connection: HttpProtocol, client: socket.socket) -> None:
        self.connection, self.client = connection, client

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.client, data)
        await asyncio.sleep(0.01)

    async def answers(self) -> list[int]:
        """The statuses of what has come by now; 0 last where the connection was closed."""
        await asyncio.sleep(0.05)
        loop, heads = asyncio.get_running_loop(), b""
        try:
            while True:
                async with asyncio.timeout(0.05):
                    read = await loop.sock_recv(self.client, 65536)
                if not read:
                    break
                heads += read
        except TimeoutError:
            closed = []
        else:
            closed = [0]
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", heads)] + closed


@asynccontextmanager
async def talk(inventory: StandingInventory, timeout_keep_alive: int = 75) -> AsyncIterator[Talk]:
    metrics = Metrics()
    reserve = Reserve(Batcher(inventory, Publications(), metrics), metrics)
    config = uvicorn.Config(
        Application(reserve, Starlette()),
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
        yield Talk(connection, theirs)
    finally:
        transport.abort()
        await asyncio.sleep(0)
        theirs.close()


async def test_a_closed_connection_is_gone_at_once() -> None:
    """The garbage collector runs too seldom to be needed for that."""
    gc.collect()
    gc.disable()
    try:
        async with talk(StandingInventory()) as one:
            await one.send(BAD + BAD)
            assert await one.answers() == [422, 422]
            gone = weakref.ref(one.connection)
        del one
        await asyncio.sleep(0.01)
        assert gone() is None
    finally:
        gc.enable()


async def test_nothing_is_kept_of_a_body_that_was_too_large_and_its_sender_is_not_waited_for() -> (
    None
):
    async with talk(StandingInventory(), timeout_keep_alive=1) as one:
        size = MAX_BODY_BYTES + 10
        await one.send(GOOD.replace(b"Length: %d" % len(BODY), b"Length: %d" % size)[: -len(BODY)])
        await one.send(b"a" * (size - 5))
        assert await one.answers() == [413]
        assert not one.connection.cycle.body
        await one.send(b"a" * 5)
        await one.send(BAD)
        assert await one.answers() == [422]
        await one.send(GOOD.replace(b"Length: %d" % len(BODY), b"Length: %d" % size)[: -len(BODY)])
        await one.send(b"a" * (size - 5))
        await one.send(b"a" * 5)
        await asyncio.sleep(1.2)
        assert await one.answers() == [413, 0]


async def test_what_comes_behind_the_last_answer_is_not_begun() -> None:
    inventory = StandingInventory()
    async with talk(inventory) as one:
        await one.send(BAD[:-5])
        one.connection.shutdown()
        await one.send(BAD[-5:] + GOOD)
        assert await one.answers() == [422, 0]
        assert inventory.calls == []


async def test_who_has_asked_before_the_end_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = StandingInventory()
    async with talk(inventory) as one:
        await one.send(GOOD)
        one.connection.shutdown()
        inventory.go.release()
        assert await one.answers() == [202, 0]
    monkeypatch.setattr(reserve_module, "_answer", json.loads)  # which takes no decision
    async with talk(inventory) as one:
        inventory.go.release()
        await one.send(GOOD)
        assert await one.answers() == [500]
        monkeypatch.undo()
        inventory.go.release()
        await one.send(GOOD)
        assert await one.answers() == [202]
