"""Buyers over real HTTP connections: the one load generator in Python.

`stampede` sends a list of attempts and keeps a journal. `Load` sends requests in a closed loop or
at a constant rate, and costs little enough to measure the API with. A `Client` sends one request at
a time. All of them use the same `Connection`.
"""

import asyncio
import contextlib
import json
import math
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from dev.journal import Attempt, Entry, Journal

BAD_REQUESTS: Final = (
    {"quantity": -1},
    {"quantity": 0},
    {"quantity": "2"},
    {"quantity": 1.9},
    {"quantity": None},
    {"quantity": 1001},
    {"userId": None},
    {"userId": "x" * 300},
    {"userId": "nul\x00"},
    {"itemId": "*"},
    {"itemId": "flashsale:{x}:sale"},
)
"""Fields that replace valid ones. The API must refuse each of them and sell nothing."""

TICK_SECONDS: Final = 0.001
"""`Load.open_loop` sends the arrivals of one tick together, because timers are no finer."""

DRAIN_SECONDS: Final = 15.0
"""How long `Load.drain` waits for answers after the last request was sent."""


def attempts(item_id: str, users: int, seed: int) -> list[Attempt]:
    """Return ten attempts per user, in random order.

    Each user sends one key four times, another key once, no key four times, and one bad request. In
    a sale with one unit per buyer, no user may get more than one.
    """
    chance = random.Random(seed)
    made = []
    for number in range(users):
        user_id = f"user-{number}"
        good = {"userId": user_id, "itemId": item_id, "quantity": 1}
        key = str(uuid.UUID(int=chance.getrandbits(128)))
        made += [Attempt(user_id, good, key)] * 4
        made += [Attempt(user_id, good, f"{key}-again")]
        made += [Attempt(user_id, good)] * 4
        made += [Attempt(user_id, {**good, **chance.choice(BAD_REQUESTS)})]
    chance.shuffle(made)
    return made


async def stampede(
    urls: Sequence[str],
    wanted: Iterable[Attempt],
    *,
    connections: int = 100,
    tries: int = 1,
    journal: Journal | None = None,
) -> Journal:
    """Send the attempts over keep-alive connections, spread evenly over the APIs.

    All connections are open before the first attempt, like buyers who wait for a sale to open. Each
    connection sends its next attempt when the last one is answered. An attempt with a key is sent
    up to `tries` times while it gets 503 or no answer. `journal` is filled as answers arrive.
    """
    journal = Journal() if journal is None else journal
    queue = deque(wanted)
    clients = [Client(urls[number % len(urls)]) for number in range(connections)]
    await asyncio.gather(*(client.open() for client in clients))

    async def buy(client: Client) -> None:
        try:
            while queue:
                attempt = queue.popleft()
                for again in range(tries if attempt.request_key else 1):
                    entry = await client.send(attempt)
                    journal.entries.append(entry)
                    if entry.status not in (0, 503):
                        break
                    await asyncio.sleep(0.05 * 2 ** min(again, 5))
        finally:
            client.close()

    async with asyncio.TaskGroup() as buyers:
        for client in clients:
            buyers.create_task(buy(client))
    return journal


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the nearest-rank percentile, or 0 without values."""
    if not (ordered := sorted(values)):
        return 0.0
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def reserve_request(body: bytes, key: str = "", token: str = "") -> bytes:
    """Return the bytes of a `POST /reserve`, with an Idempotency-Key and a token if given."""
    lines = f"Idempotency-Key: {key}\r\n" if key else ""
    lines += f"Authorization: Bearer {token}\r\n" if token else ""
    head = (
        "POST /reserve HTTP/1.1\r\nHost: crowd\r\nContent-Type: application/json\r\n"
        f"{lines}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def order_request(path: str, body: bytes, token: str) -> bytes:
    """Return the bytes of a POST of the shop's order service."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: crowd\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


Answered = Callable[["Connection", int, bytes], None]
Lost = Callable[["Connection", Exception | None], None]


class Connection(asyncio.Protocol):
    """A keep-alive HTTP/1.1 connection with at most one request in flight.

    `answered` gets each answer's status and body. `lost` is called when the connection ends, with
    the error if there was one. `due` is for the caller: the time its request was due.
    """

    def __init__(self, answered: Answered, lost: Lost) -> None:
        self.due = 0.0
        self._answered = answered
        self._lost = lost
        self._received = b""

    @classmethod
    async def open(cls, url: str, answered: Answered, lost: Lost) -> Self:
        """Connect to the host and port of a URL. Raises OSError."""
        address = urlsplit(url)
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: cls(answered, lost), address.hostname or "", address.port or 80
        )
        return connection

    def send(self, request: bytes) -> None:
        self._transport.write(request)  # type: ignore[attr-defined] # TCP transports have it

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._received:
            data = self._received + data
        head = data.find(b"\r\n\r\n")
        if head >= 0:
            begin = data.index(b"content-length: ") + 16
            size = int(data[begin : data.index(b"\r", begin)])
            if len(data) == head + 4 + size:
                self._received = b""
                self._answered(self, int(data[9:12]), data[head + 4 :])
                return
        self._received = data

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(self, exc)


