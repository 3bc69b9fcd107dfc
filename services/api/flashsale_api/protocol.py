"""The HTTP/1.1 connections of buyers. Each has bounds on its memory and its time.

uvicorn accepts the connections and stops the server. httptools parses the bytes. This module does
the rest, because uvicorn's own protocol has no such bounds.
"""

import asyncio
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, cast

import httptools
from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from flashsale_api import asgi, descriptors, responses
from flashsale_api.reserve import MAX_BODY_BYTES
from flashsale_api.responses import Handler, Headers, Problem, Respond

log = logging.getLogger(__name__)

REQUEST_SECONDS: Final = 10.0
"""Time to send a whole request, and to read an answer.

The check runs once per this interval, so a connection is closed after at most twice this time.
"""
CLOSE_SECONDS: Final = 2.0
"""Time to read the last answers of a server that stops."""
MAX_HEAD_BYTES: Final = 64 * 1024
"""Limit for all bytes of a request except its body: head, trailers and the framing of chunks.

The requests of a connection that wait for an earlier answer have this limit together.
"""
MAX_FIELDS: Final = 100
"""Limit for the header and trailer fields of a request."""
MAX_UNFINISHED_BYTES: Final = 64 * 1024 * 1024
"""Limit for the memory of all requests of the process that are incomplete or wait for another.

Unread answers count, too. A client that exceeds the limit is reset. A request that arrives in one
piece does not count while it is answered.
"""
PIECE_BYTES: Final = 4 * 1024
"""The parser gets a longer read in pieces of this size.

It does not say where a request begins. So a request that begins behind another one counts all of
its first piece.
"""
FIELD_BYTES: Final = 150
"""The memory that a header field takes besides its bytes."""
REQUEST_BYTES: Final = 2_300
"""The memory that a waiting request takes besides its bytes and header fields.

Measured with 16,000 waiting requests of the ASGI path, which takes more than the direct one.
"""
MAX_PIPELINED: Final = 16
"""Requests of a connection that wait for the answer to an earlier one."""
SOCKET_BYTES: Final = 32 * 1024
"""Size of each of the kernel's buffers of a connection. A pod's memory limit counts them."""
UNREAD_BYTES: Final = 3 * SOCKET_BYTES
"""The memory that a full buffer of answers takes in the kernel.

The kernel doubles the buffer's size for its own use, and exceeds it by a part of a segment.
"""
SHARED_BYTES: Final = 16 * 1024
"""A body from this size on is not copied behind its head, because connections share it."""

_OF_AN_UPGRADE: Final = (b"upgrade", b"http2-settings")
_RESET: Final = struct.pack("ii", 1, 0)
_INVALID: Final = 400, "Invalid HTTP request received."


class _Stop(Exception):
    """Ends the parsing of the bytes that were read."""


