"""The API without its bounds on clients, to measure their cost. Takes the API's environment.

It has no limits for bytes, header fields and unread answers, no deadlines, and no share of waiting
places per item. The crowd never exceeds a bound, so all answers stay the same. It repeats no
request, so the memory of replays costs nothing.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import cast
from unittest.mock import patch

import httptools

from flashsale.reservations import Request
from flashsale_api import app, servers
from flashsale_api.__main__ import main
from flashsale_api.batcher import Batcher, Decision
from flashsale_api.calls import CALLS_IN_FLIGHT, _Waiting
from flashsale_api.protocol import HttpProtocol

_NEVER = 1e9


class UnboundedProtocol(HttpProtocol):
    """A connection that counts nothing and waits forever."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._server.connections.add(self)  # type: ignore[arg-type] # as the base class
        self._check = self._loop.call_later(_NEVER, self._check_client)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(400, "Invalid HTTP request received.")

    def pause_writing(self) -> None:
        """Begins the next request however many bytes are unread."""

    def on_message_begin(self) -> None:
        self._url, self._headers = b"", []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_body(self, body: bytes) -> None:
        if self._receiving is not None:
            self._receiving.body += body

    def on_message_complete(self) -> None:
        exchange, self._receiving = self._receiving, None
        if exchange is not None:
            self._enqueue(exchange)


class UnboundedBatcher(Batcher):
    """Lets every request wait, for as long as it takes."""

    def decide(self, item_id: str, request: Request, decided: Callable[[Decision], None]) -> None:
        queue = self._queues.get(item_id)
        if queue is None or self._closed or self._engine.conflict:
            super().decide(item_id, request, decided)
            return
        queue.waiting.append(_Waiting(request, decided, 0))
        if queue.calls < CALLS_IN_FLIGHT and not queue.ready:
            self._make_ready(queue)

    def _expire(self) -> None:
        """Refuses no request."""


if __name__ == "__main__":
    with (
        patch.object(servers, "HttpProtocol", UnboundedProtocol),
        patch.object(app, "Batcher", UnboundedBatcher),
    ):
        sys.exit(main())
