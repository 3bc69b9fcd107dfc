"""Thousands of connections to one API process, and a watch over its heartbeat and its memory."""

import asyncio
import json
import resource
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

from redis.asyncio import Redis

from dev.crowd import Answered, Connection, reserve_request
from dev.services import ApiServer
from flashsale import keys
from tests.support.eventually import until
from tests.support.wire import GET, resident

OPENING: Final = 200
"""Connections that are opened at a time, so that the listening socket's queue does not overflow."""
SPARE: Final = 500
"""Descriptors that a process needs for other things than the connections."""


def allow_connections(number: int) -> None:
    """Let this process and its children open `number` connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number + SPARE:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number + SPARE, max(hard, number + SPARE)))


async def open_connections(url: str, number: int, answered: Answered) -> Sequence[Connection]:
    """Open keep-alive connections. `answered` does not get the first answer of each.

    A new connection without a request is reset after 10 to 20 s, before a slow machine opens all.
    """
    fresh: set[Connection] = set()

    def answered_again(connection: Connection, status: int, body: bytes) -> None:
        if connection in fresh:
            fresh.discard(connection)
        else:
            answered(connection, status, body)

    opened: list[Connection] = []
    while len(opened) < number:
        some = await asyncio.gather(
            *(
                Connection.open(url, answered_again, lambda _, __: None)
                for _ in range(min(OPENING, number - len(opened)))
            )
        )
        fresh.update(some)
        for connection in some:
            connection.send(GET)
        await until(lambda: not fresh)
        opened += some
    return opened


def request_of(item: str, user: str, key: str = "") -> bytes:
    """Make a reservation of one unit."""
    body = {"userId": user, "itemId": item, "quantity": 1}
    return reserve_request(json.dumps(body).encode(), key)


Requests = Callable[[int], bytes]
"""Returns the nth request of a connection, or several that it sends together."""


class _Attacker(asyncio.Protocol):
    """Sends the next requests after each answer, whatever it is. Comes back if it is closed."""

    def __init__(self, flood: "Flood", requests: Requests, number: int) -> None:
        self._flood = flood
        self._requests = requests
        self._sent = number
        self._unanswered = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._flood.open.add(self._transport)
        self.next()

    def next(self) -> None:
        self._sent += 1
        requests = self._requests(self._sent)
        self._unanswered = max(1, requests.count(b" HTTP/1.1\r\n"))
        self._transport.write(requests)

    def data_received(self, data: bytes) -> None:
        self._unanswered -= data.count(b"HTTP/1.1 ")
        if data.startswith(b"HTTP/"):
            problem = data.partition(b"urn:flashsale:problem:")[2].partition(b'"')[0]
            self._flood.answers[f"{data[9:12].decode()} {problem.decode()}".strip()] += 1
        if self._unanswered <= 0 and b"connection: close" not in data:
            self.next()

    def connection_lost(self, _: Exception | None) -> None:
        self._flood.open.discard(self._transport)
        self._flood.come_back(lambda: type(self)(self._flood, self._requests, self._sent))


class _Slow(_Attacker):
    """Sends a byte of its request per second."""

    def next(self) -> None:
        request = self._requests(self._sent)
        if self._transport.is_closing():
            return
        self._transport.write(request[self._sent % len(request) :][:1])
        self._sent += 1
        asyncio.get_running_loop().call_later(1, self.next)


class _Unread(_Attacker):
    """Sends requests and reads no answer."""

    def next(self) -> None:
        self._transport.pause_reading()
        self._send()

    def _send(self) -> None:
        if self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() == 0:
            self._transport.write(self._requests(0) * 16)
        asyncio.get_running_loop().call_later(0.5, self._send)


class Flood:
    """Connections that send requests as fast as they are answered. `answers` counts the kinds."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._address = address.hostname or "", address.port or 80
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = False
        self.answers: Counter[str] = Counter()
        self.open: set[asyncio.Transport] = set()

    @asynccontextmanager
    async def running(self, item: str, sold_out: str, number: int) -> AsyncIterator["Flood"]:
        """Attack for as long as the context lasts. One in ten connections is slow or unread.

        `item` has units for sale, and `sold_out` has none.
        """
        mix = mixed(item, sold_out)
        description = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        kinds: Sequence[Callable[[int], _Attacker]] = [
            lambda _: _Slow(self, lambda _: request_of(item, "slow"), 0),
            lambda _: _Unread(self, lambda _: description, 0),
        ]
        try:
            for begun in range(0, number, OPENING):
                for n in range(begun, min(begun + OPENING, number)):
                    attacker = kinds[n // 20 % 2](n) if n % 20 == 0 else _Attacker(self, mix, n)
                    self.come_back(lambda attacker=attacker: attacker)  # type: ignore[misc]
                await asyncio.gather(*self._tasks)
            yield self
        finally:
            self._ended = True
            for transport in list(self.open):
                transport.abort()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def come_back(self, attacker: Callable[[], _Attacker]) -> None:
        """Open a connection, unless the flood has ended."""
        if self._ended:
            return

        async def connect() -> None:
            while not self._ended:
                try:
                    await asyncio.get_running_loop().create_connection(attacker, *self._address)
                except OSError:
                    await asyncio.sleep(0.1)
                else:
                    return

        task = asyncio.create_task(connect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def mixed(item: str, sold_out: str) -> Requests:
    """Return requests of every kind, in turn. `item` sells, and `sold_out` does not."""
    user = count()
    unknown = "01a208bd-5117-7f0d-b8d8-4e8e9760b87e"

    def get(path: str, method: str = "GET") -> bytes:
        return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

    kinds: Sequence[Callable[[], bytes]] = [
        lambda: request_of(item, f"u{next(user)}"),
        lambda: request_of(sold_out, f"u{next(user)}", "a-key"),
        lambda: request_of(f"nothing-{next(user)}", "ann"),
        lambda: get(f"/sales/{item}/reservations/{unknown}"),
        lambda: get("/sales"),
        lambda: get(f"/sales/nothing-{next(user)}"),
        lambda: get(f"/sales/{item}", "HEAD"),
        lambda: get("/metrics"),
        lambda: reserve_request(b'{"userId":'),
        lambda: request_of(item, "x" * 15_000),
        lambda: get("/sales") * 8,
        lambda: b"\x16\x03\x01garbage\r\n\r\n",
    ]
    return lambda n: kinds[n % len(kinds)]()


def patient(url: str) -> Redis:
    """Return a client without time limits, because a flood keeps the test itself busy, too."""
    return Redis.from_url(url, decode_responses=True)


class Watched(NamedTuple):
    """Extremes of a pod during a watch."""

    oldest_ms: int
    """The highest age of its heartbeat, by Redis' clock."""
    resident_bytes: int
    samples: int


class Watch:
    """Samples the age of the heartbeat of an engine's one pod, and its resident memory."""

    def __init__(self, redis: "Redis", api: ApiServer, engine: str = keys.DEFAULT_ENGINE) -> None:
        self._redis = redis
        self._api = api
        self._engine = engine
        self.seen = Watched(0, 0, 0)

    async def look(self) -> None:
        """Take one sample. A pod without a heartbeat fails the test."""
        pods = self._redis.smembers(keys.pods(self._engine))
        [pod] = await cast("Awaitable[set[str]]", pods)
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.time()
        pipeline.get(keys.heartbeat(self._engine, pod))
        (seconds, micros), text = await pipeline.execute()
        assert text is not None, "the heartbeat has expired"
        age = seconds * 1000 + micros // 1000 - json.loads(text)["sampledMs"]
        oldest, most, samples = self.seen
        self.seen = Watched(max(oldest, age), max(most, resident(self._api)), samples + 1)

    async def look_for(self, seconds: float) -> Watched:
        """Take samples for as long. Return the extremes."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while loop.time() < until:
            await self.look()
            await asyncio.sleep(0.1)
        return self.seen
