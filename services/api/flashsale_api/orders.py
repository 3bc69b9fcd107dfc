"""The port of the shop's order service: confirm, cancel and read reservations."""

import hmac
import logging
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from time import perf_counter
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, ExceptionHandler, Receive, Scope, Send

from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.fields import ITEM_ID_PATTERN, UUID_PATTERN, OrderRef
from flashsale.inventory import Inventory
from flashsale.reservations import Call, Record, Transition
from flashsale.sale import SaleState
from flashsale_api.calls import Failure
from flashsale_api.metrics import Metrics
from flashsale_api.reserve import TRACEPARENT, JsonBody, Refused
from flashsale_api.responses import Problem, Reservation, problem_response
from flashsale_api.transitions import Decided, Transitions

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 1
"""`Retry-After` of a change that Kafka has not acknowledged yet."""

_ITEM_ID: Final = re.compile(ITEM_ID_PATTERN)
_UUID: Final = re.compile(UUID_PATTERN)
_PATH: Final = "/sales/{item_id}/reservations/{reservation_id}"

_PROBLEMS: Final = {
    Transition.UNKNOWN_RESERVATION: Problem.UNKNOWN_RESERVATION,
    Transition.HOLD_EXPIRED: Problem.HOLD_EXPIRED,
    Transition.CANCELLED: Problem.CANCELLED,
    Transition.OTHER_ORDER: Problem.OTHER_ORDER,
    Transition.UNKNOWN: Problem.UNKNOWN_ITEM,
    Transition.UNSUPPORTED: Problem.FENCED,
    Transition.FENCED: Problem.FENCED,
    Transition.OTHER_ENGINE: Problem.OTHER_ENGINE,
    Failure.TOO_MANY_WAITING: Problem.TOO_MANY_WAITING,
    Failure.REDIS_UNAVAILABLE: Problem.REDIS_UNAVAILABLE,
    Failure.OUTCOME_UNKNOWN: Problem.OUTCOME_UNKNOWN,
    Failure.INTERNAL_ERROR: Problem.INTERNAL_ERROR,
}
_DETAILS: Final = {
    Problem.HOLD_EXPIRED: "void the payment; the buyer can reserve again",
    Problem.CANCELLED: "void the payment",
    Problem.OTHER_ORDER: "it is confirmed, and only calls with its own orderRef are accepted",
    Problem.OUTCOME_UNKNOWN: "the change may have been made: repeat the call",
}


