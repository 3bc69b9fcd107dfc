"""POST /reserve: parses a request, has it decided, and makes the answer."""

import json
import logging
import re
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec

from flashsale.fields import USER_ID, ItemId, Quantity, UserId
from flashsale.reservations import Request
from flashsale.sale import rfc3339_of_ms
from flashsale.tracing import traceparent_of
from flashsale_api import responses
from flashsale_api.authentication import Authentication
from flashsale_api.batcher import Batcher, Decision
from flashsale_api.calls import Failure
from flashsale_api.metrics import Metrics
from flashsale_api.reservation_ids import reservation_id
from flashsale_api.responses import (
    JSON,
    PROBLEMS,
    Headers,
    Problem,
    RequestHeaders,
    Reservation,
    Respond,
)

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from flashsale_api.spans import Spans

log = logging.getLogger(__name__)

RESERVE_PATH: Final = b"/reserve"
MAX_BODY_BYTES: Final = 16 * 1024

TRACEPARENT: Final = re.compile(r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")
_FIELD: Final = re.compile(r"^(?P<rule>.*?) - at `\$\.(?P<field>[^`]*)`$", re.DOTALL)
_UNKNOWN: Final = re.compile(r"^Object contains unknown field `(?P<field>.*)`$", re.DOTALL)
_MISSING: Final = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")

T = TypeVar("T")

_RULES: Final = {
    "userId": "a string of 1 to 128 of the characters A-Z a-z 0-9 . _ ~ @ : | + = -",
    "itemId": "a string of 1 to 128 of the characters A-Z a-z 0-9 . _ ~ -, "
    "starting with a letter or digit",
    "quantity": "an integer from 1 to 1000",
    "orderRef": "a string of 1 to 128 of the characters A-Z a-z 0-9 . _ ~ @ : | + = -",
    "saleId": "a string of namespace/name of a FlashSale",
    "Idempotency-Key": "1 to 128 of the characters A-Z a-z 0-9 . _ ~ @ : | + = -",
}


class ReserveBody(msgspec.Struct, frozen=True, rename="camel"):
    """The body of POST /reserve. Unknown fields are ignored."""

    user_id: UserId
    item_id: ItemId
    quantity: Quantity


class AuthenticatedBody(msgspec.Struct, frozen=True, rename="camel"):
    """The body of POST /reserve if the request itself names the user."""

    item_id: ItemId
    quantity: Quantity
    user_id: UserId = ""


class Refused(Exception):
    """The request is invalid. It is answered without a call to Redis."""

    def __init__(self, problem: Problem, detail: str, **members: object) -> None:
        self.problem, self.detail, self.members = problem, detail, members


class JsonBody(Generic[T]):
    """Decodes bodies of one kind, and refuses those that repeat a member.

    Of a repeated member msgspec takes the last one and many gateways take the first one, so the two
    could see different users. Only the top level counts, because the API ignores all members that
    contain others.
    """

    def __init__(self, kind: type[T], quotes: int) -> None:
        """`quotes` is the lowest number of quotation marks in a valid body."""
        self._decode = msgspec.json.Decoder(kind).decode
        self._quotes = quotes

    def read(self, content_type: str, raw: bytes | bytearray) -> T:
        """Decodes a body. Raises `Refused`."""
        if (
            content_type != "application/json"  # the form of nearly all callers
            and content_type.partition(";")[0].strip().lower() != "application/json"
        ):
            raise Refused(Problem.UNSUPPORTED_MEDIA_TYPE, "send Content-Type: application/json")
        if len(raw) > MAX_BODY_BYTES:
            raise Refused(
                Problem.BODY_TOO_LARGE, f"the body can have at most {MAX_BODY_BYTES} bytes"
            )
        try:
            body = self._decode(raw)
            # Each member has a quoted name, so a count suffices for almost all bodies.
            repeated = _repeated_member(raw) if raw.count(b'"') > self._quotes else None
        except msgspec.ValidationError as error:
            raise _explained(str(error)) from None
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise Refused(Problem.MALFORMED_JSON, str(error)) from None
        if repeated is not None:
            raise Refused(Problem.MALFORMED_JSON, f"the member {repeated} is repeated")
        return body


_BODY: Final = JsonBody(ReserveBody, quotes=10)
_AUTHENTICATED_BODY: Final = JsonBody(AuthenticatedBody, quotes=6)
_encode = msgspec.json.Encoder().encode


class Reserve:
    """The endpoint. `HttpProtocol` calls `begin`."""

    def __init__(
        self,
        batcher: Batcher,
        metrics: Metrics,
        spans: "Spans | None" = None,
        authentication: Authentication | None = None,
        *,
        trust_traceparent: bool = False,
    ) -> None:
        """Without `authentication`, the body names the user.

        With `trust_traceparent` the caller's span is the parent, and its sampling counts.
        """
        self._batcher = batcher
        self._metrics = metrics
        self._spans = spans
        self._authentication = authentication
        self._body: JsonBody[ReserveBody] | JsonBody[AuthenticatedBody] = (
            _BODY if authentication is None else _AUTHENTICATED_BODY
        )
        self._trust_traceparent = trust_traceparent

    def begin(self, headers: RequestHeaders, raw: bytes | bytearray, respond: Respond) -> None:
        """Decides a request, and calls `respond` exactly once, immediately or later.

        `raw` is the whole body, or more than `MAX_BODY_BYTES` of it.
        """
        started = perf_counter()
        try:
            order, request_key, caller = _parsed(headers, raw, self._body)
        except Refused as refused:
            self._metrics.outcomes("")[refused.problem.outcome].inc()
            answer = responses.render(refused.problem, refused.detail, **refused.members)
            self._metrics.rejected.observe(perf_counter() - started)
            respond(*answer)
            return
        item_id = order.item_id
        # Otherwise a stranger could have all requests traced, by every process up to the ledger.
        traceparent = caller if self._trust_traceparent else ""
        span = None
        if self._spans is not None and self._spans.samples(traceparent):
            span = self._spans.begin(item_id, traceparent, caller, perf_counter() - started)
            traceparent = traceparent_of(span)
        pending = _Pending(self, item_id, started, span, respond)
        # A request with a key is always looked up, because it may have been accepted before.
        if not request_key and (sold_out := self._batcher.sold_out(item_id)):
            pending.end(sold_out)
            return

        def decide(user_id: str, reason: str = "") -> None:
            if reason:
                pending.end(Decision(Failure.UNAUTHORIZED, reason=reason))
                return
            if not user_id:
                pending.end(Decision(Failure.KEYS_UNAVAILABLE))
                return
            if order.user_id not in (user_id, ""):
                pending.end(Decision(Failure.WRONG_USER))
                return
            own_id = reservation_id(item_id, user_id, request_key)
            request = Request(own_id, user_id, order.quantity, request_key, traceparent)
            if self._spans is not None and span is not None:
                self._spans.deciding(span, request)
            self._batcher.decide(item_id, request, pending.end)

        if self._authentication is None:
            decide(order.user_id)
        else:
            self._authentication.identify(headers, decide)

    def answer(
        self, item_id: str, decision: Decision, started: float, span: "Span | None"
    ) -> tuple[int, Headers, bytes]:
        """Makes and counts the answer to a request that began at `started`."""
        status, headers, body = _answer(item_id, decision)
        if self._spans is not None and span is not None:
            self._spans.end(span, decision.outcome, status)
        metrics = self._metrics
        metrics.outcomes(item_id)[decision.outcome].inc()
        seconds = perf_counter() - started
        if status < 300:
            metrics.accepted.observe(seconds)
        elif status < 500:
            metrics.rejected.observe(seconds)
        else:
            metrics.failed.observe(seconds)
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
    headers: RequestHeaders,
    raw: bytes | bytearray,
    body: JsonBody[ReserveBody] | JsonBody[AuthenticatedBody],
) -> tuple[ReserveBody | AuthenticatedBody, str, str]:
    """Returns the body, the Idempotency-Key and the traceparent. Raises `Refused`.

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
            if not USER_ID.match(request_key):
                raise _invalid("Idempotency-Key")
        elif name == b"traceparent":
            traceparent = value.decode("latin-1")
            if not TRACEPARENT.match(traceparent):
                traceparent = ""
    return body.read(content_type, raw), request_key, traceparent


def _repeated_member(raw: bytes | bytearray) -> str | None:
    """Returns the name of a member that a JSON object has twice. Raises `ValueError`."""
    # Numbers stay strings, because Python limits the digits of an integer.
    members: list[tuple[str, Any]] = json.loads(
        raw.decode(), object_pairs_hook=list, parse_int=str, parse_float=str
    )
    seen: set[str] = set()
    for name, _ in members:
        if name in seen:
            return name[:128]
        seen.add(name)
    return None


def _invalid(field: str) -> Refused:
    rule = _RULES[field]
    return Refused(Problem.INVALID_FIELD, f"{field} must be {rule}", field=field, rule=rule)


def _explained(error: str) -> Refused:
    """Turns msgspec's error into the field and the rule that it violates."""
    match = _MISSING.match(error) or _FIELD.match(error)
    field = match["field"] if match else ""
    if field in _RULES:
        return _invalid(field)
    if unknown := _UNKNOWN.match(error):
        field, rule = unknown["field"][:128], "fields of other names are refused"
        return Refused(Problem.INVALID_FIELD, f"{field} is unknown: {rule}", field=field, rule=rule)
    return Refused(Problem.INVALID_FIELD, "the body must be a JSON object", field="", rule=error)


