"""Calls of `reserve.lua` and `settle.lua` with several items, on real servers."""

import asyncio

import pytest
from redis.asyncio import Redis

from dev.stack.servers import RedisCluster, RedisServer
from flashsale import redis_client
from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.inventory import Inventory, ItemReply
from flashsale.keys import ItemKeys
from flashsale.nodes import ITEMS_PER_CALL
from flashsale.outbox import Outbox
from flashsale.reservations import BATCH_LIMIT, BatchReply, Outcome
from tests.support.inventory import a_request, a_sale, opened
from tests.support.redis_clusters import Deployment


async def test_each_item_is_decided_as_if_it_were_alone(
    inventory: Inventory, outbox: Outbox, redis_server: RedisServer, item: str
) -> None:
    del redis_server
    await opened(inventory, a_sale(f"{item}-one", 1))
    await opened(inventory, a_sale(f"{item}-paused", 5, paused=True))
    await opened(inventory, a_sale(f"{item}-two", 2))
    buyers = [a_request(user) for user in ("ann", "bob", "eve")]
    items = [f"{item}-{name}" for name in ("one", "none", "paused", "two")]
    replies = await inventory.reserve_all([(each, buyers) for each in items], timeout_seconds=5)
    assert [_outcomes(reply) for reply in replies] == [
        ["accepted", "sold_out", "sold_out"],
        "unknown",
        ["paused"] * 3,
        ["accepted", "accepted", "sold_out"],
    ]
    again = await inventory.reserve_all([(items[3], buyers), (items[0], buyers)], timeout_seconds=5)
    assert [_outcomes(reply) for reply in again] == [
        ["replayed", "replayed", "sold_out"],
        ["replayed", "sold_out", "sold_out"],
    ]
    pages = []
    for each in items:
        entries = (await outbox.page(each, until_ms=2**50, count=10)).entries
        named = [(entry.entry_id, entry.reservation_id, 1) for entry in entries]
        pages.append((each, named or [("1-1", "no-id", 1)]))
    assert await outbox.settle_all(pages) == [1, 0, 0, 2]
    assert set((await outbox.lengths(items)).values()) == {0}


async def test_an_item_gets_nothing_of_the_item_before_it(
    inventory: Inventory, redis: Redis, redis_server: RedisServer, item: str
) -> None:
    """The script uses its lists again for each item of a call."""
    del redis_server
    many, few = f"{item}-many", f"{item}-few"
    for each in (many, few):
        await opened(inventory, a_sale(each, 5, hold_seconds=60))
    last = a_request("dan")
    buyers = [a_request(user) for user in ("ann", "bob", "eve")]
    first, second = await inventory.reserve_all([(many, buyers), (few, [last])], timeout_seconds=5)
    assert (_outcomes(first), _outcomes(second)) == (["accepted"] * 3, ["accepted"])
    keys = ItemKeys.of(few)
    assert await redis.hkeys(keys.reservations) == [last.reservation_id]
    assert await redis.hgetall(keys.buyers) == {"dan": "1"}
    assert await redis.zrange(keys.holds, 0, -1) == [last.reservation_id]
    assert await redis.xlen(keys.outbox) == 1


async def test_an_item_that_redis_refuses_disturbs_no_other(
    inventory: Inventory, outbox: Outbox, redis: Redis, redis_server: RedisServer, item: str
) -> None:
    del redis_server
    broken, other = f"{item}-broken", f"{item}-other"
    for each in (broken, other):
        await opened(inventory, a_sale(each))
    await redis.set(ItemKeys.of(broken).reservations, "not a hash")
    batches = [(broken, [a_request()]), (other, [a_request("comma,comma")]), (item, [a_request()])]
    first, second, third = await inventory.reserve_all(batches, timeout_seconds=5)
    assert isinstance(first, RedisUnavailable)
    assert "WRONGTYPE" in str(first)
    assert isinstance(second, RedisUnavailable)
    assert "malformed batch" in str(second)
    assert third is Outcome.UNKNOWN
    with pytest.raises(RedisUnavailable, match="WRONGTYPE") as refused:
        await inventory.reserve_all(batches[:2], timeout_seconds=5)
    assert not refused.value.maybe_executed
    [last] = await inventory.reserve_all([(other, [a_request()])], timeout_seconds=5)
    assert _outcomes(last) == ["accepted"]
    await redis.set(ItemKeys.of(broken).outbox, "not a stream")
    [entry] = (await outbox.page(other, until_ms=2**50, count=10)).entries
    named = [(entry.entry_id, entry.reservation_id, 1)]
    refusal, deleted = await outbox.settle_all([(broken, [("1-1", "no-id", 1)]), (other, named)])
    assert isinstance(refusal, RedisUnavailable)
    assert deleted == 1


@pytest.mark.parametrize("field", ["sale_id", "engine"])
async def test_an_item_whose_reply_cannot_be_read_disturbs_no_other(
    inventory: Inventory, redis: Redis, redis_server: RedisServer, item: str, field: str
) -> None:
    del redis_server
    damaged, other = f"{item}-damaged", f"{item}-other"
    for each in (damaged, other):
        await opened(inventory, a_sale(each))
    await redis.hset(ItemKeys.of(damaged).sale, field, "a,b")
    batches = [(damaged, [a_request()]), (other, [a_request()])]
    first, second = await inventory.reserve_all(batches, timeout_seconds=5)
    assert isinstance(first, ContractViolation)
    assert _outcomes(second) == ["accepted"]


async def test_the_largest_call_is_decided(
    inventory: Inventory, redis_server: RedisServer, item: str
) -> None:
    del redis_server
    share = BATCH_LIMIT // ITEMS_PER_CALL
    items = [f"{item}-{n}" for n in range(ITEMS_PER_CALL)]
    await asyncio.gather(*(opened(inventory, a_sale(each, share)) for each in items))
    buyers = [a_request(f"user-{n}") for n in range(share)]
    replies = await inventory.reserve_all([(each, buyers) for each in items], timeout_seconds=5)
    assert [_outcomes(reply) for reply in replies] == [["accepted"] * share] * ITEMS_PER_CALL


async def test_a_call_in_a_cluster_has_one_item(deployment: Deployment) -> None:
    client = redis_client.connect(deployment.url)
    inventory = Inventory(client)
    await inventory.server()
    clustered = isinstance(deployment, RedisCluster)
    assert inventory.items_per_call == (1 if clustered else ITEMS_PER_CALL)
    assert Outbox(client).items_per_call == inventory.items_per_call
    await client.aclose()


def _outcomes(reply: ItemReply) -> list[str] | str:
    if isinstance(reply, BatchReply):
        return [answer.outcome for answer in reply.answers]
    return str(reply)
