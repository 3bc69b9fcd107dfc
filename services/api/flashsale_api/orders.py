"""The port of the shop's order service: confirm, cancel and read reservations."""

import hmac
import logging
import re
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.fields import ITEM_ID, RESERVATION_ID, OrderRef, SaleId
from flashsale.inventory import Inventory
from flashsale.reservations import OrderCall, Outcome, Record
from flashsale.sale import SaleState
from flashsale_api.authentication import UNAUTHENTICATED, bearer_token
from flashsale_api.calls import Failure
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.reserve import MAX_BODY_BYTES, TRACEPARENT, JsonBody, Refused
from flashsale_api.responses import (
    JSON,
    PROBLEMS,
    Handler,
    Headers,
    Problem,
    RequestHeaders,
    Reservation,
    Respond,
    not_allowed,
    plain,
    render,
    unauthorized,
)
from flashsale_api.rest import problem_response, rest_app, starlette_response
from flashsale_api.transitions import Decision, Transitions

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 1
"""`Retry-After` of a change that Kafka has not acknowledged yet."""

_PATH: Final = "/sales/{item_id}/reservations/{reservation_id}"
_CHANGE: Final = re.compile(rb"/sales/([^/]+)/reservations/([^/]+)/(confirm|cancel)")
_RETRY: Final = (b"retry-after", b"%d" % RETRY_SECONDS)

_DETAILS: Final = {
    Problem.HOLD_EXPIRED: "void the payment; the buyer can reserve again",
    Problem.CANCELLED: "void the payment",
    Problem.OTHER_ORDER: "it is confirmed for another order, whose orderRef a call must name",
    Problem.OTHER_SALE: "the sale of saleId is over: its last event says how the reservation ended",
    Problem.OUTCOME_UNKNOWN: "the change may have been made: repeat the call",
}
_ANSWERS: Final = {2: "durable", 4: "rejected"}
"""An answer's kind in the metrics, by the first digit of its status."""
_encode = msgspec.json.Encoder().encode


