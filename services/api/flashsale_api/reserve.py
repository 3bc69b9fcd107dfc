"""POST /reserve: from bytes to a decision, and back."""

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
from starlette.types import Receive, Scope, Send

from flashsale.fields import USER_ID_PATTERN, ItemId, Quantity, UserId
from flashsale.reservations import Outcome, Record, Request
from flashsale.sale import rfc3339_of_ms
from flashsale_api import responses
from flashsale_api.batcher import Batching, Decision, Failure
from flashsale_api.identity import reservation_id
from flashsale_api.metrics import Metrics
from flashsale_api.responses import Headers, Problem

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from flashsale_api.spans import Traces

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
    "beginning with a letter or digit",
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
    Failure.TOO_MANY_WAITING: Problem.TOO_MANY_WAITING,
    Failure.REDIS_UNAVAILABLE: Problem.REDIS_UNAVAILABLE,
    Failure.OUTCOME_UNKNOWN: Problem.OUTCOME_UNKNOWN,
    Failure.INTERNAL_ERROR: Problem.INTERNAL_ERROR,
}


class ReserveBody(msgspec.Struct, frozen=True, rename="camel"):
    """The body of POST /reserve; unknown fields are ignored."""

    user_id: UserId
    item_id: ItemId
    quantity: Quantity


class Reservation(msgspec.Struct, frozen=True, rename="camel"):
    """A reservation as HTTP shows it."""

    reservation_id: str
    sale_id: str
    item_id: str
    user_id: str
    quantity: int
    state: str
    accepted_at: str


class _Refused(Exception):
    """A request that is answered before Redis is asked."""

    def __init__(self, problem: Problem, detail: str, **members: object) -> None:
        self.problem, self.detail, self.members = problem, detail, members


Respond: TypeAlias = Callable[[int, Headers, bytes], None]
"""Takes status, headers without a length, and body."""

_SOLD_OUT: Final = Decision(Outcome.SOLD_OUT)

_decode = msgspec.json.Decoder(ReserveBody).decode
_encode = msgspec.json.Encoder().encode


class Reserve:
    """The endpoint. `begin` answers as soon as there is an answer; as an ASGI application it does
    the same for whoever calls it by that way.
    """

    def __init__(
        self, batching: Batching, metrics: Metrics, traces: "Traces | None" = None
    ) -> None:
        self._batching = batching
        self._metrics = metrics
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await _body(receive)
        if raw is None:
            return  # the buyer went before the body was whole
        answered: asyncio.Future[tuple[int, Headers, bytes]] = (
            asyncio.get_running_loop().create_future()
        )

        def respond(status: int, headers: Headers, body: bytes) -> None:
            if not answered.done():  # the server gave it up
                answered.set_result((status, headers, body))

        self.begin(scope["headers"], raw, respond)
        status, headers, body = await answered
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await send({"type": "http.response.body", "body": body})

    def begin(
        self, headers: Sequence[tuple[bytes, bytes]], raw: bytes | bytearray, respond: Respond
    ) -> None:
        """Decides a request; calls `respond` once, now or later.

        `raw` is the whole body, or its beginning if it is larger than `MAX_BODY_BYTES`.
        """
        started = perf_counter()
        try:
            item_id, request = _request(headers, raw, self._batching.sold_out)
        except _Refused as refused:
            counted = self._metrics.of("")
            counted.outcomes[refused.problem.value.slug.replace("-", "_")].inc()
            answer = responses.render(refused.problem, refused.detail, **refused.members)
            counted.rejected.observe(perf_counter() - started)
            respond(*answer)
            return
        span = None
        if self._traces is not None and self._traces.samples(request.traceparent):
            waited = perf_counter() - started
            request, span = self._traces.begin(item_id, request, waited)
        if request.reservation_id:
            self._batching.decide(
                item_id, request, partial(self._end, item_id, request, started, respond, span)
            )
        else:
            self._end(item_id, request, started, respond, span, _SOLD_OUT)

    def _end(  # noqa: PLR0913, PLR0917 - all but the last are known when it begins
        self,
        item_id: str,
        request: Request,
        started: float,
        respond: Respond,
        span: "Span | None",
        decision: Decision,
    ) -> None:
        try:
            status, headers, body = _answer(item_id, decision)
            if self._traces is not None and span is not None:
                self._traces.end(span, request, decision.outcome, status)
            self._count(item_id, decision.outcome, status, perf_counter() - started)
        except Exception:  # whatever it was: the buyer is not to wait for nothing
            log.exception("a request for %s could not be answered", item_id)
            status, headers, body = responses.plain(Problem.INTERNAL_ERROR)
        respond(status, headers, body)

    def _count(self, item_id: str, outcome: Outcome | Failure, status: int, seconds: float) -> None:
        counted = self._metrics.of(item_id)
        counted.outcomes[outcome].inc()
        if status < 300:
            counted.accepted.observe(seconds)
        elif status < 500:
            counted.rejected.observe(seconds)
        else:
            counted.failed.observe(seconds)


def _request(
    headers: Sequence[tuple[bytes, bytes]], raw: bytes | bytearray, sold_out: Callable[[str], bool]
) -> tuple[str, Request]:
    """The item and the request that headers and body ask for.

    It has no id where nothing is left: most requests of a sale are such, and have no use for one.
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
        raise _Refused(Problem.BODY_TOO_LARGE, f"the body may have at most {MAX_BODY_BYTES} bytes")
    try:
        body = _decode(raw)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Refused(Problem.MALFORMED_JSON, str(error)) from None
    item_id, user_id = body.item_id, body.user_id
    # The same order may have been accepted before: a key is always looked up.
    refused = not request_key and sold_out(item_id)
    identity = "" if refused else reservation_id(item_id, user_id, request_key)
    return item_id, Request(identity, user_id, body.quantity, request_key, traceparent)


async def _body(receive: Receive) -> bytes | None:
    """The whole body, or as much as shows that it is too large; None if the client went."""
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
    """Names the field and the rule that msgspec found broken."""
    match = _MISSING.match(error) or _FIELD.match(error)
    field = match["field"] if match else ""
    if field in _RULES:
        return _invalid(field)
    return _Refused(Problem.INVALID_FIELD, "the body must be a JSON object", field="", rule=error)


def _answer(item_id: str, decision: Decision) -> tuple[int, Headers, bytes]:
    record = decision.record
    if record is not None:
        body = _encode(shown(item_id, decision.sale_id, decision.reservation_id, record))
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


def shown(item_id: str, sale_id: str, reservation_id: str, record: Record) -> Reservation:
    """A reservation as HTTP shows it."""
    return Reservation(
        reservation_id=reservation_id,
        sale_id=sale_id,
        item_id=item_id,
        user_id=record.user_id,
        quantity=record.quantity,
        state=record.state,
        accepted_at=rfc3339_of_ms(record.occurred_ms),
    )