class Client:
    """Sends one request at a time to one API. Reconnects after the connection has broken."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: Connection | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    async def open(self) -> None:
        """Connect unless connected. If the API is down, `send` tries again."""
        if self._connection is None:
            with contextlib.suppress(OSError):
                self._connection = await Connection.open(self._url, self._answered, self._lost)

    async def send(self, attempt: Attempt) -> Entry:
        """Send one reservation and wait for its answer."""
        started = time.perf_counter()
        status, body = await self.request(
            reserve_request(json.dumps(attempt.body).encode(), attempt.request_key, attempt.token)
        )
        seconds = time.perf_counter() - started
        return Entry(attempt, status, body, time.time(), seconds)

    async def request(self, request: bytes) -> tuple[int, dict[str, object]]:
        """Send one request and wait for its answer: the status, or 0 without one, and the body.

        A caller that stops waiting disconnects.
        """
        self._answer = asyncio.get_running_loop().create_future()
        try:
            await self.open()
            if self._connection is None:
                raise ConnectionError
            self._connection.send(request)
            status, body = await self._answer
        except OSError:
            status, body = 0, b"{}"
        except asyncio.CancelledError:
            self.close()
            raise
        return status, json.loads(body)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _answered(self, _: Connection, status: int, body: bytes) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((status, body))

    def _lost(self, connection: Connection, error: Exception | None) -> None:
        if connection is not self._connection:
            return  # closed by this client, which may have another connection now
        self._connection = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError())


class Load:
    """Sends requests over many keep-alive connections, in a closed loop or in an open loop.

    `request` returns the bytes of the next request. `record` is called for each answer with the
    time at which its request was due (`time.perf_counter`), its status and its body. A context
    manager: the connections open at its start and close at its end.
    """

    def __init__(
        self,
        urls: Sequence[str],
        connections: int,
        request: Callable[[], bytes],
        record: Callable[[float, int, bytes], None],
    ) -> None:
        self._urls = [urls[number % len(urls)] for number in range(connections)]
        self._request = request
        self._record = record
        self._outstanding = 0
        self._looping = False
        self._connections: list[Connection] = []
        # Used in turn, so that the API closes no connection for being idle.
        self._free: deque[Connection] = deque()
        self._late: deque[float] = deque()

    async def __aenter__(self) -> Self:
        for url in self._urls:
            connection = await Connection.open(url, self._answered, self._lost)
            self._connections.append(connection)
        self._free.extend(self._connections)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for connection in self._connections:
            connection.close()

    async def closed_loop(self, seconds: float) -> None:
        """Send on each connection as soon as its last request is answered."""
        self._looping = True
        self._outstanding = len(self._free)
        now = time.perf_counter()
        while self._free:
            self._send(self._free.popleft(), now)
        await asyncio.sleep(seconds)
        self._looping = False

    async def open_loop(self, seconds: float, rate: float) -> None:
        """Send `rate` requests per second, regardless of the answers.

        Each request is due at a fixed time, from which its latency counts. If no connection is free
        at that time, it waits for one, as a buyer does.
        """
        begun = time.perf_counter()
        sent, tick = 0, 0
        ticks = round(seconds / TICK_SECONDS)
        while tick < ticks:
            now = time.perf_counter()
            while tick < ticks and begun + tick * TICK_SECONDS <= now:
                due = begun + tick * TICK_SECONDS
                tick += 1
                until = int(tick * TICK_SECONDS * rate)
                self._outstanding += until - sent
                for _ in range(until - sent):
                    if self._free:
                        self._send(self._free.popleft(), due)
                    else:
                        self._late.append(due)
                sent = until
            await asyncio.sleep(max(0.0, begun + tick * TICK_SECONDS - time.perf_counter()))

    async def drain(self) -> None:
        """Wait until every request is answered. Raises TimeoutError after `DRAIN_SECONDS`."""
        deadline = time.perf_counter() + DRAIN_SECONDS
        while self._outstanding:
            if time.perf_counter() > deadline:
                raise TimeoutError(
                    f"{self._outstanding} requests had no answer after {DRAIN_SECONDS:.0f} s"
                )
            await asyncio.sleep(0.005)

    def _send(self, connection: Connection, due: float) -> None:
        connection.due = due
        connection.send(self._request())

    def _answered(self, connection: Connection, status: int, body: bytes) -> None:
        self._record(connection.due, status, body)
        if self._looping:
            self._send(connection, time.perf_counter())
            return
        self._outstanding -= 1
        if self._late:
            self._send(connection, self._late.popleft())
        else:
            self._free.append(connection)

    def _lost(self, _: Connection, error: Exception | None) -> None:
        if self._outstanding:
            # asyncio only logs any other exception of a callback.
            raise SystemExit(f"the API closed a connection: {error}")
