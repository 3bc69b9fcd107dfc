"""Holds, and the calls that end them."""

from redis.asyncio import Redis

from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.reservations import (
    Expired,
    OrderCall,
    Outcome,
    Record,
    Transition,
    TransitionAnswer,
    TransitionReply,
    Verb,
)
from tests.support.inventory import a_request, outcome

TRACE = f"00-{'a' * 32}-{'b' * 16}-01"


async def changes(
    inventory: Inventory, verb: Verb, item: str, *calls: OrderCall
) -> list[TransitionAnswer]:
    reply = await inventory.change(verb, item, calls, timeout_seconds=5)
    assert isinstance(reply, TransitionReply)
    return list(reply.answers)


async def change(
    inventory: Inventory, verb: Verb, item: str, reservation_id: str, order_ref: str = ""
) -> Transition:
    [answer] = await changes(inventory, verb, item, OrderCall(reservation_id, order_ref))
    return answer.outcome


async def expire(inventory: Inventory, item: str, limit: int = 100) -> list[str]:
    reply = await inventory.expire(item, limit, timeout_seconds=5)
    assert isinstance(reply, Expired)
    return [reservation_id for reservation_id, _, _ in reply.holds]


async def make_due(redis: Redis, item: str, *reservation_ids: str) -> None:
    """Makes holds due, as if their time and grace were over."""
    key = ItemKeys.of(item).holds
    await redis.zadd(key, dict.fromkeys(reservation_ids, 1), xx=True)


async def hold(inventory: Inventory, item: str, user: str = "ann", quantity: int = 1) -> str:
    request = a_request(user, quantity)
    assert await outcome(inventory, item, request) is Outcome.ACCEPTED
    return request.reservation_id


async def record_of(inventory: Inventory, item: str, reservation_id: str) -> Record:
    _, record, _ = await inventory.look(item, reservation_id)
    assert record is not None
    return record


async def counts(inventory: Inventory, item: str) -> tuple[int, int, int]:
    """Returns the accepted, released and held units."""
    sale = (await inventory.sales([item]))[item]
    return sale.accepted, sale.released, sale.held


async def contents(redis: Redis, item: str) -> list[object]:
    """Returns everything that a script could change."""
    keys = ItemKeys.of(item)
    return [
        await redis.hgetall(keys.sale),
        await redis.hgetall(keys.buyers),
        await redis.hgetall(keys.reservations),
        await redis.xrange(keys.outbox),
        await redis.zrange(keys.holds, 0, -1, withscores=True),
    ]
