"""The pipelined link: each caller gets its own reply or an error."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from redis.asyncio import Connection
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from dev.stack.redis import RedisServer
from flashsale import redis_client
from flashsale.redis_client import Link, Pool, Reply


@asynccontextmanager
async def new_pool(server: RedisServer) -> AsyncIterator[Pool]:
    client = redis_client.connect(server.url)
    pool = client.connection_pool
    assert isinstance(pool, Pool)
    try:
        yield pool
    finally:
        await client.aclose()


@asynccontextmanager
async def other_side() -> AsyncIterator[tuple[Link, socket.socket]]:
    """Yields a link and the socket on which the test plays the server."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    _, writer = await asyncio.open_connection(sock=ours)
    link = Link(writer)
    try:
        yield link, theirs
    finally:
        link.close()
        await asyncio.sleep(0)
        theirs.close()


async def test_each_caller_gets_its_own_reply(redis_server: RedisServer) -> None:
    random = Random(1)
    texts = ["ü\r\n$-1\r\n" * random.randrange(2_000) for _ in range(500)]

    async def echoed(number: int) -> Reply:
        await asyncio.sleep(random.random() / 20)
        link = await pool.link()
        if number % 5 == 0:
            with pytest.raises(NoScriptError):
                await link.ask("EVALSHA", "0" * 40, 0)
        if number % 7 == 0:
            with pytest.raises(ResponseError, match="unknown command"):
                await link.ask("NO-SUCH-COMMAND")
        if number % 3 == 0:
            return await link.ask("STRLEN", texts[number])
        return await link.ask("ECHO", texts[number])

    async with new_pool(redis_server) as pool:
        answers = await asyncio.gather(*(echoed(number) for number in range(500)))
        assert answers == [0 if number % 3 == 0 else texts[number] for number in range(500)]
        assert len({id(await pool.link()) for _ in range(3)}) == 1


async def test_replies_can_arrive_in_pieces_of_any_size() -> None:
    answers = "$7\r\né\r\nok!\r\n:-12\r\n+OK\r\n-ERR bad command\r\n$0\r\n\r\n".encode()
    for size in (1, 2, 3, 7, len(answers)):
        async with other_side() as (link, theirs):
            waiting = [asyncio.create_task(link.ask("X", n)) for n in range(5)]
            await asyncio.sleep(0)
            for at in range(0, len(answers), size):
                theirs.sendall(answers[at : at + size])
                await asyncio.sleep(0.001)
            got = await asyncio.gather(*waiting, return_exceptions=True)
            assert got[:3] + got[4:] == ["é\r\nok!", -12, "OK", ""]
            assert isinstance(got[3], ResponseError)
            assert str(got[3]) == "ERR bad command"


@pytest.mark.parametrize(
    "nonsense",
    [
        b"*0\r\n",
        b"*1\r\n$-1\r\n",
        b"*2\r\n+OK\r\n*1\r\n+OK\r\n",
        b"$x\r\n",
        b"$-1\r\n",
        b"\r\n",
        b"$2\r\n\xff\xff\r\n",
        b"+a\r\n+b\r\n+c\r\n",
    ],
)
async def test_an_invalid_or_unexpected_reply_closes_the_link(nonsense: bytes) -> None:
    async with other_side() as (link, theirs):
        waiting = [asyncio.create_task(link.ask("X", n)) for n in range(2)]
        await asyncio.sleep(0)
        theirs.sendall(nonsense)
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert link.closed
        assert all(isinstance(each, Disconnected) or each in ("a", "b") for each in done)


async def test_a_cancelled_call_does_not_leave_its_reply_to_another_caller(
    redis_server: RedisServer,
) -> None:
    async with new_pool(redis_server) as pool:
        link = await pool.link()
        redis_server.pause()
        try:
            waiting = [asyncio.create_task(link.ask("ECHO", n)) for n in range(3)]
            await asyncio.sleep(0)
            waiting[1].cancel()
            answers = await asyncio.gather(*waiting, return_exceptions=True)
        finally:
            redis_server.resume()
        assert [type(answer) for answer in answers] == [
            Disconnected,
            asyncio.CancelledError,
            Disconnected,
        ]
        assert await (await pool.link()).ask("ECHO", "mine") == "mine"


async def test_a_server_crash_fails_all_calls_and_the_next_call_reconnects(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    with RedisServer(tmp_path, binary=redis_server.binary) as server:
        async with new_pool(server) as pool:
            link = await pool.link()
            server.pause()
            waiting = [asyncio.create_task(link.ask("ECHO", n)) for n in range(3)]
            await asyncio.sleep(0)
            server.kill()
            for call in waiting:
                with pytest.raises(Disconnected):
                    await call
            with pytest.raises(Disconnected):
                await pool.link()
            server.start()
            links = await asyncio.gather(*(pool.link() for _ in range(5)))
            assert len({id(each) for each in links}) == 1
            assert await links[0].ask("PING") == "PONG"


async def test_a_connection_that_ends_late_is_closed_without_an_error(
    redis_server: RedisServer,
) -> None:
    client = redis_client.connect(redis_server.url)
    closing: list[Connection] = []

    async def late(self: Connection, *_: object, **__: object) -> None:
        closing.append(self)
        raise RedisTimeout("Timed out closing connection after 1")

    await client.ping()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "disconnect", late)
        await client.aclose()
    assert closing
    await closing[0].disconnect()
