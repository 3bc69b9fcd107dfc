"""Settling entries: several items per call, an item that fails, and one that moves. Needs Redis."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from redis.asyncio import Redis

from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.errors import RedisUnavailable
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Entry, Outbox
from flashsale.reservations import Request
from flashsale_api import settler as settler_module
from flashsale_api.settler import Settler
from tests.support import redis_users
from tests.support.api import OWN_SALE, UNKNOWN_ID
from tests.support.eventually import until

ITEM = OWN_SALE.item_id


class RecordingOutbox(Outbox):
    """Records the calls that settle items: each item with the number of entries."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self.settled: list[list[tuple[str, int]]] = []

    async def settle_all(
        self, pages: Sequence[tuple[str, Sequence[Entry]]]
    ) -> list[int | RedisUnavailable]:
        self.settled.append([(item_id, len(entries)) for item_id, entries in pages])
        return await super().settle_all(pages)


@pytest.fixture
async def outbox(own_redis: RedisServer) -> AsyncIterator[RecordingOutbox]:
    client = redis_client.connect(redis_users.url_of(own_redis, redis_users.API))
    yield RecordingOutbox(client)
    await client.aclose()


async def test_items_are_settled_in_turn(outbox: RecordingOutbox) -> None:
    settler = Settler(outbox, lambda _: None)
    for item_id, number in (("many", 600), ("few", 300), ("one", 1)):
        for n in range(number):
            settler.add(item_id, (f"{n}-1", f"id-{n}", 1))
    task = asyncio.create_task(settler.run())
    calls = [
        [("many", 256)],
        [("few", 256)],
        [("one", 1), ("many", 255)],
        [("few", 44), ("many", 89)],
    ]
    await until(lambda: outbox.settled == calls)
    task.cancel()


async def test_an_item_that_cannot_be_settled_waits_and_delays_no_other(
    own_redis: RedisServer,
    own_inventory: Inventory,
    outbox: RecordingOutbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its outbox has another type, so Redis refuses to read it."""
    monkeypatch.setattr(settler_module, "RETRY_SECONDS", 3600.0)
    await own_inventory.server()
    key = ItemKeys.of("broken").outbox
    admin = redis_client.connect(own_redis.url)
    await admin.set(key, "text")
    request = Request(UNKNOWN_ID, "ann", 1)
    await own_inventory.reserve(ITEM, [request], timeout_seconds=5)
    [entry] = (await outbox.page(ITEM, until_ms=2**50, count=10)).entries
    settler = Settler(outbox, lambda _: None)
    settler.add("broken", ("1-1", "no-id", 1))
    settler.add(ITEM, (entry.entry_id, UNKNOWN_ID, 1))
    task = asyncio.create_task(settler.run())

    async def settled() -> bool:
        return await outbox.lengths([ITEM]) == {ITEM: 0}

    await until(settled)
    settler.add("broken", ("2-1", "no-id", 1))
    for n in range(3):  # "broken" is not tried again meanwhile
        settler.add(ITEM, (f"{n}-1", UNKNOWN_ID, 1))
        await until(lambda n=n: len(outbox.settled) == n + 2)  # type: ignore[misc]
    assert outbox.settled == [[("broken", 1), (ITEM, 1)], *[[(ITEM, 1)]] * 3]
    await admin.delete(key)
    settler._try_again("broken")
    await until(lambda: outbox.settled[4:] == [[("broken", 2)]])
    task.cancel()
    await admin.aclose()


class MovingOutbox(RecordingOutbox):
    """The item moves from node A to node B during the first call, which then goes on."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self.node = "A"
        self.moved = asyncio.Event()

    def node_of(self, _: str) -> str:
        return self.node

    async def settle_all(
        self, pages: Sequence[tuple[str, Sequence[Entry]]]
    ) -> list[int | RedisUnavailable]:
        if self.node == "A":
            self.node = "B"
            await self.moved.wait()
        return await super().settle_all(pages)


@pytest.fixture
async def moving(own_redis: RedisServer) -> AsyncIterator[MovingOutbox]:
    client = redis_client.connect(redis_users.url_of(own_redis, redis_users.API))
    yield MovingOutbox(client)
    await client.aclose()


async def test_an_item_that_moves_during_its_settlement_is_settled_once(
    moving: MovingOutbox,
) -> None:
    settler = Settler(moving, lambda _: None)
    task = asyncio.create_task(settler.run())
    for first, count in ((0, 300), (300, 200)):
        for n in range(first, first + count):
            settler.add(ITEM, (f"{n}-1", f"id-{n}", 1))
        await until(lambda: moving.node == "B")
    await until(lambda: moving.settled == [[(ITEM, 244)]])
    moving.moved.set()
    await until(lambda: moving.settled == [[(ITEM, 244)], [(ITEM, 256)]])
    assert not task.done()
    task.cancel()


async def test_entries_of_an_item_that_moves_are_settled_without_a_further_event(
    moving: MovingOutbox,
) -> None:
    settler = Settler(moving, lambda _: None)
    for n in range(300):
        settler.add(ITEM, (f"{n}-1", f"id-{n}", 1))
    task = asyncio.create_task(settler.run())
    await until(lambda: moving.node == "B")
    moving.moved.set()
    await until(lambda: moving.settled == [[(ITEM, 256)], [(ITEM, 44)]])
    task.cancel()