class HttpProtocol(asyncio.Protocol):
    """One connection. Answers its requests one after another, in their order.

    - `app.direct(method, path)` names the handler of a request. A request without a handler takes
      the ASGI path, which costs more.
    - The path is compared as it was sent. No path of the engine needs percent-encoding, and a
      gateway compares the same bytes.
    - Upgrade is ignored, which RFC 9110, section 7.8 allows. Java's HttpClient offers h2c in its
      first request.
    - A client that exceeds a limit is answered 400, 413, 431 or 501, after the answers to its
      earlier requests. A client that is too slow is reset.
    - A client is reset if more of them would take the descriptors of the process' own connections,
      or if the unfinished requests and unread answers of all clients take too much memory.
    """

    unfinished = 0
    """The memory of all unfinished requests and unread answers, in bytes."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        self._app = cast("ASGIApp", config.loaded_app)
        self._direct: Callable[[bytes, bytes], Handler | None] = getattr(
            config.loaded_app, "direct", _no_handler
        )
        self._app_state = app_state
        self._server = server_state
        self._loop = _loop or asyncio.get_event_loop()
        self._check_seconds = min(REQUEST_SECONDS, config.timeout_keep_alive)
        self._idle_checks = round(config.timeout_keep_alive / self._check_seconds)
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport = cast("asyncio.Transport", None)

        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._fields = 0
        """Header and trailer fields of the request that is being received."""
        self._overhead = 0
        """Bytes of the request that is being received, without its body."""
        self._piece = 0
        """Bytes of the piece that is being parsed."""
        self._receiving: Exchange | None = None
        """The request whose head is complete and whose body is not."""
        self._partial = True
        """Whether the client owes a request or the rest of it, as a new connection does."""
        self._current: Exchange | None = None
        """The request that is being answered."""
        self._waiting: deque[Exchange] = deque()
        self._waiting_bytes = 0
        self._unfinished = 0
        """This connection's share of `unfinished`."""
        self._last = False
        """Whether the connection ends with the answers to the requests received so far."""
        self._unread = False
        """Whether the kernel takes no more bytes for the client. No further request is begun."""
        self._refusal = _INVALID
        self._completed = 0
        """Requests received and answers given."""
        self._checked = (0, False, False)
        """The previous check: `_completed`, whether bytes were unread, and `_partial`."""
        self._idle = 0
        """Checks in a row that found the connection idle."""

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        full = len(self._server.connections) >= descriptors.most_connections()
        self._server.connections.add(self)  # type: ignore[arg-type] # uvicorn calls only shutdown()
        connected = transport.get_extra_info("socket")
        if connected is not None:
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                connected.setsockopt(socket.SOL_SOCKET, buffer, SOCKET_BYTES)
            self._transport.set_write_buffer_limits(0)
        self._check = self._loop.call_later(self._check_seconds, self._check_client)
        if full:
            self._abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._check.cancel()
        self._server.connections.discard(self)
        self._drop()

    def data_received(self, data: bytes) -> None:
        for piece in (data,) if len(data) <= PIECE_BYTES else _pieces(data):
            if self._last:
                break
            self._piece = len(piece)
            self._overhead += self._piece
            try:
                self._parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                self._go_on_without_upgrade(memoryview(piece)[upgrade.args[0] :])
            except httptools.HttpParserError:
                self._refuse()
            if self._overhead > MAX_HEAD_BYTES:
                self._refuse(431, "The request's head is too large.")
        if self._partial or self._waiting or self._unfinished:
            self._count()

    def eof_received(self) -> bool:
        """Answers the complete requests of a client that sends nothing more."""
        self._last, self._receiving = True, None
        last = self._waiting[-1] if self._waiting else self._current
        if last is None:
            return False
        last.keep_alive = False
        return True

    def pause_writing(self) -> None:
        self._unread = True
        self._count()

    def resume_writing(self) -> None:
        self._unread = False
        self._count()
        self._go_on()

    # Called by uvicorn.

    def shutdown(self) -> None:
        """Closes the connection after the answers to the requests received so far."""
        self._last = True
        last = self._waiting[-1] if self._waiting else self._current or self._receiving
        if last is None or last.answered:
            self._transport.close()
        else:
            last.keep_alive = False
            self._last = last is not self._receiving
        self._check.cancel()
        self._check = self._loop.call_later(CLOSE_SECONDS, self._check_reader)

    # Called by the parser.

    def on_message_begin(self) -> None:
        self._url, self._headers, self._fields = b"", [], 0
        self._partial = True
        if not self._overhead:  # another request ended in this piece
            self._overhead = self._piece

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._receiving is None:
            # The parser leaves the blanks behind a value.
            self._headers.append((name.lower(), value.rstrip(b" \t")))
        self._fields += 1
        if self._fields > MAX_FIELDS:
            self._stop(431, "The request has too many header fields.")

    def on_headers_complete(self) -> None:
        if self._last:
            raise _Stop
        parser, url = self._parser, self._url
        if parser.should_upgrade():
            return
        expects_100, hosts = self._check_headers()
        version = parser.get_http_version()
        if hosts > 1 or (hosts == 0 and version != "1.0"):
            self._stop(400, "The request needs one Host.")
        if self._overhead > MAX_HEAD_BYTES and self._head_bytes() > MAX_HEAD_BYTES:
            self._stop(431, "The request's head is too large.")
        method = parser.get_method()
        path, _, query = url.partition(b"?")
        if not path.startswith(b"/"):
            path = self._path_of_url()
        if b"#" in url:
            self._stop(400, "A request has no fragment.")
        keep_alive = version != "1.0" and parser.should_keep_alive()
        exchange = Exchange(self, self._direct(method, path), self._headers, keep_alive)
        if exchange.handler is None:
            exchange.handler = asgi.handler(
                self._app,
                {
                    "http_version": version,
                    "server": self._transport.get_extra_info("sockname"),
                    "client": self._transport.get_extra_info("peername"),
                    "method": method.decode("ascii"),
                    "path": path.decode("latin-1"),
                    "raw_path": path,
                    "query_string": query,
                    "headers": self._headers,
                    "state": self._app_state.copy(),
                },
                self._server.tasks,
            )
        exchange.is_head = method == b"HEAD"
        self._receiving = exchange
        # An idle connection must not keep the head of its last request.
        self._url, self._headers = b"", []
        if expects_100:
            exchange.expects_100 = True
            self._continue()

    def on_body(self, body: bytes) -> None:
        self._overhead -= len(body)
        exchange = self._receiving
        if exchange is None or exchange.complete:
            return
        exchange.expects_100 = False
        exchange.body += body
        if len(exchange.body) > MAX_BODY_BYTES:
            self._enqueue(exchange)  # its handler answers 413

    def on_message_complete(self) -> None:
        if self._parser is None or self._parser.should_upgrade():
            return
        self._overhead = 0
        self._partial = False
        self._completed += 1
        exchange, self._receiving = self._receiving, None
        if exchange is not None and not exchange.complete:
            self._enqueue(exchange)

    # Requests and answers.

    def answer(self, exchange: "Exchange", status: int, headers: Headers, body: bytes) -> None:
        """Writes the answer to the current request."""
        self._current = None
        self._completed += 1
        self._server.total_requests += 1
        transport = self._transport
        lines = [STATUS_LINE[status]]
        for name, value in self._server.default_headers:
            lines += (name, b": ", value, b"\r\n")
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        if not exchange.keep_alive:
            lines.append(b"connection: close\r\n")
        if status == 304:
            lines.append(b"\r\n")
        else:
            lines.append(b"content-length: %d\r\n\r\n" % len(body))
            if exchange.is_head:
                body = b""
        if len(body) < SHARED_BYTES:
            lines.append(body)
            transport.write(b"".join(lines))
        else:
            transport.write(b"".join(lines))
            transport.write(body)
        if not exchange.keep_alive:
            self._last = True
            transport.close()
        elif self._waiting:
            # In the next turn of the loop: one connection must not delay the others.
            self._loop.call_soon(self._go_on)
        elif self._receiving is not None:
            self._continue()

    def _enqueue(self, exchange: "Exchange") -> None:
        """Takes a request whose body is complete or too large, and begins it if it is its turn."""
        exchange.complete = True
        if self._current is None and not self._waiting and not self._unread:
            self._last = self._last or not exchange.keep_alive
            self._begin(exchange)
            return
        size = exchange.size()
        if not exchange.is_refusal and (
            len(self._waiting) >= MAX_PIPELINED or self._waiting_bytes + size > MAX_HEAD_BYTES
        ):
            self._stop(400, "Too many requests wait for an answer.")
        self._last = self._last or not exchange.keep_alive
        self._waiting.append(exchange)
        self._waiting_bytes += size
        self._transport.pause_reading()

    def _go_on(self) -> None:
        """Begins the next request, if it is its turn."""
        if self._waiting and self._current is None and not self._unread:
            exchange = self._waiting.popleft()
            self._waiting_bytes -= exchange.size()
            self._count()
            if not self._waiting and not self._last:
                self._transport.resume_reading()
            self._begin(exchange)

    def _count(self) -> None:
        """Counts the memory of this connection's unfinished requests and unread answers."""
        size = self._waiting_bytes + UNREAD_BYTES * self._unread
        for exchange in self._waiting:
            size += REQUEST_BYTES + FIELD_BYTES * len(exchange.headers)
        if self._partial:
            body = self._receiving.body if self._receiving is not None else b""
            size += self._overhead + len(body) + FIELD_BYTES * self._fields
        HttpProtocol.unfinished += size - self._unfinished
        self._unfinished = size
        if HttpProtocol.unfinished > MAX_UNFINISHED_BYTES:
            log.warning("reset a client: unfinished requests and unread answers are too large")
            self._abort()
            self._drop()  # before the loop reads from further clients

    def _drop(self) -> None:
        """Frees the memory of all requests. They and the parser refer to this connection."""
        self._last = True
        self._parser = None
        self._url, self._headers = b"", []
        if self._current is not None:
            self._current.drop()
        for exchange in self._waiting:
            exchange.drop()
        self._waiting.clear()
        self._waiting_bytes = 0
        self._current = self._receiving = None
        HttpProtocol.unfinished -= self._unfinished
        self._unfinished = 0

    def _begin(self, exchange: "Exchange") -> None:
        self._current = exchange
        exchange.begin()

    def _continue(self) -> None:
        """Asks for the body of a request that waits for 100 Continue, once it is its turn."""
        exchange = self._receiving
        answering = self._current is not None or self._waiting
        if exchange is not None and exchange.expects_100 and not answering:
            exchange.expects_100 = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _refuse(self, status: int | None = None, reason: str = "") -> None:
        """Answers a client that broke a rule, after its earlier requests, and then closes."""
        if self._last:
            return
        refused, why = self._refusal if status is None else (status, reason)
        log.warning("refused a client with %d: %s", refused, why)
        self._receiving = None
        refusal = Exchange(self, _plain(refused, why), [], keep_alive=False)
        refusal.is_refusal = True
        self._enqueue(refusal)

    def _stop(self, status: int, reason: str) -> None:
        """Stops the parser, which then has the client refused."""
        self._refusal = status, reason
        raise _Stop

    # Parts of a head.

    def _check_headers(self) -> tuple[bool, int]:
        """Returns whether the client waits for 100 Continue, and the number of its Hosts."""
        expects_100, hosts = False, 0
        for name, value in self._headers:
            if name == b"host":
                hosts += 1
            elif name == b"transfer-encoding" and value.lower() != b"chunked":
                self._stop(501, "The only supported Transfer-Encoding is chunked.")
            elif name == b"expect" and value.lower() == b"100-continue":
                expects_100 = True
        return expects_100, hosts

    def _head_bytes(self) -> int:
        return len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers)

    def _path_of_url(self) -> bytes:
        try:
            return bytes(httptools.parse_url(self._url).path or b"/")
        except httptools.HttpParserInvalidURLError:
            self._stop(*_INVALID)
            raise

    def _go_on_without_upgrade(self, rest: memoryview) -> None:
        """Parses a request again without its Upgrade, and then the rest of the bytes."""
        pieces: list[bytes | memoryview] = [rest, self._head_without_upgrade()]
        while pieces and not self._last:
            piece = pieces.pop()
            try:
                self._parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                # A slice of a memoryview is no copy, so many upgrades in one read stay cheap.
                pieces += [memoryview(piece)[upgrade.args[0] :], self._head_without_upgrade()]
            except httptools.HttpParserError:
                self._refuse()

    def _head_without_upgrade(self) -> bytes:
        """Returns the head without Upgrade, for a new parser. Refuses CONNECT."""
        parser = self._parser
        method, version = parser.get_method(), parser.get_http_version()
        if method == b"CONNECT":
            self._refuse(*_INVALID)
            return b""
        lines = [b"%b %b HTTP/%b" % (method, self._url, version.encode())]
        for name, value in self._headers:
            kept = value
            if name in _OF_AN_UPGRADE:
                continue
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                kept = b", ".join(
                    option for option in options if option.lower() not in _OF_AN_UPGRADE
                )
            lines.append(b"%b: %b" % (name, kept))
        self._parser = httptools.HttpRequestParser(self)
        return b"\r\n".join([*lines, b"", b""])

    # Time limits.

    def _check_client(self) -> None:
        """Ends a client that is too slow. One timer is cheaper than one per request."""
        transport = self._transport
        unread = transport.get_write_buffer_size() > 0
        completed, was_unread, was_partial = self._checked
        stuck = completed == self._completed
        if transport.is_closing() or (
            stuck and ((unread and was_unread) or (self._partial and was_partial))
        ):
            self._abort()
            return
        idle = stuck and not (unread or self._partial or self._current or self._waiting)
        self._idle = self._idle + 1 if idle else 0
        if self._idle >= self._idle_checks:
            transport.close()
        self._checked = self._completed, unread, self._partial
        self._check = self._loop.call_later(self._check_seconds, self._check_client)

    def _check_reader(self) -> None:
        """Resets a client that leaves answers unread while the server stops."""
        if self._transport.get_write_buffer_size() > 0:
            self._abort()
        else:
            self._check = self._loop.call_later(CLOSE_SECONDS, self._check_reader)

    def _abort(self) -> None:
        """Resets the connection, so that neither process nor kernel keeps the unread bytes."""
        connected = self._transport.get_extra_info("socket")
        if connected is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()


