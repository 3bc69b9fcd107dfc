"""uvicorn's HTTP protocol with limits against slow clients, and a short path for POST /reserve.

This is the only module that uses uvicorn's internals: the parts of `HttpToolsProtocol`, and the
attributes that it expects of its `cycle`.
"""

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
"""Time from connecting, or from a request's first byte, until the request must be complete.

The check runs once per this interval, so a connection is closed after at most twice this time.
"""

MAX_HEAD_BYTES: Final = 64 * 1024
"""Limit for an incomplete request line with headers, not counting the first read."""

_OF_AN_UPGRADE: Final = (b"connection", b"upgrade", b"http2-settings")
_RESERVE: Final = RESERVE_PATH.encode()


class HttpProtocol(HttpToolsProtocol):
    """One connection. Differs from uvicorn's protocol in three ways.

    - It closes a connection whose request is late, or whose head is too large. uvicorn has no
      limit for either, so a client could use up the file descriptors and the memory.
    - It ignores Upgrade, which RFC 9110, section 7.8 allows. uvicorn would drop the body of such a
      request. Java's HttpClient offers h2c in its first request and could not POST.
    - It passes a common POST /reserve directly to `app.reserve`. uvicorn's task, ASGI scope and
      messages would cost more than the answer. Other requests take the ASGI path, for example
      HTTP/1.0, `Connection: close`, and a request that is pipelined behind another.
    """

    _since: float | None = None
    """When the current request began, by the loop's clock. None between requests."""
    _head: int | None = None
    """Bytes counted towards `MAX_HEAD_BYTES`. None unless a head is incomplete."""

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
        self.cycle = None  # type: ignore[assignment] # breaks the cycle with an Exchange

    def data_received(self, data: bytes) -> None:
        if self._since is None:
            self._since = self.loop.time()
        self._unset_keepalive_if_required()
        head_continues = self._head is not None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        else:
            if head_continues and self._head is not None:
                self._head += len(data)
                if self._head > MAX_HEAD_BYTES:
                    self._refuse("The request's head is too large.")

    def on_message_begin(self) -> None:
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._since, self._head = self.loop.time(), 0

    def on_headers_complete(self) -> None:
        self._head = None
        if self.parser.should_upgrade() or self.transport.is_closing():
            return  # ignore requests after the last answer of a closing connection
        if self.url == _RESERVE and self._reserve is not None and self._is_common():
            # An Exchange has the attributes that uvicorn expects of a cycle.
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
            self._restart_keep_alive()
        elif isinstance(exchange, Exchange):
            exchange.begin()
        else:
            super().on_message_complete()

    def _restart_keep_alive(self) -> None:
        """Restarts the keep-alive timer of a request that was answered before its body arrived.

        The rest of the body cancelled the timer.
        """
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _make_scope(self) -> None:
        """Builds the ASGI scope. uvicorn does this for every message, when it begins."""
        kept = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = kept
        self.scope["headers"] = self.headers

    def _is_common(self) -> bool:
        """Whether the request can be answered without ASGI."""
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
        """Closes a late connection. One timer per connection is cheaper than one per request."""
        if self._since is not None and self.loop.time() - self._since >= REQUEST_SECONDS:
            self.transport.close()
        else:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self._watch)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parses the request again without its Upgrade headers. `rest` follows its head."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse("Invalid HTTP request received.")
            return
        kept = [header for header in self.headers if header[0] not in _OF_AN_UPGRADE]
        lines = [b"%b %b HTTP/1.1" % (method, self.url), *(b"%b: %b" % header for header in kept)]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _refuse(self, reason: str) -> None:
        self.logger.warning(reason)
        self.send_400_response(reason)


class Exchange:
    """A POST /reserve and its answer. Takes the place of uvicorn's `RequestResponseCycle`."""

    __slots__ = (
        "_protocol",
        "_reserve",
        "body",
        "disconnected",
        "keep_alive",
        "response_complete",
    )

    message_event = asyncio.Event()
    """uvicorn sets it. An Exchange does not wait for it."""

    def __init__(self, protocol: HttpProtocol, reserve: Reserve) -> None:
        self._protocol = protocol
        self._reserve = reserve
        self.body = bytearray()
        self.keep_alive = True
        self.disconnected = False
        self.response_complete = False

    def begin(self) -> None:
        """Decides the request. The answer follows immediately or later."""
        try:
            self._reserve.begin(self._protocol.headers, self.body, self.respond)
        except Exception:  # after any error, the buyer needs an answer
            log.exception("could not decide a request")
            self.respond(*responses.plain(Problem.INTERNAL_ERROR))

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Writes the answer, unless the buyer has disconnected."""
        if self.response_complete:
            return
        self.response_complete = True
        self.body = bytearray()
        protocol = self._protocol
        if self.disconnected or protocol.transport.is_closing():
            return
        lines = [STATUS_LINE[status]]
        for name, value in protocol.server_state.default_headers:
            lines += (name, b": ", value, b"\r\n")
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"content-length: %d\r\n\r\n" % len(body))
        lines.append(body)
        protocol.transport.write(b"".join(lines))
        if not self.keep_alive:
            protocol.transport.close()
        protocol.on_response_complete()
