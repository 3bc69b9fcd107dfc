"""The bodies of the API's responses: reservations, and problem details (RFC 9457)."""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from itertools import chain
from typing import Final, NamedTuple, TypeAlias

import msgspec

from flashsale.reservations import Outcome, Record, Transition, Word
from flashsale.sale import rfc3339_of_ms
from flashsale_api.calls import Failure

CONTENT_TYPE: Final = b"application/problem+json"
JSON: Final = (b"content-type", b"application/json")
NOT_STORED: Final = (b"cache-control", b"no-store")
"""The header of an answer that no cache may repeat.

Many CDNs keep a 404 or a 501 without it for minutes. One stranger who asks for an item before its
sale exists could so hide the sale from all watchers.
"""


class Kind(NamedTuple):
    """One kind of problem. `retry_after` is in seconds, if a retry can help.

    `detail` is for a problem whose title alone misleads a new caller.
    """

    slug: str
    status: int
    title: str
    retry_after: int | None = None
    detail: str | None = None


class Problem(Enum):
    """All problems that the API answers. The slug is the end of `type` and never changes."""

    MALFORMED_JSON = Kind("malformed-json", 400, "The body is not valid JSON")
    MALFORMED_REQUEST = Kind("malformed-request", 400, "The request is malformed")
    UNAUTHORIZED = Kind("unauthorized", 401, "The caller is not authenticated")
    WRONG_USER = Kind("wrong-user", 403, "The body names another user")
    NOT_FOUND = Kind(
        "not-found",
        404,
        "The path does not exist",
        detail="GET /openapi.json lists the paths. Metrics have a port of their own",
    )
    UNKNOWN_ITEM = Kind(
        "unknown-item",
        404,
        "The item has no sale",
        detail="itemId is the spec.itemId of a FlashSale, which can differ from its name",
    )
    UNKNOWN_RESERVATION = Kind("unknown-reservation", 404, "The item has no such reservation")
    METHOD_NOT_ALLOWED = Kind("method-not-allowed", 405, "The path does not support this method")
    SOLD_OUT = Kind("sold-out", 409, "Sold out")
    HOLD_EXPIRED = Kind("hold-expired", 409, "The hold has expired")
    CANCELLED = Kind("cancelled", 409, "The reservation was cancelled")
    OTHER_ORDER = Kind("other-order", 409, "The reservation belongs to another order")
    OTHER_SALE = Kind("other-sale", 409, "The item has another sale now")
    TOO_MANY_HOLDS = Kind("too-many-holds", 409, "Too many holds of the user have expired")
    NOT_ENOUGH_LEFT = Kind("not-enough-left", 409, "Fewer units are left than requested")
    LIMIT_REACHED = Kind(
        "limit-reached",
        409,
        "The user would exceed the limit of this sale",
        detail="userUnits plus this quantity exceed maxPerUser",
    )
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
    KEYS_UNAVAILABLE = Kind("keys-unavailable", 503, "The issuer's keys cannot be read now", 1)
    OUTCOME_UNKNOWN = Kind("outcome-unknown", 503, "The reservation may or may not exist", 1)

    @property
    def outcome(self) -> str:
        """The problem as the metrics name it."""
        return self.value.slug.replace("-", "_")


_BY_WORD: Final = {
    **{problem.outcome: problem for problem in Problem},
    "unknown": Problem.UNKNOWN_ITEM,
    "unsupported": Problem.FENCED,
    "unreadable": Problem.FENCED,
}
PROBLEMS: Final[Mapping[Word, Problem]] = {
    word: _BY_WORD[word] for word in chain(Outcome, Transition, Failure) if word in _BY_WORD
}
"""The problem of each refusal of a script, and of each `Failure`. Most have the same name."""
RequestHeaders: TypeAlias = Sequence[tuple[bytes, bytes]]
"""Names in lower case, with their values."""
Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]
"""The headers of an answer."""
Respond: TypeAlias = Callable[[int, Headers, bytes], None]
"""Takes the status, the headers without a length, and the body."""
Handler: TypeAlias = Callable[[RequestHeaders, bytes | bytearray, Respond], None]
"""Takes the headers, the body (or a part of one that is too large), and a function.

It calls the function exactly once, immediately or later.
"""


@lru_cache
def plain(problem: Problem) -> tuple[int, Headers, bytes]:
    """Renders a problem without details once. Most answers of a sold-out sale are such."""
    return render(problem)


@lru_cache(maxsize=16)
def sold_out(held: int) -> tuple[int, Headers, bytes]:
    """Renders that a sale with holds is sold out. `held` units may still come back."""
    return render(Problem.SOLD_OUT, held=held)


@lru_cache(maxsize=64)
def limit_reached(limit: str) -> tuple[int, Headers, bytes]:
    """Renders that the user would exceed the limit. `limit` is the detail of the decision."""
    units, max_per_user = map(int, limit.split(" "))
    return render(Problem.LIMIT_REACHED, userUnits=units, maxPerUser=max_per_user)


def unauthorized(reason: str) -> tuple[int, Headers, bytes]:
    """Renders that the caller is not known, with the challenge that HTTP requires."""
    status, headers, body = render(Problem.UNAUTHORIZED, reason)
    return status, (*headers, (b"www-authenticate", b"Bearer")), body


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
    if detail := detail or kind.detail:
        body["detail"] = detail
    headers: Headers = ((b"content-type", CONTENT_TYPE), NOT_STORED)
    if kind.retry_after is not None:
        headers = (*headers, (b"retry-after", b"%d" % kind.retry_after))
    return kind.status, headers, msgspec.json.encode(body | members)


def fixed(status: int, headers: Headers, body: bytes) -> Handler:
    """Returns a handler that gives every request the same answer."""
    return lambda _headers, _body, respond: respond(status, headers, body)


def not_allowed(methods: str) -> Handler:
    """Returns the handler of a path that supports only `methods`."""
    status, headers, body = plain(Problem.METHOD_NOT_ALLOWED)
    return fixed(status, (*headers, (b"allow", methods.encode())), body)


class Reservation(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """A reservation as JSON. `expires_at` is set if it was a hold.

    `user_id` is not shown to a caller who may be a stranger.
    """

    reservation_id: str
    sale_id: str
    item_id: str
    user_id: str | None = None
    quantity: int
    state: str
    accepted_at: str
    expires_at: str | None = None
    confirmed_at: str | None = None

    @classmethod
    def of(cls, item_id: str, sale_id: str, reservation_id: str, record: Record) -> "Reservation":
        return cls(
            reservation_id=reservation_id,
            sale_id=sale_id,
            item_id=item_id,
            user_id=record.user_id,
            quantity=record.quantity,
            state=record.state,
            accepted_at=rfc3339_of_ms(record.accepted_ms),
            expires_at=_time(record.expires_ms),
            confirmed_at=_time(record.confirmed_ms),
        )


def _time(ms: int | None) -> str | None:
    return None if ms is None else rfc3339_of_ms(ms)