def _answer(item_id: str, decision: Decision) -> tuple[int, Headers, bytes]:
    record = decision.record
    if record is not None:
        body = _encode(Reservation.of(item_id, decision.sale_id, decision.reservation_id, record))
        location = _location(item_id, decision.reservation_id)
        return 202, (JSON, (b"location", location)), body
    problem = PROBLEMS[decision.outcome]
    if problem is Problem.NOT_OPEN:
        status, headers, body = responses.render(
            problem, startsAt=rfc3339_of_ms(decision.starts_ms)
        )
        seconds = max(1, -(-(decision.starts_ms - decision.now_ms) // 1000))
        return status, (*headers, (b"retry-after", b"%d" % seconds)), body
    if problem is Problem.SOLD_OUT and decision.held is not None:
        return responses.sold_out(decision.held)
    if problem is Problem.LIMIT_REACHED:
        return responses.limit_reached(decision.limit)
    if problem is Problem.UNAUTHORIZED:
        return responses.unauthorized(decision.reason)
    status, headers, body = responses.plain(problem)
    if problem is Problem.OUTCOME_UNKNOWN:
        headers = (*headers, (b"location", _location(item_id, decision.reservation_id)))
    return status, headers, body


def _location(item_id: str, reservation_id: str) -> bytes:
    return f"/sales/{item_id}/reservations/{reservation_id}".encode()
