"""Serves health checks and metrics over HTTP/1.1. Its clients cost little memory and time.

kubelet and Prometheus need a few requests per minute. So each connection has one request, one
deadline, and a place among few.
"""

import asyncio
import logging
import platform
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, NamedTuple, TypeAlias

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics

from flashsale import __version__

log = logging.getLogger(__name__)

EXCHANGE_SECONDS: Final = 10.0
"""Time to send a request and to read its answer. It is Prometheus' default for a scrape, too."""
MAX_CONNECTIONS: Final = 64
"""Open connections of a process. One more closes the oldest one, which is the slowest client's."""
MAX_HEAD_BYTES: Final = 8 * 1024
PIECE_BYTES: Final = 64 * 1024
"""Bytes of an answer that wait for a client at a time."""
IDLE_SHARE: Final = 4
"""Time without generating metrics after each generation, as a multiple of the time it took."""
MAX_IDLE_SECONDS: Final = 1.0

_RESET: Final = struct.pack("ii", 1, 0)


def registry(component: str, engine: str) -> CollectorRegistry:
    """Returns a registry with `flashsale_build_info` and, on Linux, the process metrics."""
    # Otherwise every counter gets a second, unused series with its creation time.
    disable_created_metrics()  # type: ignore[no-untyped-call] # it lacks its "-> None"
    made = CollectorRegistry()
    Gauge(
        "flashsale_build_info",
        "Always 1. The labels are the component, its engine's name, its version and its Python.",
        ["component", "engine", "version", "python"],
        registry=made,
    ).labels(component, engine, __version__, platform.python_version()).set(1)
    ProcessCollector(registry=made)
    return made


class Answer(NamedTuple):
    """An answer to a GET request."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Handler: TypeAlias = Callable[[], Awaitable[Answer]]


def line(text: str, status: int = 200) -> Answer:
    """Returns an answer of one line."""
    return Answer(status, f"{text}\n".encode())


class Scrapes:
    """Answers scrapes of metrics. It generates a text at a time and then pauses.

    So any number of clients takes about a fifth of a core from the process.
    """

    def __init__(self, generate: Callable[[], bytes]) -> None:
        """`generate` returns the metrics as Prometheus' text. It runs in a thread."""
        self._generate = generate
        self._next: asyncio.Task[bytes] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._idle_until = 0.0

    async def answer(self) -> Answer:
        """Returns metrics that were generated after the call. Concurrent calls share them."""
        if self._next is None:
            self._next = asyncio.create_task(self._text())
        text = await asyncio.shield(self._next)
        return Answer(200, text, "text/plain; version=0.0.4; charset=utf-8")

    async def _text(self) -> bytes:
        async with self._one_at_a_time:
            await asyncio.sleep(self._idle_until - time.monotonic())
            self._next = None
            started = time.monotonic()
            text = await asyncio.to_thread(self._generate)
            ended = time.monotonic()
            self._idle_until = ended + min(IDLE_SHARE * (ended - started), MAX_IDLE_SECONDS)
            return text


@asynccontextmanager
async def serving(
    listeners: Sequence[socket.socket], handlers: Mapping[str, Handler]
) -> AsyncIterator[None]:
    """Serves the paths of `handlers` on sockets of `bound`, which it closes at the end."""
    connections = _Connections(handlers)
    servers = [
        await asyncio.start_server(connections.add, sock=listener, limit=MAX_HEAD_BYTES)
        for listener in listeners
    ]
    try:
        yield
    finally:
        for server in servers:
            server.close()
        await connections.close()


class _Connections:
    """The open connections of a process, the oldest first."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def add(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves a new connection."""
        if len(self._open) >= MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            _abort(self._open.pop(oldest))  # a task that has not started yet aborts nothing
            oldest.cancel()
        task = asyncio.create_task(self._serve(reader, writer))
        self._open[task] = writer
        task.add_done_callback(lambda done: self._open.pop(done, None))

    async def close(self) -> None:
        """Closes all connections."""
        tasks = dict(self._open)
        for task, writer in tasks.items():
            _abort(writer)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(EXCHANGE_SECONDS):
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except asyncio.LimitOverrunError:
                    await _send(writer, line("the request's head is too large", 431))
                else:
                    method, answer = await self._answer(head)
                    await _send(writer, answer, with_body=method != b"HEAD")
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            pass  # the client is gone or too slow
        finally:
            _abort(writer)

    async def _answer(self, head: bytes) -> tuple[bytes, Answer]:
        """Returns the method of a request, and the answer."""
        parts = head.partition(b"\r\n")[0].split(b" ")
        if len(parts) != 3 or parts[2] not in {b"HTTP/1.0", b"HTTP/1.1"}:
            return b"", line("this is not a request of HTTP/1.1", 400)
        method, target, _ = parts
        handler = self._handlers.get(target.partition(b"?")[0].decode("latin-1"))
        if handler is None:
            return method, line("the path does not exist", 404)
        if method not in {b"GET", b"HEAD"}:
            return method, line("the path supports only GET and HEAD", 405)
        try:
            return method, await handler()
        except Exception:  # after any error, the client needs an answer
            log.exception("could not answer a GET request")
            return method, line("the answer failed", 500)


async def _send(writer: asyncio.StreamWriter, answer: Answer, *, with_body: bool = True) -> None:
    """Sends an answer in pieces, because a copy of all metrics may wait for each client."""
    if writer.transport.is_closing():  # uvloop raises a RuntimeError for a write
        raise ConnectionResetError
    fields = [
        f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if answer.status == 405:
        fields.append("Allow: GET, HEAD")
    writer.write("\r\n".join([*fields, "", ""]).encode("latin-1"))
    body = memoryview(answer.body if with_body else b"")
    for start in range(0, len(body), PIECE_BYTES):
        writer.write(body[start : start + PIECE_BYTES])
        await writer.drain()


def _abort(writer: asyncio.StreamWriter) -> None:
    """Resets a connection that is still open, so that neither process nor kernel keeps bytes."""
    transport = writer.transport
    connected = transport.get_extra_info("socket")
    if not transport.is_closing() and connected is not None:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()
