"""The bodies of the API's responses: reservations, and problem details (RFC 9457)."""

from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from http import HTTPStatus
from typing import Final, NamedTuple

import msgspec
from starlette.responses import Response

from flashsale.reservations import Record
from flashsale.sale import rfc3339_of_ms

CONTENT_TYPE: Final = b"application/problem+json"


class Kind(NamedTuple):
    """One kind of problem. `retry_after` is in seconds, if a retry can help."""

    slug: str
    status: int
    title: str
    retry_after: int | None = None


class Problem(Enum):
    """All problems that the API answers. The slug is the end of `type` and never changes."""

    MALFORMED_JSON = Kind("malformed-json", 400, "The body is not valid JSON")
    MALFORMED_REQUEST = Kind("malformed-request", 400, "The request is malformed")
    NOT_FOUND = Kind("not-found", 404, "The path does not exist")
    UNKNOWN_ITEM = Kind("unknown-item", 404, "The item has no sale")
    UNKNOWN_RESERVATION = Kind("unknown-reservation", 404, "The item has no such reservation")
    METHOD_NOT_ALLOWED = Kind("method-not-allowed", 405, "The path does not support this method")
    SOLD_OUT = Kind("sold-out", 409, "Sold out")
    NOT_ENOUGH_LEFT = Kind("not-enough-left", 409, "Fewer units are left than requested")
    LIMIT_REACHED = Kind("limit-reached", 409, "The user has reached the limit of this sale")
    NOT_OPEN = Kind("not-open", 409, "The sale is not open yet")
    ENDED = Kind("ended", 409, "The sale has ended")
    PAUSED = Kind("paused", 409, "The sale is paused", 5)
    BODY_TOO_LARGE = Kind("body-too-large", 413, "The body is too large")
    UNSUPPORTED_MEDIA_TYPE = Kind("unsupported-media-type", 415, "The body must be JSON")
    INVALID_FIELD = Kind("invalid-field", 422, "A field is missing or wrong")
    KEY_REUSED = Kind("key-reused", 422, "The Idempotency-Key was used with another quantity")
    INTERNAL_ERROR = Kind("internal-error", 500, "The API failed")
    OUTBOX_FULL = Kind("outbox-full", 503, "Too many accepted reservations wait to be published", 2)
    FENCED = Kind("fenced", 503, "The sale is being rebuilt after a Redis failure", 5)
    OTHER_ENGINE = Kind("other-engine", 503, "This pod meets the parts of another engine", 5)
    TOO_MANY_WAITING = Kind("too-many-waiting", 503, "Too many requests are waiting", 1)
    REDIS_UNAVAILABLE = Kind("redis-unavailable", 503, "Redis does not answer", 1)
    OUTCOME_UNKNOWN = Kind("outcome-unknown", 503, "The reservation may or may not exist", 1)


Headers = tuple[tuple[bytes, bytes], ...]


@lru_cache
def plain(problem: Problem) -> tuple[int, Headers, bytes]:
    """Renders a problem without details once. Most answers of a sold-out sale are such."""
    return render(problem)


def render(
    problem: Problem, detail: str | None = None, **members: object
) -> tuple[int, Headers, bytes]:
    """Returns status, headers and body of a problem. `members` are its extension members."""
    kind = problem.value
    body: dict[str, object] = {
        "type": f"urn:flashsale:problem:{kind.slug}",
        "title": kind.title,
        "status": kind.status,
    }
    if detail:
        body["detail"] = detail
    headers: Headers = ((b"content-type", CONTENT_TYPE),)
    if kind.retry_after is not None:
        headers = (*headers, (b"retry-after", b"%d" % kind.retry_after))
    return kind.status, headers, msgspec.json.encode(body | members)


def problem_response(
    problem: Problem, detail: str | None = None, *, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns a problem as Starlette's response, with additional `headers`."""
    status, own, body = render(problem, detail)
    made = Response(body, status, headers)
    made.raw_headers.extend(own)
    return made


def of_status(status: int) -> Problem:
    """Returns the problem for a status that Starlette raised."""
    match status:
        case HTTPStatus.NOT_FOUND:
            return Problem.NOT_FOUND
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return Problem.METHOD_NOT_ALLOWED
        case _ if status < 500:
            return Problem.MALFORMED_REQUEST
        case _:
            return Problem.INTERNAL_ERROR


class Reservation(msgspec.Struct, frozen=True, rename="camel"):
    """A reservation as JSON."""

    reservation_id: str
    sale_id: str
    item_id: str
    user_id: str
    quantity: int
    state: str
    accepted_at: str

    @classmethod
    def of(cls, item_id: str, sale_id: str, reservation_id: str, record: Record) -> "Reservation":
        return cls(
            reservation_id=reservation_id,
            sale_id=sale_id,
            item_id=item_id,
            user_id=record.user_id,
            quantity=record.quantity,
            state=record.state,
            accepted_at=rfc3339_of_ms(record.occurred_ms),
        )
