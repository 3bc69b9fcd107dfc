"""Confirmations, cancellations and expiries that the scripts refuse."""

from pathlib import Path

import pytest
from redis.asyncio import Redis

from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.errors import RedisUnavailable
from flashsale.inventory import Applied, Inventory
from flashsale.keys import ItemKeys
from flashsale.reservations import (
    OrderCall,
    Outcome,
    Transition,
    TransitionAnswer,
    Verb,
)
from tests.support.inventory import a_request, a_sale, opened, outcome
from tests.support.transitions import TRACE, change, changes, contents, expire, hold, make_due


@pytest.mark.parametrize("verb", ["confirm", "cancel"])
async def test_a_reservation_that_redis_does_not_have_is_unknown(
    inventory: Inventory, redis: Redis, item: str, verb: Verb
) -> None:
    await opened(inventory, a_sale(item, hold_seconds=60))
    before = await contents(redis, item)
    assert await change(inventory, verb, item, "absent", "o") is Transition.UNKNOWN_RESERVATION
    assert await contents(redis, item) == before


@pytest.mark.parametrize(
    "bad",
    [
        OrderCall("", "order-1"),
        OrderCall("comma,comma", "order-1"),
        OrderCall("line\nline", "order-1"),
        OrderCall("id", "comma,comma"),
        OrderCall("id", "line\nline"),
        OrderCall("id", "order-1", "line\nline"),
        OrderCall("id", "order-1", TRACE, "comma,comma"),
        OrderCall("id", "order-1", "", "line\nline"),
    ],
)
@pytest.mark.parametrize("verb", ["confirm", "cancel"])
async def test_a_malformed_batch_of_calls_changes_nothing(
    inventory: Inventory, redis: Redis, item: str, verb: Verb, bad: OrderCall
) -> None:
    await opened(inventory, a_sale(item, hold_seconds=60))
    good = OrderCall(await hold(inventory, item), "order-1")
    before = await contents(redis, item)
    for batch in ([], [bad], [good, bad], [bad, good]):
        with pytest.raises(RedisUnavailable) as refused:
            await changes(inventory, verb, item, *batch)
        assert not refused.value.maybe_executed
    assert await contents(redis, item) == before


async def test_a_confirmation_without_an_order_changes_nothing(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item, hold_seconds=60))
    own_id, other = await hold(inventory, item), await hold(inventory, item, "bob")
    before = await contents(redis, item)
    with pytest.raises(RedisUnavailable, match="no order reference"):
        await changes(
            inventory, "confirm", item, OrderCall(other, "order-1"), OrderCall(own_id, "", TRACE)
        )
    assert await contents(redis, item) == before


@pytest.mark.parametrize("limit", [0, -1])
async def test_an_expiry_without_a_limit_changes_nothing(
    inventory: Inventory, redis: Redis, item: str, limit: int
) -> None:
    await opened(inventory, a_sale(item, hold_seconds=60))
    await make_due(redis, item, await hold(inventory, item))
    before = await contents(redis, item)
    with pytest.raises(RedisUnavailable, match="limit below 1"):
        await expire(inventory, item, limit)
    assert await contents(redis, item) == before


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, Transition.OTHER_ENGINE),
        ({"run_id": "rebuild:2", "engine": ""}, Transition.FENCED),
        ({"format": "2"}, Transition.UNSUPPORTED),
        ({"hold_ms": "long"}, Transition.UNSUPPORTED),
    ],
)
async def test_a_sale_that_is_not_the_callers_to_change_is_not_changed(
    inventory: Inventory, redis: Redis, item: str, changed: dict[str, str], expected: Transition
) -> None:
    spec = a_sale(item, hold_seconds=60)
    assert await inventory.apply(spec, 1, engine_id="one", seed_until_ms=2**53) is Applied.SEEDED
    own_id = await hold(inventory, item)
    await make_due(redis, item, own_id)
    for field, value in changed.items():
        await redis.hset(ItemKeys.of(item).sale, field, value)
    before = await contents(redis, item)
    calls = [OrderCall(own_id, "order-1")]
    found = [
        await inventory.change("confirm", item, calls, timeout_seconds=5, engine_id="two"),
        await inventory.change("cancel", item, calls, timeout_seconds=5, engine_id="two"),
        await inventory.expire(item, 9, timeout_seconds=5, engine_id="two"),
    ]
    assert found == [expected] * 3
    assert await contents(redis, item) == before


async def test_an_item_without_a_sale_has_nothing_to_change(
    inventory: Inventory, item: str
) -> None:
    calls = [OrderCall("id", "order-1")]
    assert await inventory.change("confirm", item, calls, timeout_seconds=5) is Transition.UNKNOWN
    assert await inventory.change("cancel", item, calls, timeout_seconds=5) is Transition.UNKNOWN
    assert await inventory.expire(item, 9, timeout_seconds=5) is Transition.UNKNOWN


