"""The HTTP/1.1 connections of buyers. Each has bounds on its memory and its time.

uvicorn accepts the connections and stops the server. httptools parses the bytes. This module does
the rest, because uvicorn's own protocol has no such bounds.
"""

import asyncio
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import httptools
from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.server import ServerState

from flashsale_api import asgi, descriptors, heads, turns
from flashsale_api.exchanges import Exchange
from flashsale_api.heads import BadRequest
from flashsale_api.limits import (
    CLOSE_SECONDS,
    FIELD_BYTES,
    MAX_FIELDS,
    MAX_HEAD_BYTES,
    MAX_PIPELINED,
    MAX_UNFINISHED_BYTES,
    MAX_UNFINISHED_ORDER_BYTES,
    PIECE_BYTES,
    REQUEST_BYTES,
    REQUEST_SECONDS,
    UNREAD_BYTES,
)
from flashsale_api.reserve import MAX_BODY_BYTES
from flashsale_api.responses import Handler, Headers

log = logging.getLogger(__name__)

SHARED_BYTES: Final = 16 * 1024
"""A body from this size on is not copied behind its head, because connections share it."""

_RESET: Final = struct.pack("ii", 1, 0)
_INVALID: Final = 400, "Invalid HTTP request received."
_LARGE_HEAD: Final = 431, "The request's head is too large."


