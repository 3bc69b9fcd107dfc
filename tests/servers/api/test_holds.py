"""Reservations that are held: the buyers' answers, and the end of holds by the sweep."""

from datetime import datetime

import httpx
from redis.asyncio import Redis

from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.reservations import OrderCall, Transition, TransitionReply
from tests.support.api import OpenSale, problem, reserve


async def cancel(inventory: Inventory, item: str, answer: httpx.Response) -> None:
    call = OrderCall(answer.json()["reservationId"])
    reply = await inventory.change("cancel", item, [call], timeout_seconds=5)
    assert isinstance(reply, TransitionReply)
    assert [one.outcome for one in reply.answers] == [Transition.CHANGED]


async def expire(inventory: Inventory, redis: Redis, item: str) -> None:
    """Ends all holds of the item, as if their time were over."""
    holds = ItemKeys.of(item).holds
    await redis.zadd(holds, {str(member): 1 for member in await redis.zrange(holds, 0, -1)})
    await inventory.expire(item, 128, timeout_seconds=5)


async def test_a_reservation_of_a_sale_with_holds_shows_when_it_expires(
    http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, hold_seconds=60)
    answer = await reserve(http, item)
    body = answer.json()
    assert (answer.status_code, body["state"]) == (202, "held")
    accepted_at, expires_at = (
        datetime.fromisoformat(body[field]) for field in ("acceptedAt", "expiresAt")
    )
    assert (expires_at - accepted_at).total_seconds() == 60
    assert "confirmedAt" not in body
    del body["userId"]
    assert (await http.get(answer.headers["location"])).json() == body


async def test_sold_out_carries_the_held_units_and_says_nothing_of_them_without_holds(
    http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 3, max_per_user=2, hold_seconds=60)
    assert (await reserve(http, item, quantity=2)).status_code == 202
    assert (await reserve(http, item, "bob")).status_code == 202
    # The second answer is from the pod's memory. A request with a key always asks Redis.
    for key in ("k", "", "", "l"):
        assert problem(await reserve(http, item, "cid", key=key), 409, "sold-out")["held"] == 3
    assert (await http.get(f"/sales/{item}")).json()["held"] == 3
    without = f"{item}-2"
    await open_sale(without, 0)
    assert "held" not in problem(await reserve(http, without), 409, "sold-out")
    assert "held" not in (await http.get(f"/sales/{without}")).json()


async def test_a_repeated_request_for_an_ended_reservation_says_how_it_ended(
    http: httpx.AsyncClient, open_sale: OpenSale, inventory: Inventory, redis: Redis, item: str
) -> None:
    await open_sale(item, max_per_user=9, hold_seconds=60)
    await cancel(inventory, item, await reserve(http, item, key="cancelled"))
    problem(await reserve(http, item, key="cancelled"), 409, "cancelled")
    assert (await reserve(http, item, key="expired")).status_code == 202
    await expire(inventory, redis, item)
    problem(await reserve(http, item, key="expired"), 409, "hold-expired")
    assert (await reserve(http, item, key="new")).status_code == 202