class Exchange:
    """A request and its answer."""

    __slots__ = (
        "_connection",
        "body",
        "complete",
        "expects_100",
        "handler",
        "headers",
        "is_head",
        "is_refusal",
        "keep_alive",
    )

    def __init__(
        self,
        connection: HttpProtocol,
        handler: Handler | None,
        headers: Sequence[tuple[bytes, bytes]],
        keep_alive: bool,
    ) -> None:
        self._connection: HttpProtocol | None = connection
        self.handler = handler
        self.headers = headers
        self.keep_alive = keep_alive
        self.body = bytearray()
        self.complete = self.expects_100 = self.is_head = self.is_refusal = False

    @property
    def answered(self) -> bool:
        """Whether the answer was written, or the client is gone."""
        return self._connection is None

    def size(self) -> int:
        """Returns the bytes of this request, without the objects that keep them."""
        return len(self.body) + sum(len(name) + len(value) for name, value in self.headers)

    def begin(self) -> None:
        """Decides the request. The answer follows immediately or later."""
        handler, self.handler = self.handler, None
        try:
            if handler is not None:
                handler(self.headers, self.body, self.respond)
        except Exception:  # after any error, the client needs an answer
            log.exception("could not decide a request")
            self.respond(*responses.plain(Problem.INTERNAL_ERROR))

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Answers the request, unless the client is gone."""
        connection, self._connection = self._connection, None
        self.body = bytearray()
        if connection is not None:
            connection.answer(self, status, headers, body)

    def drop(self) -> None:
        """Forgets the connection, whose client is gone."""
        self._connection = self.handler = None


def _pieces(data: bytes) -> Iterator[memoryview]:
    whole = memoryview(data)
    return (whole[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))


def _plain(status: int, text: str) -> Handler:
    def handle(
        headers: Sequence[tuple[bytes, bytes]],  # noqa: ARG001 - a handler's signature
        body: bytes | bytearray,  # noqa: ARG001
        respond: Respond,
    ) -> None:
        respond(status, ((b"content-type", b"text/plain; charset=utf-8"),), text.encode())

    return handle


def _no_handler(method: bytes, path: bytes) -> Handler | None:  # noqa: ARG001 - as `direct`
    return None
