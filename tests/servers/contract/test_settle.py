"""`settle.lua` on real servers: an event leaves the outbox once, and a release counts once."""

from dataclasses import replace
from pathlib import Path

import pytest
import redis as blocking
from redis.asyncio import Redis

from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.errors import RedisUnavailable
from flashsale.inventory import Applied, Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Outbox
from flashsale.reservations import OrderCall, Outcome, TransitionReply
from tests.support.inventory import a_request, a_sale, answers, drained, opened, outcome
from tests.support.redis_clusters import Deployment, servers_of

Named = tuple[str, str, int]


async def a_cancellation(inventory: Inventory, outbox: Outbox, item: str) -> Named:
    """Sells the only unit of a sale, cancels it, and returns the entry of the cancellation."""
    await opened(inventory, a_sale(item, 1, hold_seconds=60))
    request = a_request()
    assert await outcome(inventory, item, request) is Outcome.ACCEPTED
    await drained(outbox, item)
    reply = await inventory.change(
        "cancel", item, [OrderCall(request.reservation_id)], timeout_seconds=5
    )
    assert isinstance(reply, TransitionReply)
    [answer] = reply.answers
    return answer.entry_id, request.reservation_id, 2


async def an_acceptance(inventory: Inventory, item: str, user: str) -> Named:
    """Sells a unit, and returns the entry of the acceptance."""
    request = a_request(user)
    [answer] = await answers(inventory, item, [request])
    assert answer.outcome is Outcome.ACCEPTED
    return answer.detail, request.reservation_id, 1


async def released(inventory: Inventory, item: str) -> int:
    return (await inventory.sales([item]))[item].released


async def test_settle_keeps_an_entry_of_another_reservation(
    inventory: Inventory, outbox: Outbox, item: str
) -> None:
    await opened(inventory, a_sale(item))
    mine, other = a_request("ann"), a_request("bob")
    [first, second] = await answers(inventory, item, [mine, other])
    assert await outbox.settle(item, [(first.detail, other.reservation_id, 1)]) == 0
    assert await outbox.settle(item, [(first.detail, mine.reservation_id, 1)] * 2) == 1
    assert await outbox.settle(item, [(first.detail, mine.reservation_id, 1)]) == 0
    assert (await inventory.sales([item]))[item].outbox_length == 1
    page = (await outbox.page(item, until_ms=2**50, count=9)).entries
    assert [entry.entry_id for entry in page] == [second.detail]


async def test_settle_keeps_an_entry_of_another_version(
    inventory: Inventory, outbox: Outbox, item: str
) -> None:
    entry_id, own_id, version = await a_cancellation(inventory, outbox, item)
    for other in (version - 1, version + 1, 10 * version):
        assert await outbox.settle(item, [(entry_id, own_id, other)]) == 0
    assert await released(inventory, item) == 0
    assert await outbox.settle(item, [(entry_id, own_id, version)]) == 1


async def test_a_released_unit_above_a_lowered_stock_is_not_sold_again(
    inventory: Inventory, outbox: Outbox, item: str
) -> None:
    spec = await opened(inventory, a_sale(item, 3, hold_seconds=60))
    requests = [a_request(f"u{n}") for n in range(3)]
    await answers(inventory, item, requests)
    assert await inventory.apply(replace(spec, stock=1), 2) is Applied.CHANGED
    for left, request in zip((2, 1, 0), requests, strict=True):
        await inventory.change(
            "cancel", item, [OrderCall(request.reservation_id)], timeout_seconds=5
        )
        await drained(outbox, item)
        sale = (await inventory.sales([item]))[item]
        assert (sale.taken, sale.allocated) == (left, max(1, left))
        sold_out = await outcome(inventory, item, a_request()) is Outcome.SOLD_OUT
        assert sold_out is (left > 0)


async def test_settle_reads_no_entry_of_an_acceptance(
    inventory: Inventory, outbox: Outbox, deployment: Deployment, item: str
) -> None:
    await opened(inventory, a_sale(item))
    entries = [await an_acceptance(inventory, item, user) for user in ("ann", "bob", "eve")]
    servers = servers_of(deployment)
    for server in servers:
        with blocking.Redis.from_url(server.url) as client:
            client.config_resetstat()
    assert await outbox.settle(item, entries) == len(entries)
    for server in servers:
        with blocking.Redis.from_url(server.url) as client:
            assert "cmdstat_xrange" not in client.info("commandstats")


async def test_settle_reads_an_entry_from_before_the_clock_was_set_back(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item))
    later = await redis.xadd(ItemKeys.of(item).outbox, {"id": "later"}, id=f"{2**45}-7")
    entry_id, own_id, version = await an_acceptance(inventory, item, "ann")
    assert entry_id == f"{2**45}-8"
    assert await outbox.settle(item, [(entry_id, own_id, version + 1)]) == 0
    assert await outbox.settle(item, [(str(later), own_id, version)]) == 0
    assert await outbox.settle(item, [(entry_id, own_id, version)]) == 1


async def test_a_unit_is_sold_again_only_after_its_release_is_settled(
    inventory: Inventory, outbox: Outbox, item: str
) -> None:
    entry = await a_cancellation(inventory, outbox, item)
    assert await outcome(inventory, item, a_request("ann")) is Outcome.LIMIT_REACHED
    assert await outcome(inventory, item, a_request("bob")) is Outcome.SOLD_OUT
    assert await outbox.settle(item, [entry]) == 1
    assert await outcome(inventory, item, a_request("ann")) is Outcome.ACCEPTED
    assert await outcome(inventory, item, a_request("bob")) is Outcome.SOLD_OUT


