"""GET /sales and the paths below it: the public data of sales and reservations."""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from functools import partial
from hashlib import blake2b
from typing import Final, NamedTuple

import msgspec

from flashsale.clocks import ServerTime
from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.fields import ITEM_ID, RESERVATION_ID
from flashsale.inventory import Inventory
from flashsale.sale import Sale, SaleState, rfc3339_of_ms
from flashsale_api import responses
from flashsale_api.authentication import Authentication
from flashsale_api.engine import Engine
from flashsale_api.responses import (
    JSON,
    Handler,
    Headers,
    Problem,
    RequestHeaders,
    Reservation,
    Respond,
)

log = logging.getLogger(__name__)

SALES_PATH: Final = b"/sales"
FRESH_SECONDS: Final = 1.0
"""How long an encoded answer is sent without a look at Redis."""
STALE_SECONDS: Final = 3.0
"""How long an encoded answer is sent while the next one is read."""
MAX_READS: Final = 64
"""Requests that wait for Redis. Further ones are refused, so that they delay no other work.

As many can wait for items that the pod does not know. So made-up names take no reads away.
"""
PAGE: Final = 50
"""Sales in one read of all sales. Larger pages would delay buyers."""

_CACHED: Final = (
    b"cache-control",
    b"public, max-age=1, stale-while-revalidate=5, stale-if-error=60",
)

_UNKNOWN_ITEM: Final = responses.fixed(*responses.plain(Problem.UNKNOWN_ITEM))
_encode = msgspec.json.Encoder().encode