class HttpProtocol(asyncio.Protocol):
    """One connection. Answers its requests one after another, in their order.

    - `app.direct(method, path)` names the handler of a request. A request without a handler takes
      the ASGI path, which costs more.
    - The path is compared as it was sent. No path of the engine needs percent-encoding, and a
      gateway compares the same bytes.
    - Upgrade is ignored, which RFC 9110, section 7.8 allows. Java's HttpClient offers h2c in its
      first request.
    - A turn of the loop parses for a limited time. Further bytes wait for the next turns.
    - A client that exceeds a limit is answered 400, 413, 431 or 501, after the answers to its
      earlier requests. A client that is too slow is reset.
    - A client is reset if more of them would take the descriptors of the process' own connections,
      or if the unfinished requests and unread answers of its port's clients take too much memory.
    """

    unfinished = 0
    """The memory of all unfinished requests and unread answers of the port, in bytes."""

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
        self._turns = turns.of_loop(self._loop)
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport = cast("asyncio.Transport", None)

        self._unparsed = b""
        """The bytes that wait for a later turn. Meanwhile, nothing more is read."""
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
        self._completed = 0
        """Requests received and answers given."""
        self._checked = (0, False, False)
        """The previous check: `_completed`, whether bytes were unread, and `_partial`."""
        self._idle = 0
        """Checks in a row that found the connection idle."""

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        full = len(self._server.connections) >= self._most_connections()
        self._server.connections.add(self)  # type: ignore[arg-type] # uvicorn calls only shutdown()
        self._transport.set_write_buffer_limits(0)
        self._check = self._loop.call_later(self._check_seconds, self._check_client)
        if full:
            self._abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._check.cancel()
        self._server.connections.discard(self)
        self._drop()

    def data_received(self, data: bytes) -> None:
        # Bytes that wait count. A long turn is better than a client that is reset for its turn.
        if self._turns.has_time() or self.unfinished + len(data) > self._most_unfinished():
            self._parse(data)
            return
        self._unparsed = data
        self._transport.pause_reading()
        self._turns.postpone(self._parse_later)
        self._count()

    def eof_received(self) -> bool:
        """Answers the complete requests of a client that sends nothing more."""
        self._last = True
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
        self._turns.postpone(self._go_on)

    # Called by uvicorn.

    def shutdown(self) -> None:
        """Closes the connection after the answers to the requests received so far."""
        self._parse_later()
        self._last = True
        last = self._waiting[-1] if self._waiting else self._current or self._receiving
        if last is None or last.answered:
            self._transport.close()
        else:
            last.keep_alive = False
            self._last = last is not self._receiving
        self._check.cancel()
        self._check = self._loop.call_later(CLOSE_SECONDS, self._check_reader)

    # Parsing.

    def _parse_later(self) -> None:
        """Parses the bytes that waited for this turn."""
        data, self._unparsed = self._unparsed, b""
        if data and not self._transport.is_closing():
            self._transport.resume_reading()
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        for piece in (data,) if len(data) <= PIECE_BYTES else _pieces(data):
            if self._last:
                break
            self._piece = len(piece)
            self._overhead += self._piece
            try:
                self._parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                self._go_on_without_upgrade(memoryview(piece)[upgrade.args[0] :])
            except httptools.HttpParserError as error:
                self._refuse(*_refusal(error))
            if self._overhead > MAX_HEAD_BYTES:
                self._refuse(*_LARGE_HEAD)
        if self._partial or self._waiting or self._unfinished:
            self._count()

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
            raise BadRequest(431, "The request has too many header fields.")

    def on_headers_complete(self) -> None:
        if self._last:
            raise BadRequest(400, "The connection ends with an earlier request.")
        parser, url = self._parser, self._url
        if parser.should_upgrade():
            return
        version = parser.get_http_version()
        expects_100 = heads.check(self._headers, version)
        if self._overhead > MAX_HEAD_BYTES and heads.size(url, self._headers) > MAX_HEAD_BYTES:
            raise BadRequest(*_LARGE_HEAD)
        method = parser.get_method()
        path, query = heads.path_and_query(url)
        keep_alive = version != "1.0" and parser.should_keep_alive()
        exchange = Exchange(self.answer, self._direct(method, path), self._headers, keep_alive)
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

    def answer(self, exchange: Exchange, status: int, headers: Headers, body: bytes) -> None:
        """Writes the answer to the current request."""
        self._current = None
        self._completed += 1
        self._server.total_requests += 1
        transport = self._transport
        head = exchange.response_head(status, headers, self._server.default_headers, len(body))
        if exchange.is_head or status == 304:
            transport.write(head)
        elif len(body) < SHARED_BYTES:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
        if not exchange.keep_alive:
            self._last = True
            transport.close()
        elif self._waiting:
            self._turns.postpone(self._go_on)  # one connection must not delay the others
        elif self._receiving is not None:
            self._continue()

    def _enqueue(self, exchange: Exchange) -> None:
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
            raise BadRequest(400, "Too many requests wait for an answer.")
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
        size = self._waiting_bytes + len(self._unparsed) + UNREAD_BYTES * self._unread
        for exchange in self._waiting:
            size += REQUEST_BYTES + FIELD_BYTES * len(exchange.headers)
        if self._partial:
            body = self._receiving.body if self._receiving is not None else b""
            size += self._overhead + len(body) + FIELD_BYTES * self._fields
        type(self).unfinished += size - self._unfinished
        self._unfinished = size
        if self.unfinished > self._most_unfinished():
            log.warning("reset a client: unfinished requests and unread answers are too large")
            self._abort()
            self._drop()  # before the loop reads from further clients

    def _drop(self) -> None:
        """Frees the memory of all requests. They and the parser refer to this connection."""
        self._last = True
        self._parser, self._unparsed = None, b""
        self._url, self._headers = b"", []
        if self._current is not None:
            self._current.drop()
        self._waiting.clear()
        self._waiting_bytes = 0
        self._current = self._receiving = None
        type(self).unfinished -= self._unfinished
        self._unfinished = 0

    def _begin(self, exchange: Exchange) -> None:
        self._current = exchange
        exchange.begin()

    def _continue(self) -> None:
        """Asks for the body of a request that waits for 100 Continue, once it is its turn."""
        exchange = self._receiving
        answering = self._current is not None or self._waiting
        if exchange is not None and exchange.expects_100 and not answering:
            exchange.expects_100 = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _refuse(self, status: int, reason: str) -> None:
        """Answers a client that broke a rule, after its earlier requests, and then closes."""
        if self._last:
            return
        log.warning("refused a client with %d: %s", status, reason)
        self._enqueue(Exchange.refusal(self.answer, status, reason))

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
            except httptools.HttpParserError as error:
                self._refuse(*_refusal(error))

    def _head_without_upgrade(self) -> bytes:
        """Returns the head without Upgrade, for a new parser. Refuses CONNECT."""
        parser = self._parser
        method, version = parser.get_method(), parser.get_http_version()
        if method == b"CONNECT":
            self._refuse(*_INVALID)
            return b""
        self._parser = httptools.HttpRequestParser(self)
        return heads.without_upgrade(method, self._url, version, self._headers)

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
        busy = self._partial or self._current or self._waiting or self._unparsed
        idle = stuck and not (unread or busy)
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

    def _most_connections(self) -> int:
        return descriptors.most_connections()

    def _most_unfinished(self) -> int:
        return MAX_UNFINISHED_BYTES

    def _abort(self) -> None:
        """Resets the connection, so that neither process nor kernel keeps the unread bytes."""
        connected = self._transport.get_extra_info("socket")
        if connected is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()


class OrderProtocol(HttpProtocol):
    """A connection of the order port. Its clients have descriptors and memory of their own."""

    unfinished = 0

    def _most_connections(self) -> int:
        return descriptors.most_order_connections()

    def _most_unfinished(self) -> int:
        return MAX_UNFINISHED_ORDER_BYTES


def _pieces(data: bytes) -> Iterator[memoryview]:
    whole = memoryview(data)
    return (whole[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))


def _refusal(error: httptools.HttpParserError) -> tuple[int, str]:
    """Returns the status and the reason of the answer to a request that cannot be parsed."""
    cause = error.__context__
    return (cause.status, cause.reason) if isinstance(cause, BadRequest) else _INVALID


def _no_handler(method: bytes, path: bytes) -> Handler | None:  # noqa: ARG001 - as `direct`
    return None