async def test_a_release_that_is_settled_again_counts_once(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str
) -> None:
    entry = await a_cancellation(inventory, outbox, item)
    assert await outbox.settle(item, [entry, entry]) == 1
    assert await outbox.settle(item, [entry]) == 0
    assert await released(inventory, item) == 1
    assert await redis.hgetall(ItemKeys.of(item).buyers) == {"ann": "0"}


async def cancelled(inventory: Inventory, outbox: Outbox, item: str, *users: str) -> list[Named]:
    """Sells a unit to each user, cancels all, and returns the entries of the cancellations."""
    requests = [a_request(user) for user in users]
    await opened(inventory, a_sale(item, len(users), max_per_user=2, hold_seconds=60))
    await answers(inventory, item, requests)
    await drained(outbox, item)
    calls = [OrderCall(request.reservation_id) for request in requests]
    reply = await inventory.change("cancel", item, calls, timeout_seconds=5)
    assert isinstance(reply, TransitionReply)
    return [
        (answer.entry_id, call.reservation_id, 2)
        for call, answer in zip(calls, reply.answers, strict=True)
    ]


async def test_releases_of_one_buyer_in_one_call_all_count(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str
) -> None:
    entries = await cancelled(inventory, outbox, item, "ann", "bob", "ann")
    assert await outbox.settle(item, entries) == 3
    assert await released(inventory, item) == 3
    assert await redis.hgetall(ItemKeys.of(item).buyers) == {"ann": "0", "bob": "0"}


@pytest.mark.parametrize("text", ["text", "1,", ""])
async def test_a_damaged_buyer_keeps_its_entry_and_no_other(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str, text: str
) -> None:
    entries = await cancelled(inventory, outbox, item, "ann", "bob", "eve")
    buyers = ItemKeys.of(item).buyers
    await redis.hset(buyers, "bob", text)
    assert await outbox.settle(item, entries) == 2
    assert await released(inventory, item) == 2
    assert await redis.hgetall(buyers) == {"ann": "0", "bob": text, "eve": "0"}
    page = (await outbox.page(item, until_ms=2**50, count=9)).entries
    assert [entry.entry_id for entry in page] == [entries[1][0]]
    # A repair gives the unit back.
    await redis.hset(buyers, "bob", "1")
    assert await outbox.settle(item, entries) == 1
    assert await released(inventory, item) == 3


async def test_a_damaged_buyer_does_not_keep_a_fenced_sale_from_its_rebuild(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str
) -> None:
    entries = await cancelled(inventory, outbox, item, "ann")
    await redis.hset(ItemKeys.of(item).buyers, "ann", "text")
    await redis.hset(ItemKeys.of(item).sale, "run_id", "rebuild:2")
    assert await outbox.settle(item, entries) == 1


async def test_buyers_of_the_wrong_type_keep_all_entries(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str
) -> None:
    entries = await cancelled(inventory, outbox, item, "ann", "bob")
    await redis.set(ItemKeys.of(item).buyers, "text")
    with pytest.raises(RedisUnavailable, match="WRONGTYPE"):
        await outbox.settle(item, entries)
    assert await redis.xlen(ItemKeys.of(item).outbox) == 2


async def test_a_fenced_sale_releases_nothing(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str
) -> None:
    entry = await a_cancellation(inventory, outbox, item)
    await redis.hset(ItemKeys.of(item).sale, "run_id", "rebuild:2")
    assert await outbox.settle(item, [entry]) == 1
    assert await released(inventory, item) == 0
    assert await redis.hgetall(ItemKeys.of(item).buyers) == {"ann": "1"}


async def test_a_release_waits_for_a_pod_that_can_read_the_sale(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str
) -> None:
    entry = await a_cancellation(inventory, outbox, item)
    await redis.hset(ItemKeys.of(item).sale, "format", "2")
    assert await outbox.settle(item, [entry]) == 0
    await redis.hset(ItemKeys.of(item).sale, "format", "1")
    assert await outbox.settle(item, [entry]) == 1
    assert await released(inventory, item) == 1


async def test_an_item_without_a_sale_has_nothing_to_settle(outbox: Outbox, item: str) -> None:
    assert await outbox.settle(item, [("1-1", "id", 1)]) == 0


async def test_settle_frees_memory_and_units_on_a_full_server(
    tmp_path: Path, redis_server: RedisServer, item: str
) -> None:
    with RedisServer(tmp_path, binary=redis_server.binary) as server:
        client = redis_client.connect(server.url)
        inventory, outbox = Inventory(client), Outbox(client)
        entry = await a_cancellation(inventory, outbox, item)
        await client.config_set("maxmemory", "1")
        assert await outbox.settle(item, [entry]) == 1
        await client.config_set("maxmemory", "0")
        sale = (await inventory.sales([item]))[item]
        assert (sale.released, sale.outbox_length) == (1, 0)
        assert await client.hgetall(ItemKeys.of(item).buyers) == {"ann": "0"}
        await client.aclose()


async def test_a_lease_under_the_clock_of_a_former_server_is_shortened(
    redis: Redis, outbox: Outbox, item: str
) -> None:
    """Its owner died before a failover to a server whose clock is a minute behind."""
    key = ItemKeys.of(item).sweeper
    assert await outbox.take_lease(item, "dead", 60_000)
    assert not await outbox.take_lease(item, "pod", 10_000)
    assert await redis.pttl(key) <= 10_000
    await redis.pexpire(key, 5_000)
    assert not await outbox.take_lease(item, "pod", 10_000)
    assert await redis.pttl(key) <= 5_000
