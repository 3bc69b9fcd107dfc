"""A connection as uvicorn has it, with a bound on what a client may make it wait for or keep."""

import asyncio
from typing import Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REQUEST_SECONDS: Final = 10.0
"""From a request's first byte, or from connecting, until all of it is here: twice that at most."""

MAX_HEAD_BYTES: Final = 64 * 1024
"""Request line and headers that came after the first read and are not complete."""

_OF_AN_UPGRADE: Final = (b"connection", b"upgrade", b"http2-settings")


class Connection(HttpToolsProtocol):
    """Closes on a client that is too slow or whose head does not end; ignores Upgrade.

    uvicorn has no deadline for a request, so that connections which never finish one pile up until
    no file descriptor is left for a buyer's, and no limit for a head, which it keeps. What follows
    an Upgrade it does not read as the request's body: Java's HttpClient, which offers h2c with its
    first request, could not POST. An Upgrade may be ignored (RFC 9110, section 7.8).
    """

    _since: float | None = None
    """When what is being received began; None between requests."""
    _head: int | None = None
    """Bytes of an incomplete head; None where there is none."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn does
        super().connection_made(transport)
        self._since = self.loop.time()
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self._watch)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

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
        super().on_message_begin()
        self._since, self._head = self.loop.time(), 0

    def on_headers_complete(self) -> None:
        self._head = None
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self._since = None
            super().on_message_complete()

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
