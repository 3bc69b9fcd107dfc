"""The requests of a connection, with their answers."""

import logging
from collections.abc import Callable, Iterable
from typing import TypeAlias

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from flashsale_api import responses
from flashsale_api.responses import Handler, Headers, Problem, RequestHeaders

log = logging.getLogger(__name__)

Answer: TypeAlias = Callable[["Exchange", int, Headers, bytes], None]
"""Writes the answer to a request: its status, headers and body."""


class Exchange:
    """A request and its answer."""

    __slots__ = (
        "_answer",
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
        answer: Answer,
        handler: Handler | None,
        headers: RequestHeaders,
        keep_alive: bool,
    ) -> None:
        self._answer: Answer | None = answer
        self.handler = handler
        self.headers = headers
        self.keep_alive = keep_alive
        self.body = bytearray()
        self.complete = self.expects_100 = self.is_head = self.is_refusal = False

    @classmethod
    def refusal(cls, answer: Answer, status: int, reason: str) -> "Exchange":
        """Returns the answer to a client that broke a rule. The connection ends with it."""
        headers = (b"content-type", b"text/plain; charset=utf-8"), responses.NOT_STORED
        handler = responses.fixed(status, headers, reason.encode())
        exchange = cls(answer, handler, [], keep_alive=False)
        exchange.is_refusal = True
        return exchange

    @property
    def answered(self) -> bool:
        """Whether the answer was written, or the client is gone."""
        return self._answer is None

    def size(self) -> int:
        """Returns the bytes of this request, without the objects that keep them."""
        return len(self.body) + sum(len(name) + len(value) for name, value in self.headers)

    def begin(self) -> None:
        """Decides the request. The answer follows immediately or later."""
        handler, self.handler = self.handler, None
        # Thousands of requests wait while Redis is silent. Their heads and bodies would take much
        # memory.
        headers, self.headers = self.headers, ()
        body, self.body = self.body, bytearray()
        try:
            if handler is not None:
                handler(headers, body, self.respond)
        except Exception:  # after any error, the client needs an answer
            log.exception("could not decide a request")
            self.respond(*responses.plain(Problem.INTERNAL_ERROR))

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Answers the request, unless the client is gone."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(self, status, headers, body)

    def response_head(
        self, status: int, headers: Headers, of_server: Iterable[tuple[bytes, bytes]], length: int
    ) -> bytes:
        """Returns the head of an answer whose body has `length` bytes."""
        lines = [STATUS_LINE[status]]
        for name, value in of_server:
            lines += (name, b": ", value, b"\r\n")
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n" if status == 304 else b"content-length: %d\r\n\r\n" % length)
        return b"".join(lines)

    def drop(self) -> None:
        """Forgets the connection, whose client is gone."""
        self._answer = self.handler = None