class SaleView(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """A sale as JSON. Counts are in units, and times are RFC 3339.

    `held` counts the units of open holds. A sale without holds has no such field. At
    `next_expiry_at` the engine expires the first open hold, unless it is confirmed before. A fenced
    sale has none of these and no `available`, because Redis may lack units.
    """

    item_id: str
    sale_id: str
    state: SaleState
    allocated: int
    available: int | None = None
    max_per_user: int
    held: int | None = None
    display_name: str | None = None
    starts_at: str | None = None
    ends_at: str | None = None
    next_expiry_at: str | None = None


class SaleList(msgspec.Struct, frozen=True, omit_defaults=True):
    """All sales as JSON. `unreadable` are items whose sale cannot be shown now.

    Redis may have lost it, its node may be away, or this version cannot read it.
    """

    sales: list[SaleView]
    unreadable: list[str] = []


class Encoded(NamedTuple):
    """An answer that many requests get, made at a time of the loop's clock."""

    made: float
    headers: Headers
    body: bytes

    @classmethod
    def of(cls, body: bytes, headers: Headers = (JSON,)) -> "Encoded":
        etag = b'"%b"' % blake2b(body, digest_size=8).hexdigest().encode()
        return cls(_now(), (*headers, _CACHED, (b"etag", etag)), body)

    def respond(self, headers: RequestHeaders, respond: Respond) -> None:
        """Answers a request, with 304 if the client has this answer."""
        etag = self.headers[-1]
        for name, value in headers:
            if name == b"if-none-match" and (value == b"*" or etag[1] in value):
                respond(304, (_CACHED, etag), b"")
                return
        respond(200, self.headers, self.body)


class Sales:
    """The endpoints for sales and reservations. `inventory` has its own connections.

    With `authentication`, a reservation is shown only to its user. Otherwise any caller who knows
    its id can read it, without the user.
    """

    def __init__(
        self, inventory: Inventory, engine: Engine, authentication: Authentication | None = None
    ) -> None:
        self._inventory = inventory
        self._engine = engine
        self._authentication = authentication
        self._encoded: dict[str, Encoded] = {}
        """The answers by item, and under "" that for all sales. An unknown item has none."""
        self._reading: dict[str, asyncio.Task[Encoded | None]] = {}
        self._reads = {True: 0, False: 0}
        """The requests that wait for Redis, of known items and of other names."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.all_sales: Handler = partial(self._sales, "")
        """The handler of GET /sales."""

    def handler(self, path: bytes) -> Handler | None:
        """Returns the handler of GET and HEAD requests for a path, or nothing if it is unknown."""
        match path.decode("latin-1").split("/"):
            case ["", "sales"]:
                return self.all_sales
            case ["", "sales", item_id]:
                return partial(self._sales, item_id) if ITEM_ID.match(item_id) else _UNKNOWN_ITEM
            case ["", "sales", item_id, "reservations", reservation_id] if reservation_id:
                if ITEM_ID.match(item_id):
                    return partial(self._reservation, item_id, reservation_id)
                return _UNKNOWN_ITEM
        return None

    def _sales(
        self,
        item_id: str,
        headers: RequestHeaders,
        _: bytes | bytearray,
        respond: Respond,
    ) -> None:
        """Answers with the sale of an item, or with all sales if `item_id` is empty."""
        encoded = self._encoded.get(item_id)
        age = STALE_SECONDS if encoded is None else _now() - encoded.made
        if encoded is not None and age < STALE_SECONDS:
            if age >= FRESH_SECONDS:
                self._read(item_id)
            encoded.respond(headers, respond)
        else:
            self._answer(item_id, self._wait(item_id, headers, respond), respond)

    def _reservation(
        self,
        item_id: str,
        reservation_id: str,
        headers: RequestHeaders,
        _: bytes | bytearray,
        respond: Respond,
    ) -> None:
        def look(user_id: str, reason: str) -> None:
            if reason:
                respond(*responses.unauthorized(reason))
            elif self._authentication is not None and not user_id:
                respond(*responses.plain(Problem.KEYS_UNAVAILABLE))
            else:
                work = self._look(item_id, reservation_id, user_id, respond)
                self._answer(item_id, work, respond)

        if self._authentication is None:
            look("", "")
        else:
            self._authentication.identify(headers, look)

    def _answer(self, item_id: str, work: Coroutine[None, None, None], respond: Respond) -> None:
        """Runs `work`, which answers a request, unless too many requests wait already."""
        known = not item_id or item_id in self._engine.items
        if self._reads[known] >= MAX_READS:
            work.close()
            respond(*responses.plain(Problem.TOO_MANY_WAITING))
            return
        task = asyncio.get_running_loop().create_task(self._guarded(known, work, respond))
        self._reads[known] += 1
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(
        self, known: bool, work: Coroutine[None, None, None], respond: Respond
    ) -> None:
        try:
            await work
        except RedisUnavailable:
            respond(*responses.plain(Problem.REDIS_UNAVAILABLE))
        except ContractViolation as error:
            respond(*responses.render(Problem.FENCED, str(error)))
        except Exception:  # after any error, the client needs an answer
            log.exception("could not answer a request")
            respond(*responses.plain(Problem.INTERNAL_ERROR))
        finally:
            # Not in a callback of the task: the client's next request could come before it.
            self._reads[known] -= 1

    async def _look(
        self, item_id: str, reservation_id: str, user_id: str, respond: Respond
    ) -> None:
        """Answers with a reservation. An empty `user_id` is an unknown caller."""
        known = RESERVATION_ID.match(reservation_id) is not None
        sale, record, server = await self._inventory.look(item_id, reservation_id if known else "")
        if sale is None:
            respond(*responses.plain(self._without_keys(item_id)))
        elif sale.state(*server) is SaleState.FENCED:
            # Redis may have an older copy, or may have lost the reservation.
            respond(*responses.plain(Problem.FENCED))
        elif record is not None and user_id in (record.user_id, ""):
            shown = Reservation.of(item_id, sale.sale_id, reservation_id, record)
            body = _encode(msgspec.structs.replace(shown, user_id=user_id or None))
            respond(200, (JSON, responses.NOT_STORED), body)
        else:
            respond(*responses.plain(Problem.UNKNOWN_RESERVATION))

    async def _wait(self, item_id: str, headers: RequestHeaders, respond: Respond) -> None:
        encoded = await asyncio.shield(self._read(item_id))
        if encoded is None:
            respond(*responses.plain(self._without_keys(item_id)))
        else:
            encoded.respond(headers, respond)

    def _without_keys(self, item_id: str) -> Problem:
        """Returns the problem of an item that has no sale in Redis."""
        lost = self._engine.may_have_lost(item_id)
        return Problem.FENCED if lost else Problem.UNKNOWN_ITEM

    def _read(self, item_id: str) -> "asyncio.Task[Encoded | None]":
        """Returns the task that encodes the next answer. There is one at a time."""
        reading = self._reading.get(item_id)
        if reading is None:
            work = self._sale(item_id) if item_id else self._all()
            reading = asyncio.get_running_loop().create_task(work)
            self._reading[item_id] = reading
            reading.add_done_callback(partial(self._read_ended, item_id))
        return reading

    def _read_ended(self, item_id: str, reading: "asyncio.Task[Encoded | None]") -> None:
        del self._reading[item_id]
        if reading.cancelled():
            return
        if error := reading.exception():
            log.debug("cannot read %s: %s", item_id or "the sales", error)
        elif (encoded := reading.result()) is not None:
            self._encoded[item_id] = encoded
        else:
            self._encoded.pop(item_id, None)

    async def _sale(self, item_id: str) -> Encoded | None:
        sale, _, server = await self._inventory.look(item_id)
        if sale is None:
            return None
        (view,) = await self._views({item_id: sale}, {item_id: server})
        return Encoded.of(_encode(view))

    async def _all(self) -> Encoded:
        items, claimed = await self._inventory.index.read()
        known = self._engine.items
        if not claimed:  # the index may lack items
            if not known.looks:
                raise ContractViolation("this pod cannot know all sales until Redis is claimed")
            items = sorted({*items, *known})
        servers = await self._inventory.servers(items)
        found = list(servers)
        views = []
        for at in range(0, len(found), PAGE):
            page = await self._inventory.sales(found[at : at + PAGE], skip_unreadable=True)
            views += await self._views(page, servers)
        # The answers of items without keys are never asked for again.
        listed = frozenset(items)
        self._encoded = {item: encoded for item, encoded in self._encoded.items() if item in listed}
        readable = {view.item_id for view in views}
        unreadable = [item for item in items if item not in readable]
        return Encoded.of(_encode(SaleList(views, unreadable)))

    async def _views(
        self, sales: Mapping[str, Sale], servers: Mapping[str, ServerTime]
    ) -> list[SaleView]:
        """Returns the views of sales by item. `servers` has each item's server."""
        held = {item_id: servers[item_id].now_ms for item_id, sale in sales.items() if sale.held}
        holds = await self._inventory.holds(held)
        return [
            _view(
                sale,
                sale.state(*servers[item_id]),
                holds[item_id].first_due_ms if item_id in holds else 0,
            )
            for item_id, sale in sales.items()
        ]


def _now() -> float:
    return asyncio.get_running_loop().time()


def _view(sale: Sale, state: SaleState, first_due_ms: int) -> SaleView:
    fenced = state is SaleState.FENCED
    return SaleView(
        item_id=sale.item_id,
        sale_id=sale.sale_id,
        state=state,
        allocated=sale.allocated,
        available=None if fenced else sale.available,
        max_per_user=sale.max_per_user,
        held=sale.held if (sale.hold_ms or sale.held) and not fenced else None,
        display_name=sale.display_name,
        starts_at=None if sale.starts_ms is None else rfc3339_of_ms(sale.starts_ms),
        ends_at=None if sale.ends_ms is None else rfc3339_of_ms(sale.ends_ms),
        # No hold of a fenced sale expires.
        next_expiry_at=rfc3339_of_ms(first_due_ms) if first_due_ms and not fenced else None,
    )