class ConfirmBody(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The body of a confirmation."""

    order_ref: OrderRef


class CancelBody(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The body of a cancellation. It may be empty."""

    order_ref: OrderRef | msgspec.UnsetType = msgspec.UNSET


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
    """The endpoints."""

    def __init__(
        self,
        inventory: Inventory,
        confirmations: Transitions,
        cancellations: Transitions,
        metrics: Metrics,
    ) -> None:
        self._inventory = inventory
        self._confirmations = confirmations
        self._cancellations = cancellations
        self._metrics = metrics

    async def confirm(self, request: Request) -> Response:
        return await self._answer(request, "confirm", self._confirmations)

    async def cancel(self, request: Request) -> Response:
        return await self._answer(request, "cancel", self._cancellations)

    async def reservation(self, request: Request) -> Response:  # noqa: PLR0911 - one per problem
        item_id, reservation_id = _names(request)
        if not _ITEM_ID.match(item_id):
            return problem_response(Problem.UNKNOWN_ITEM)
        if not _UUID.match(reservation_id):
            reservation_id = ""
        try:
            sale, record, server = await self._inventory.look(item_id, reservation_id)
        except RedisUnavailable:
            return problem_response(Problem.REDIS_UNAVAILABLE)
        except ContractViolation as error:
            return problem_response(Problem.FENCED, str(error))
        if sale is None:
            known = self._confirmations.sees(item_id) or self._cancellations.sees(item_id)
            return problem_response(Problem.FENCED if known else Problem.UNKNOWN_ITEM)
        if sale.state(*server) is SaleState.FENCED:
            # Redis may have an older copy, or may have lost the reservation.
            return problem_response(Problem.FENCED)
        if record is None:
            return problem_response(Problem.UNKNOWN_RESERVATION)
        return _json(OrderView.of(item_id, sale.sale_id, reservation_id, record))

    async def _answer(self, request: Request, verb: str, transitions: Transitions) -> Response:
        started = perf_counter()
        item_id, _ = _names(request)
        try:
            outcome, response = await self._change(request, verb, transitions)
        except Refused as refused:
            outcome = _slug(refused.problem)
            response = problem_response(refused.problem, refused.detail, members=refused.members)
        label = self._metrics.label(item_id)
        self._metrics.transitions.labels(label, verb, outcome).inc()
        answer = _ANSWERS.get(response.status_code // 100, "failed")
        if response.status_code == 202:
            answer = "unacknowledged"
        self._metrics.order_seconds.labels(verb, answer).observe(perf_counter() - started)
        return response

    async def _change(
        self, request: Request, verb: str, transitions: Transitions
    ) -> tuple[str, Response]:
        """Returns the outcome for the metrics, and the answer. Raises `Refused`."""
        order_ref = await _order_ref(request, verb)
        item_id, reservation_id = _names(request)
        if not _ITEM_ID.match(item_id):
            raise Refused(Problem.UNKNOWN_ITEM, "")
        if not _UUID.match(reservation_id):
            raise Refused(Problem.UNKNOWN_RESERVATION, "")
        traceparent = request.headers.get("traceparent", "")
        call = Call(
            reservation_id, order_ref, traceparent if TRACEPARENT.match(traceparent) else ""
        )
        decision, durable = await transitions.change(item_id, call)
        return _answer_to(item_id, reservation_id, decision, durable=durable)


_ANSWERS: Final = {2: "durable", 4: "rejected"}


def _answer_to(
    item_id: str, reservation_id: str, decision: Decided, *, durable: bool
) -> tuple[str, Response]:
    if decision.record is None:
        problem = _PROBLEMS[decision.outcome]
        return _slug(problem), problem_response(problem, _DETAILS.get(problem))
    response = _json(OrderView.of(item_id, decision.sale_id, reservation_id, decision.record))
    if durable:
        return decision.outcome, response
    response.status_code = 202
    response.headers["retry-after"] = str(RETRY_SECONDS)
    return "unacknowledged", response


def _slug(problem: Problem) -> str:
    return problem.value.slug.replace("-", "_")


async def _order_ref(request: Request, verb: str) -> str:
    """Returns the order reference in the body, or "". Raises `Refused`."""
    raw = await request.body()
    content_type = request.headers.get("content-type", "")
    if verb == "confirm":
        return _CONFIRM.read(content_type, raw).order_ref
    if not raw:
        return ""
    order_ref = _CANCEL.read(content_type, raw).order_ref
    return "" if isinstance(order_ref, msgspec.UnsetType) else order_ref


_CONFIRM: Final = JsonBody(ConfirmBody, quotes=4)
_CANCEL: Final = JsonBody(CancelBody, quotes=4)


def _names(request: Request) -> tuple[str, str]:
    return request.path_params["item_id"], request.path_params["reservation_id"]


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


class Authorized:
    """Passes on the requests that carry one of the tokens (RFC 6750)."""

    def __init__(self, app: ASGIApp, tokens: Sequence[str], metrics: Metrics) -> None:
        self._app = app
        self._tokens = [token.encode() for token in tokens]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if problem := self._problem(scope["headers"]):
            self._metrics.transitions.labels("", "", "unauthorized").inc()
            challenge = {"www-authenticate": "Bearer"}
            answer = problem_response(Problem.UNAUTHORIZED, problem, headers=challenge)
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _problem(self, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """Returns the reason to refuse a request, or "". Takes the same time for any token."""
        sent = [value for name, value in headers if name == b"authorization"]
        if len(sent) != 1:
            return "send one header Authorization: Bearer <token>"
        scheme, _, token = sent[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return "send the header Authorization: Bearer <token>"
        token = token.strip(b" ")
        right = [hmac.compare_digest(token, own) for own in self._tokens]
        return "" if any(right) else "the API does not have this token"


def order_app(
    orders: Orders,
    tokens: Sequence[str],
    metrics: Metrics,
    exception_handlers: Mapping[Any, ExceptionHandler],
) -> ASGIApp:
    """Makes the application of the order port."""
    description = (files("flashsale_api") / "openapi-orders.json").read_bytes()

    async def openapi(_: Request) -> Response:
        return Response(description, media_type="application/json")

    app = Starlette(
        routes=[
            Route("/openapi.json", openapi),
            Route(_PATH, orders.reservation),
            Route(f"{_PATH}/confirm", orders.confirm, methods=["POST"]),
            Route(f"{_PATH}/cancel", orders.cancel, methods=["POST"]),
        ],
        exception_handlers=exception_handlers,
    )
    app.router.redirect_slashes = False
    return Authorized(app, tokens, metrics)
