"""The engine that owns a Redis, a sale and its keys."""

import uuid
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from flashsale import heartbeat
from flashsale.errors import OtherEngine
from flashsale.inventory import Applied, Closed, Freed, Inventory
from flashsale.outbox import Outbox
from flashsale.reservations import BatchReply, Outcome
from tests.support.inventory import a_request, a_sale, opened, outcome


@pytest.mark.usefixtures("redis_server")
async def test_every_key_of_an_engine_begins_with_its_name(redis: Redis, item: str) -> None:
    name = f"brand-{uuid.uuid4().hex[:8]}"
    inventory = Inventory(redis, name)
    await inventory.index.claim("e-1")
    await opened(inventory, a_sale(item))
    assert await outcome(inventory, item, a_request()) is Outcome.ACCEPTED
    assert await Outbox(redis, name).take_lease(item, "pod", 1_000)
    await heartbeat.beat(redis, "pod", {item: 1}, await inventory.clocks(), name)
    keys = [key async for key in redis.scan_iter(f"*{name}*")]
    assert {key for key in keys if key.startswith(f"{name}:")} == set(keys)
    named = [key async for key in redis.scan_iter(f"*{item}*")]
    assert named
    assert {key for key in named if key.startswith(f"{name}:{{{item}}}:")} == set(named)


async def test_a_sale_of_another_engine_is_not_touched(inventory: Inventory, item: str) -> None:
    spec = a_sale(item)
    assert await inventory.apply(spec, 1, engine_id="one", seed_until_ms=2**53) is Applied.SEEDED
    request = [a_request()]
    reply = await inventory.reserve(item, request, timeout_seconds=5, engine_id="two")
    assert reply is Outcome.OTHER_ENGINE
    assert await inventory.apply(spec, 9, engine_id="two") is Applied.OTHER_ENGINE
    assert await inventory.close(item, spec.sale_id, 9, "two") is Closed.OTHER_ENGINE
    assert (
        await inventory.free(item, spec.sale_id, 1, accepted=0, released=0, engine_id="two")
        is Freed.OTHER_ENGINE
    )
    reply = await inventory.reserve(item, request, timeout_seconds=5, engine_id="one")
    assert isinstance(reply, BatchReply)
    assert reply.snapshot.engine == "one"


async def test_a_sale_of_the_previous_version_gets_its_engine(
    inventory: Inventory, item: str
) -> None:
    spec = await opened(inventory, a_sale(item))
    reply = await inventory.reserve(item, [a_request()], timeout_seconds=5, engine_id="one")
    assert isinstance(reply, BatchReply)
    assert reply.snapshot.engine == ""
    assert await inventory.apply(spec, 1, engine_id="one") is Applied.CHANGED
    assert await inventory.apply(spec, 1, engine_id="one") is Applied.UNCHANGED
    assert (await inventory.sales([item]))[item].accepted == 1
    assert (await inventory.sales([item]))[item].engine == "one"


async def test_a_caller_without_an_engine_leaves_the_sale_its_engine(
    inventory: Inventory, item: str
) -> None:
    spec = a_sale(item, 2)
    assert await inventory.apply(spec, 1, engine_id="one", seed_until_ms=2**53) is Applied.SEEDED
    assert await inventory.apply(spec, 1) is Applied.UNCHANGED
    assert await inventory.apply(replace(spec, stock=3), 2) is Applied.CHANGED
    sale = (await inventory.sales([item]))[item]
    assert (sale.allocated, sale.engine) == (3, "one")


async def test_a_redis_that_an_engine_has_claimed_is_refused_to_another(redis: Redis) -> None:
    inventory = Inventory(redis, f"brand-{uuid.uuid4().hex[:8]}")
    assert await inventory.index.engine_id() == ""
    await inventory.index.claim("one")
    await inventory.index.claim("one")
    with pytest.raises(OtherEngine, match="engine one, and the ledger to engine two"):
        await inventory.index.claim("two")
    assert await inventory.index.engine_id() == "one"
