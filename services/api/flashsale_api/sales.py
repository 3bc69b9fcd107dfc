"""GET /sales and the paths below it: the public data of sales and reservations."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.fields import ITEM_ID_PATTERN, UUID_PATTERN
from flashsale.inventory import Inventory
from flashsale.sale import Sale, SaleState, rfc3339_of_ms
from flashsale_api.responses import Problem, Reservation, problem_response

CACHE_SECONDS: Final = 0.25
"""How old a sale in an answer can be."""

_ITEM_ID: Final = re.compile(ITEM_ID_PATTERN)
_UUID: Final = re.compile(UUID_PATTERN)


class SaleView(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A sale as JSON. Counts are in units, and times are RFC 3339."""

    item_id: str
    sale_id: str
    state: SaleState
    allocated: int
    available: int
    max_per_user: int
    display_name: str | None = None
    starts_at: str | None = None
    ends_at: str | None = None


class SaleViews:
    """A cache of sales. The pod reads each of them at most once per `CACHE_SECONDS`."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._cached: dict[str | None, tuple[float, asyncio.Task[list[SaleView]]]] = {}

    async def all(self) -> list[SaleView]:
        """Returns all sales that have keys, sorted by item."""
        return await self._read(None)

    async def one(self, item_id: str) -> SaleView | None:
        """Returns the sale of an item, or None if it has none."""
        views = await self._read(item_id)
        return views[0] if views else None

    async def _read(self, item_id: str | None) -> list[SaleView]:
        loop = asyncio.get_running_loop()
        now = loop.time()
        until, reading = self._cached.get(item_id, (0.0, None))
        if reading is None or now >= until:
            # Drop the expired entries, because requests can name any number of unknown items.
            self._cached = {key: entry for key, entry in self._cached.items() if now < entry[0]}
            reading = loop.create_task(self._fetch(item_id))
            self._cached[item_id] = (now + CACHE_SECONDS, reading)
        return await asyncio.shield(reading)

    async def _fetch(self, item_id: str | None) -> list[SaleView]:
        items = await self._inventory.items() if item_id is None else [item_id]
        server = await self._inventory.server()
        sales = await self._inventory.sales(items, skip_unreadable=item_id is None)
        return [_view(sale, sale.state(server.now_ms, server.run_id)) for sale in sales.values()]


class Sales:
    """The endpoints for sales and reservations."""

    def __init__(self, inventory: Inventory, views: SaleViews) -> None:
        self._inventory = inventory
        self._views = views

    async def list(self, _: Request) -> Response:
        async def answer() -> Response:
            return _fresh({"sales": await self._views.all()})

        return await _guarded(answer)

    async def one(self, request: Request) -> Response:
        item_id = request.path_params["item_id"]

        async def answer() -> Response:
            view = await self._views.one(item_id) if _ITEM_ID.match(item_id) else None
            return problem_response(Problem.UNKNOWN_ITEM) if view is None else _fresh(view)

        return await _guarded(answer)

    async def reservation(self, request: Request) -> Response:
        item_id, reservation_id = (
            request.path_params["item_id"],
            request.path_params["reservation_id"],
        )

        async def answer() -> Response:
            if not _ITEM_ID.match(item_id):
                return problem_response(Problem.UNKNOWN_ITEM)
            sale = (await self._inventory.sales([item_id])).get(item_id)
            if sale is None:
                return problem_response(Problem.UNKNOWN_ITEM)
            if _UUID.match(reservation_id):
                record = await self._inventory.reservation(item_id, reservation_id)
                if record is not None:
                    return _json(Reservation.of(item_id, sale.sale_id, reservation_id, record))
            server = await self._inventory.server()
            if sale.state(server.now_ms, server.run_id) is SaleState.FENCED:
                # Redis may have lost the reservation, while the ledger still has it.
                return problem_response(Problem.FENCED)
            return problem_response(Problem.UNKNOWN_RESERVATION)

        return await _guarded(answer)


async def _guarded(answer: Callable[[], Awaitable[Response]]) -> Response:
    try:
        return await answer()
    except RedisUnavailable:
        return problem_response(Problem.REDIS_UNAVAILABLE)
    except ContractViolation as error:
        return problem_response(Problem.FENCED, str(error))


def _view(sale: Sale, state: SaleState) -> SaleView:
    return SaleView(
        item_id=sale.item_id,
        sale_id=sale.sale_id,
        state=state,
        allocated=sale.allocated,
        available=sale.available,
        max_per_user=sale.max_per_user,
        display_name=sale.display_name,
        starts_at=None if sale.starts_ms is None else rfc3339_of_ms(sale.starts_ms),
        ends_at=None if sale.ends_ms is None else rfc3339_of_ms(sale.ends_ms),
    )


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _fresh(value: object) -> Response:
    response = _json(value)
    response.headers["cache-control"] = "max-age=1"
    return response
