"""POST /reserve: parses a request, has it decided, and makes the answer."""

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
from starlette.types import Receive, Scope, Send

from flashsale.fields import USER_ID_PATTERN, ItemId, Quantity, UserId
from flashsale.reservations import Outcome, Request
from flashsale.sale import rfc3339_of_ms
from flashsale.tracing import traceparent_of
from flashsale_api import responses
from flashsale_api.batcher import Batcher, Decision, Failure
from flashsale_api.identity import reservation_id
from flashsale_api.metrics import Metrics
from flashsale_api.responses import Headers, Problem, Reservation

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from flashsale_api.spans import Spans

log = logging.getLogger(__name__)

RESERVE_PATH: Final = "/reserve"
MAX_BODY_BYTES: Final = 16 * 1024

_KEY: Final = re.compile(USER_ID_PATTERN)
_TRACEPARENT: Final = re.compile(r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")
_JSON: Final = (b"content-type", b"application/json")
_FIELD: Final = re.compile(r"^(?P<rule>.*?) - at `\$\.(?P<field>[^`]*)`$", re.DOTALL)
_MISSING: Final = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")

_RULES: Final = {
    "userId": "a string of 1 to 128 of the characters A-Z a-z 0-9 . _ ~ @ : | + = -",
    "itemId": "a string of 1 to 128 of the characters A-Z a-z 0-9 . _ ~ -, "
    "starting with a letter or digit",
    "quantity": "an integer from 1 to 1000",
    "Idempotency-Key": "1 to 128 of the characters A-Z a-z 0-9 . _ ~ @ : | + = -",
}

_PROBLEMS: Final = {
    Outcome.KEY_REUSED: Problem.KEY_REUSED,
    Outcome.ENDED: Problem.ENDED,
    Outcome.PAUSED: Problem.PAUSED,
    Outcome.NOT_OPEN: Problem.NOT_OPEN,
    Outcome.LIMIT_REACHED: Problem.LIMIT_REACHED,
    Outcome.SOLD_OUT: Problem.SOLD_OUT,
    Outcome.NOT_ENOUGH_LEFT: Problem.NOT_ENOUGH_LEFT,
    Outcome.OUTBOX_FULL: Problem.OUTBOX_FULL,
    Outcome.UNKNOWN: Problem.UNKNOWN_ITEM,
    Outcome.UNSUPPORTED: Problem.FENCED,
    Outcome.FENCED: Problem.FENCED,
    Outcome.OTHER_ENGINE: Problem.OTHER_ENGINE,
    Failure.TOO_MANY_WAITING: Problem.TOO_MANY_WAITING,
    Failure.REDIS_UNAVAILABLE: Problem.REDIS_UNAVAILABLE,
    Failure.OUTCOME_UNKNOWN: Problem.OUTCOME_UNKNOWN,
    Failure.INTERNAL_ERROR: Problem.INTERNAL_ERROR,
}


class ReserveBody(msgspec.Struct, frozen=True, rename="camel"):
    """The body of POST /reserve. Unknown fields are ignored."""

    user_id: UserId
    item_id: ItemId
    quantity: Quantity


class _Refused(Exception):
    """The request is invalid. It is answered without a call to Redis."""

    def __init__(self, problem: Problem, detail: str, **members: object) -> None:
        self.problem, self.detail, self.members = problem, detail, members


Respond: TypeAlias = Callable[[int, Headers, bytes], None]
"""Takes the status, the headers without a length, and the body."""

_SOLD_OUT: Final = Decision(Outcome.SOLD_OUT)

_decode = msgspec.json.Decoder(ReserveBody).decode
_encode = msgspec.json.Encoder().encode


class Reserve:
    """The endpoint. `HttpProtocol` calls `begin`. An instance is also an ASGI application."""

    def __init__(self, batcher: Batcher, metrics: Metrics, spans: "Spans | None" = None) -> None:
        self._batcher = batcher
        self._metrics = metrics
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await _body(receive)
        if raw is None:
            return  # the buyer disconnected before the body was complete
        answered: asyncio.Future[tuple[int, Headers, bytes]] = (
            asyncio.get_running_loop().create_future()
        )

        def respond(status: int, headers: Headers, body: bytes) -> None:
            if not answered.done():  # the server cancelled the request
                answered.set_result((status, headers, body))

        self.begin(scope["headers"], raw, respond)
        status, headers, body = await answered
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await send({"type": "http.response.body", "body": body})

    def begin(
        self, headers: Sequence[tuple[bytes, bytes]], raw: bytes | bytearray, respond: Respond
    ) -> None:
        """Decides a request, and calls `respond` exactly once, immediately or later.

        `raw` is the whole body, or more than `MAX_BODY_BYTES` of it.
        """
        started = perf_counter()
        try:
            order, request_key, traceparent = _parsed(headers, raw)
        except _Refused as refused:
            counted = self._metrics.of("")
            counted.outcomes[refused.problem.value.slug.replace("-", "_")].inc()
            answer = responses.render(refused.problem, refused.detail, **refused.members)
            counted.rejected.observe(perf_counter() - started)
            respond(*answer)
            return
        item_id = order.item_id
        span = None
        if self._spans is not None and self._spans.samples(traceparent):
            span = self._spans.begin(item_id, traceparent, perf_counter() - started)
            traceparent = traceparent_of(span)
        pending = _Pending(self, item_id, started, span, respond)
        # A request with a key is always looked up, because it may have been accepted before.
        if not request_key and self._batcher.sold_out(item_id):
            pending.end(_SOLD_OUT)
            return
        identity = reservation_id(item_id, order.user_id, request_key)
        request = Request(identity, order.user_id, order.quantity, request_key, traceparent)
        if self._spans is not None and span is not None:
            self._spans.deciding(span, request)
        self._batcher.decide(item_id, request, pending.end)

    def answer(
        self, item_id: str, decision: Decision, started: float, span: "Span | None"
    ) -> tuple[int, Headers, bytes]:
        """Makes and counts the answer to a request that began at `started`."""
        status, headers, body = _answer(item_id, decision)
        if self._spans is not None and span is not None:
            self._spans.end(span, decision.outcome, status)
        counted = self._metrics.of(item_id)
        counted.outcomes[decision.outcome].inc()
        seconds = perf_counter() - started
        if status < 300:
            counted.accepted.observe(seconds)
        elif status < 500:
            counted.rejected.observe(seconds)
        else:
            counted.failed.observe(seconds)
        return status, headers, body


class _Pending:
    """A request that waits for its decision."""

    __slots__ = ("_item_id", "_reserve", "_respond", "_span", "_started")

    def __init__(
        self, reserve: Reserve, item_id: str, started: float, span: "Span | None", respond: Respond
    ) -> None:
        self._reserve = reserve
        self._item_id = item_id
        self._started = started
        self._span = span
        self._respond = respond

    def end(self, decision: Decision) -> None:
        """Answers the request. Never raises."""
        try:
            answer = self._reserve.answer(self._item_id, decision, self._started, self._span)
        except Exception:  # after any error, the buyer needs an answer
            log.exception("could not answer a request for %s", self._item_id)
            answer = responses.plain(Problem.INTERNAL_ERROR)
        self._respond(*answer)


def _parsed(
    headers: Sequence[tuple[bytes, bytes]], raw: bytes | bytearray
) -> tuple[ReserveBody, str, str]:
    """Returns the body, the Idempotency-Key and the traceparent. Raises `_Refused`.

    A missing header is returned as "". A malformed traceparent counts as missing.
    """
    content_type = request_key = traceparent = ""
    for name, value in headers:
        if name == b"content-type":
            content_type = value.decode("latin-1")
        elif name == b"idempotency-key":
            if request_key:
                raise _invalid("Idempotency-Key")
            request_key = value.decode("latin-1")
            if not _KEY.match(request_key):
                raise _invalid("Idempotency-Key")
        elif name == b"traceparent":
            traceparent = value.decode("latin-1")
            if not _TRACEPARENT.match(traceparent):
                traceparent = ""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise _Refused(Problem.UNSUPPORTED_MEDIA_TYPE, "send Content-Type: application/json")
    if len(raw) > MAX_BODY_BYTES:
        raise _Refused(Problem.BODY_TOO_LARGE, f"the body can have at most {MAX_BODY_BYTES} bytes")
    try:
        return _decode(raw), request_key, traceparent
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Refused(Problem.MALFORMED_JSON, str(error)) from None


async def _body(receive: Receive) -> bytes | None:
    """Returns the body, cut once it is too large. None if the client has disconnected."""
    chunks = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        chunks += bytes(message.get("body", b""))
        if len(chunks) > MAX_BODY_BYTES or not message.get("more_body", False):
            return chunks


def _invalid(field: str) -> _Refused:
    rule = _RULES[field]
    return _Refused(Problem.INVALID_FIELD, f"{field} must be {rule}", field=field, rule=rule)


def _explained(error: str) -> _Refused:
    """Turns msgspec's error into the field and the rule that it violates."""
    match = _MISSING.match(error) or _FIELD.match(error)
    field = match["field"] if match else ""
    if field in _RULES:
        return _invalid(field)
    return _Refused(Problem.INVALID_FIELD, "the body must be a JSON object", field="", rule=error)


def _answer(item_id: str, decision: Decision) -> tuple[int, Headers, bytes]:
    record = decision.record
    if record is not None:
        body = _encode(Reservation.of(item_id, decision.sale_id, decision.reservation_id, record))
        location = _location(item_id, decision.reservation_id)
        return 202, (_JSON, (b"location", location)), body
    problem = _PROBLEMS[decision.outcome]
    if problem is Problem.NOT_OPEN:
        status, headers, body = responses.render(
            problem, startsAt=rfc3339_of_ms(decision.starts_ms)
        )
        seconds = max(1, -(-(decision.starts_ms - decision.now_ms) // 1000))
        return status, (*headers, (b"retry-after", b"%d" % seconds)), body
    status, headers, body = responses.plain(problem)
    if problem is Problem.OUTCOME_UNKNOWN:
        headers = (*headers, (b"location", _location(item_id, decision.reservation_id)))
    return status, headers, body


def _location(item_id: str, reservation_id: str) -> bytes:
    return f"/sales/{item_id}/reservations/{reservation_id}".encode()