async def test_a_sale_that_lost_its_holds_is_fenced(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    spec = await opened(inventory, a_sale(item, hold_seconds=60))
    own_id = await hold(inventory, item)
    await redis.delete(ItemKeys.of(item).holds)
    assert (await inventory.sales([item]))[item].torn
    assert await outcome(inventory, item, a_request("bob")) is Outcome.FENCED
    assert await inventory.apply(spec, 2) is Applied.FENCED
    reply = await inventory.change(
        "confirm", item, [OrderCall(own_id, "order-1")], timeout_seconds=5
    )
    assert reply is Transition.FENCED


@pytest.mark.parametrize("verb", ["confirm", "cancel"])
async def test_holds_of_the_wrong_type_let_no_hold_end(
    inventory: Inventory, redis: Redis, item: str, verb: Verb
) -> None:
    """Otherwise the hold ends, and the sale counts its units as held for ever."""
    await opened(inventory, a_sale(item, hold_seconds=60))
    own_id, keys = await hold(inventory, item), ItemKeys.of(item)
    await redis.set(keys.holds, "text")
    with pytest.raises(RedisUnavailable, match="WRONGTYPE"):
        await change(inventory, verb, item, own_id, "order-1")
    assert await redis.xlen(keys.outbox) == 1
    assert str(await redis.hget(keys.reservations, own_id)).startswith("held,1,")
    assert await redis.hget(keys.sale, "held") == "1"


@pytest.mark.parametrize("record", ["text", "held,1,1,1,ann,,text", ""])
@pytest.mark.parametrize("verb", ["confirm", "cancel"])
async def test_a_damaged_record_fails_no_other_call_of_its_batch(
    inventory: Inventory, redis: Redis, item: str, verb: Verb, record: str
) -> None:
    await opened(inventory, a_sale(item, hold_seconds=60))
    damaged, good = await hold(inventory, item), await hold(inventory, item, "bob")
    await redis.hset(ItemKeys.of(item).reservations, damaged, record)
    calls = [OrderCall(damaged, "order-1"), OrderCall(good, "order-2")]
    first, second = await changes(inventory, verb, item, *calls)
    assert first == TransitionAnswer(Transition.UNREADABLE)
    assert second.outcome is Transition.CHANGED
    assert await redis.hget(ItemKeys.of(item).reservations, damaged) == record


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_damaged_records_do_not_stop_the_expiry_of_other_holds(
    inventory: Inventory, redis: Redis, item: str, limit: int
) -> None:
    """Their ids stay first among the holds that are due."""
    await opened(inventory, a_sale(item, hold_seconds=60))
    own_ids = sorted([await hold(inventory, item, f"user-{n}") for n in range(9)])
    *damaged, missing, first, second, third = own_ids
    keys = ItemKeys.of(item)
    await redis.hset(keys.reservations, mapping=dict.fromkeys(damaged, "text"))
    await redis.hdel(keys.reservations, missing)
    await make_due(redis, item, *own_ids)
    ended: list[str] = []
    while batch := await expire(inventory, item, limit):
        assert len(batch) <= limit
        ended += batch
    assert ended == [first, second, third]
    assert await redis.zrange(keys.holds, 0, -1) == [*damaged, missing]
    assert await redis.hget(keys.sale, "held") == "6"


async def test_a_full_outbox_refuses_buyers_but_no_transition(redis: Redis, item: str) -> None:
    inventory = Inventory(redis, outbox_limit=3)
    await opened(inventory, a_sale(item, hold_seconds=60))
    first, second, third = [await hold(inventory, item, f"user-{n}") for n in range(3)]
    assert await outcome(inventory, item, a_request("bob")) is Outcome.OUTBOX_FULL
    assert await change(inventory, "confirm", item, first, "order-1") is Transition.CHANGED
    assert await change(inventory, "cancel", item, second) is Transition.CHANGED
    await make_due(redis, item, third)
    assert await expire(inventory, item) == [third]


async def test_a_server_out_of_memory_changes_no_reservation(
    tmp_path: Path, redis_server: RedisServer, item: str
) -> None:
    with RedisServer(tmp_path, binary=redis_server.binary) as server:
        client = redis_client.connect(server.url)
        inventory = Inventory(client)
        await opened(inventory, a_sale(item, hold_seconds=60))
        own_id = await hold(inventory, item)
        await make_due(client, item, own_id)
        before = await contents(client, item)
        await client.config_set("maxmemory", "1")
        with pytest.raises(RedisUnavailable) as refused:
            await change(inventory, "confirm", item, own_id, "order-1")
        assert not refused.value.maybe_executed
        with pytest.raises(RedisUnavailable):
            await change(inventory, "cancel", item, own_id)
        with pytest.raises(RedisUnavailable):
            await expire(inventory, item)
        assert await contents(client, item) == before
        await client.config_set("maxmemory", "0")
        assert await change(inventory, "confirm", item, own_id, "order-1") is Transition.CHANGED
        await client.aclose()
