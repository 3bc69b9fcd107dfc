"""A connection as uvicorn has it, with a bound on what a client may make it wait for or keep."""

import asyncio
import logging
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from flashsale_api import responses
from flashsale_api.reserve import MAX_BODY_BYTES, RESERVE_PATH, Reserve
from flashsale_api.responses import Headers, Problem

log = logging.getLogger(__name__)

REQUEST_SECONDS: Final = 10.0
"""From a request's first byte, or from connecting, until all of it is here: twice that at most."""

MAX_HEAD_BYTES: Final = 64 * 1024
"""Request line and headers that came after the first read and are not complete."""

_OF_AN_UPGRADE: Final = (b"connection", b"upgrade", b"http2-settings")
_RESERVE: Final = RESERVE_PATH.encode()


class HttpProtocol(HttpToolsProtocol):
    """Closes on a client that is too slow or whose head does not end; ignores Upgrade.

    uvicorn has no deadline for a request, so that connections which never finish one pile up until
    no file descriptor is left for a buyer's, and no limit for a head, which it keeps. What follows
    an Upgrade it does not read as the request's body: Java's HttpClient, which offers h2c with its
    first request, could not POST. An Upgrade may be ignored (RFC 9110, section 7.8).

    POST /reserve, as nearly everybody sends it, it gives to `app.reserve` itself: uvicorn's task,
    scope and messages for it would cost more than the answer. Whatever is unusual (an older HTTP,
    a connection that is to close, a request that waits for another) goes by uvicorn's way.
    """

    _since: float | None = None
    """When what is being received began; None between requests."""
    _head: int | None = None
    """Bytes of an incomplete head; None where there is none."""

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - uvicorn's own
        super().__init__(*arguments, **options)
        self._reserve: Reserve | None = getattr(self.app, "reserve", None)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        super().connection_made(transport)
        self._since = self.loop.time()
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self._watch)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.cycle = None  # type: ignore[assignment] # an exchange has the connection, too

    def data_received(self, data: bytes) -> None:
        if self._since is None:
            self._since = self.loop.time()
        self._unset_keepalive_if_required()
        went_on = self._head is not None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
        else:
            if went_on and self._head is not None:
                self._head += len(data)
                if self._head > MAX_HEAD_BYTES:
                    self._refuse("The head of the request is too large.")

    def on_message_begin(self) -> None:
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._since, self._head = self.loop.time(), 0

    def on_headers_complete(self) -> None:
        self._head = None
        if self.parser.should_upgrade() or self.transport.is_closing():
            return  # what follows an answer behind which the connection ends is not begun
        if self.url == _RESERVE and self._reserve is not None and self._is_usual():
            # It has what uvicorn asks of a cycle.
            self.cycle = Exchange(self, self._reserve)  # type: ignore[assignment]
        else:
            self._make_scope()
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        exchange = self.cycle
        if exchange is None or exchange.response_complete:
            return
        if not isinstance(exchange, Exchange):
            super().on_body(body)
        else:
            exchange.body += body
            if len(exchange.body) > MAX_BODY_BYTES:
                exchange.begin()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._since = None
        exchange = self.cycle
        if exchange is None or exchange.response_complete:
            self._wait_for_the_next()
        elif isinstance(exchange, Exchange):
            exchange.begin()
        else:
            super().on_message_complete()

    def _wait_for_the_next(self) -> None:
        """As uvicorn does behind an answer; this one came first, and the rest of the request then
        ended the wait.
        """
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _make_scope(self) -> None:
        """What uvicorn does when a message begins, of which most have no use for it."""
        kept = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = kept
        self.scope["headers"] = self.headers

    def _is_usual(self) -> bool:
        parser = self.parser
        return (
            (self.cycle is None or self.cycle.response_complete)
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not self.expect_100_continue
            and not self.flow.write_paused
        )

    def _watch(self) -> None:
        """Now and then, since a timer for each request would cost more than it is worth."""
        if self._since is not None and self.loop.time() - self._since >= REQUEST_SECONDS:
            self.transport.close()
        else:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self._watch)

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse("Invalid HTTP request received.")
            return
        kept = [header for header in self.headers if header[0] not in _OF_AN_UPGRADE]
        lines = [b"%b %b HTTP/1.1" % (method, self.url), *(b"%b: %b" % header for header in kept)]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _refuse(self, why: str) -> None:
        self.logger.warning(why)
        self.send_400_response(why)


class Exchange:
    """A request to reserve and its answer, in the place of uvicorn's `RequestResponseCycle`."""

    __slots__ = (
        "_connection",
        "_reserve",
        "body",
        "disconnected",
        "keep_alive",
        "response_complete",
    )

    message_event = asyncio.Event()
    """Nobody waits for it."""

    def __init__(self, connection: HttpProtocol, reserve: Reserve) -> None:
        self._connection = connection
        self._reserve = reserve
        self.body = bytearray()
        self.keep_alive = True
        self.disconnected = False
        self.response_complete = False

    def begin(self) -> None:
        """Answers, now or later."""
        try:
            self._reserve.begin(self._connection.headers, self.body, self.respond)
        except Exception:  # whatever it was: the buyer is not to wait for nothing
            log.exception("a request could not be decided")
            self.respond(*responses.plain(Problem.INTERNAL_ERROR))

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Writes the answer, unless the buyer went."""
        if self.response_complete:
            return
        self.response_complete = True
        self.body = bytearray()
        connection = self._connection
        if self.disconnected or connection.transport.is_closing():
            return
        lines = [STATUS_LINE[status]]
        for name, value in connection.server_state.default_headers:
            lines += (name, b": ", value, b"\r\n")
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"content-length: %d\r\n\r\n" % len(body))
        lines.append(body)
        connection.transport.write(b"".join(lines))
        if not self.keep_alive:
            connection.transport.close()
        connection.on_response_complete()