class ConfirmBody(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The body of a confirmation."""

    order_ref: OrderRef
    sale_id: SaleId | msgspec.UnsetType = msgspec.UNSET


class CancelBody(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The body of a cancellation. It may be empty."""

    order_ref: OrderRef | msgspec.UnsetType = msgspec.UNSET
    sale_id: SaleId | msgspec.UnsetType = msgspec.UNSET


_OTHER_FORM: Final = "write the itemId and the reservationId in the path as the engine writes them"
_CONFIRM: Final = JsonBody(ConfirmBody, quotes=4)
_CANCEL: Final = JsonBody(CancelBody, quotes=4)


class OrderView(Reservation, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """A reservation as the order service sees it."""

    version: int
    order_ref: str | None = None

    @classmethod
    def of(cls, item_id: str, sale_id: str, reservation_id: str, record: Record) -> "OrderView":
        seen = Reservation.of(item_id, sale_id, reservation_id, record)
        return cls(
            **msgspec.structs.asdict(seen),
            version=record.version,
            order_ref=record.order_ref or None,
        )


class Orders:
    """The endpoints. `HttpProtocol` calls the handlers of changes.

    `refusal` returns the outcome of an item's requests if the pod may not call Redis now.
    """

    def __init__(  # noqa: PLR0913 - the parts that an answer needs
        self,
        inventory: Inventory,
        confirmations: Transitions,
        cancellations: Transitions,
        metrics: Metrics,
        engine: Engine,
        *,
        refusal: Callable[[str], Outcome | Failure | None],
    ) -> None:
        self._inventory = inventory
        self._refusal = refusal
        self._engine = engine
        self._confirmations = confirmations
        self._cancellations = cancellations
        self._metrics = metrics

    def change(self, item_id: str, reservation_id: str, verb: str) -> Handler:
        """Returns the handler of a call to confirm or cancel a reservation."""
        transitions = self._confirmations if verb == "confirm" else self._cancellations
        return _Change(transitions, self._metrics, item_id, reservation_id, verb).begin

    async def reservation(self, request: Request) -> Response:  # noqa: PLR0911 - one per problem
        item_id = request.path_params["item_id"]
        reservation_id = request.path_params["reservation_id"]
        if not _exist(item_id, reservation_id):
            return problem_response(Problem.NOT_FOUND, _OTHER_FORM)
        if refusal := self._refusal(item_id):
            return problem_response(PROBLEMS[refusal])
        try:
            sale, record, server = await self._inventory.look(item_id, reservation_id)
        except RedisUnavailable:
            return problem_response(Problem.REDIS_UNAVAILABLE)
        except ContractViolation as error:
            return problem_response(Problem.FENCED, str(error))
        if sale is None:
            lost = self._engine.may_have_lost(item_id)
            return problem_response(Problem.FENCED if lost else Problem.UNKNOWN_ITEM)
        if sale.state(*server) is SaleState.FENCED:
            # Redis may have an older copy, or may have lost the reservation.
            return problem_response(Problem.FENCED)
        if record is None:
            return problem_response(Problem.UNKNOWN_RESERVATION)
        shown = OrderView.of(item_id, sale.sale_id, reservation_id, record)
        return Response(_encode(shown), media_type="application/json")


class _Change:
    """A call to confirm or cancel a reservation, until its answer."""

    __slots__ = (
        "_item_id",
        "_metrics",
        "_reservation_id",
        "_respond",
        "_started",
        "_transitions",
        "_verb",
    )

    def __init__(
        self,
        transitions: Transitions,
        metrics: Metrics,
        item_id: str,
        reservation_id: str,
        verb: str,
    ) -> None:
        self._transitions = transitions
        self._metrics = metrics
        self._item_id = item_id
        self._reservation_id = reservation_id
        self._verb = verb

    def begin(self, headers: RequestHeaders, raw: bytes | bytearray, respond: Respond) -> None:
        """Decides the call, and calls `respond` exactly once, immediately or later."""
        self._started = perf_counter()
        self._respond = respond
        try:
            call = self._call(headers, raw)
        except Refused as refused:
            answer = render(refused.problem, refused.detail, **refused.members)
            self._answer(refused.problem.outcome, *answer)
        else:
            self._transitions.change(self._item_id, call, self._decided)

    def _call(self, headers: RequestHeaders, raw: bytes | bytearray) -> OrderCall:
        """Parses the call. Raises `Refused`."""
        order_ref, sale_id = _body(_header(headers, b"content-type"), raw, self._verb)
        if not _exist(self._item_id, self._reservation_id):
            raise Refused(Problem.NOT_FOUND, _OTHER_FORM)
        traceparent = _header(headers, b"traceparent")
        if not TRACEPARENT.match(traceparent):
            traceparent = ""
        return OrderCall(self._reservation_id, order_ref, traceparent, sale_id)

    def _decided(self, decision: Decision, durable: bool) -> None:
        """Answers the call. Never raises."""
        try:
            answer = _answer_to(self._item_id, self._reservation_id, decision, durable=durable)
            self._answer(*answer)
        except Exception:  # after any error, the caller needs an answer
            log.exception("could not answer a call for %s", self._item_id)
            self._respond(*plain(Problem.INTERNAL_ERROR))

    def _answer(self, outcome: str, status: int, headers: Headers, body: bytes) -> None:
        label = self._metrics.label(self._item_id)
        self._metrics.transitions.labels(label, self._verb, outcome).inc()
        answer = "unacknowledged" if status == 202 else _ANSWERS.get(status // 100, "failed")
        seconds = perf_counter() - self._started
        self._metrics.order_seconds.labels(self._verb, answer).observe(seconds)
        self._respond(status, headers, body)


def _exist(item_id: str, reservation_id: str) -> bool:
    """Whether there can be such ids.

    If not, the caller wrote them differently, in upper case or percent-encoded. To say that the
    reservation is unknown would be final, and a shop would void the payment.
    """
    return bool(ITEM_ID.match(item_id) and RESERVATION_ID.match(reservation_id))


def _answer_to(
    item_id: str, reservation_id: str, decision: Decision, *, durable: bool
) -> tuple[str, int, Headers, bytes]:
    """Returns the outcome for the metrics, and the answer."""
    if decision.record is None:
        problem = PROBLEMS[decision.outcome]
        return problem.outcome, *render(problem, _DETAILS.get(problem))
    body = _encode(OrderView.of(item_id, decision.sale_id, reservation_id, decision.record))
    if durable:
        return decision.outcome, 200, (JSON,), body
    return "unacknowledged", 202, (JSON, _RETRY), body


def _header(headers: RequestHeaders, wanted: bytes) -> str:
    """Returns the first header of a name, or ""."""
    for name, value in headers:
        if name == wanted:
            return value.decode("latin-1")
    return ""


def _body(content_type: str, raw: bytes | bytearray, verb: str) -> tuple[str, str]:
    """Returns the order reference and the sale id in the body, or "". Raises `Refused`."""
    if verb == "cancel" and not raw:
        return "", ""
    body = (_CONFIRM if verb == "confirm" else _CANCEL).read(content_type, raw)
    return body.order_ref or "", body.sale_id or ""


class OrderPort:
    """The application of the order port. It takes requests with one of the tokens (RFC 6750).

    `HttpProtocol` calls the handlers of changes directly, and Starlette answers the rest.
    """

    def __init__(self, orders: Orders, tokens: Sequence[str], metrics: Metrics) -> None:
        self._orders = orders
        self._tokens = [token.encode() for token in tokens]
        self._metrics = metrics
        self._rest = rest_app([Route(_PATH, orders.reservation)], "openapi-orders.json")

    def direct(self, method: bytes, path: bytes) -> Handler | None:
        """Returns the handler of a request, or nothing if it takes the ASGI path."""
        if not (change := _CHANGE.fullmatch(path)):
            return None
        if method == b"POST":
            permitted = self._orders.change(*(part.decode("latin-1") for part in change.groups()))
        else:
            permitted = not_allowed("POST")

        def handle(headers: RequestHeaders, body: bytes | bytearray, respond: Respond) -> None:
            if len(body) > MAX_BODY_BYTES:
                respond(*plain(Problem.BODY_TOO_LARGE))
            elif problem := self._problem(headers):
                respond(*self._unauthorized(problem))
            else:
                permitted(headers, body, respond)

        return handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if problem := self._problem(scope["headers"]):
            await starlette_response(*self._unauthorized(problem))(scope, receive, send)
        else:
            await self._rest(scope, receive, send)

    def _unauthorized(self, problem: str) -> tuple[int, Headers, bytes]:
        self._metrics.transitions.labels("", "", Problem.UNAUTHORIZED.outcome).inc()
        return unauthorized(problem)

    def _problem(self, headers: RequestHeaders) -> str:
        """Returns the reason to refuse a request, or "". Takes the same time for any token."""
        token = bearer_token(headers)
        if not token:
            return UNAUTHENTICATED
        right = [hmac.compare_digest(token, own) for own in self._tokens]
        return "" if any(right) else "the API does not have this token"
