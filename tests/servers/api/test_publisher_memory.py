"""The events in a publisher's memory: replays, acknowledged events and a backlog.

Kafka is absent. Needs Redis.
"""

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
from flashsale.reservations import Record, Request, Snapshot, State
from flashsale.settings import KafkaSettings
from flashsale_api import publisher as publisher_module
from flashsale_api import sweeper as sweeper_module
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Accepted, Publisher
from flashsale_api.sweeper import Sweeper
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


def accepted(item_id: str, number: int) -> Accepted:
    record = Record(State.CONFIRMED, 1, 1, 1_795_561_067_887, "ann", f"key-{number}")
    return Accepted(item_id, f"{number}-1", f"id-{number}", record, Snapshot("s", 9, 9, 1), "")


async def test_each_version_of_a_replayed_reservation_is_an_event_of_its_own(
    outbox: RecordingOutbox,
) -> None:
    """The acknowledgement of a reservation must not pass for that of its confirmation."""
    publisher = Publisher(
        KafkaSettings(kafka_bootstrap="127.0.0.1:1"), outbox, Metrics(), Engine("flashsale")
    )
    first = accepted(ITEM, 1)._replace(entry_id="")
    second = first._replace(record=first.record._replace(version=2))
    for event in (first, second, first, second):
        publisher.add(event)
    assert publisher.held == 2
    of_first, of_second = publisher.acknowledgement(first), publisher.acknowledgement(second)
    publisher._acknowledge([first])
    assert (of_first.done(), of_second.done()) == (True, False)
    of_second.cancel()
    await asyncio.sleep(0)
    assert not publisher._awaited


@pytest.fixture
def forgetful(outbox: RecordingOutbox, monkeypatch: pytest.MonkeyPatch) -> Publisher:
    """A publisher without Kafka that remembers at least two published replays."""
    monkeypatch.setattr(publisher_module, "REMEMBERED", 2)
    return Publisher(
        KafkaSettings(kafka_bootstrap="127.0.0.1:1"), outbox, Metrics(), Engine("flashsale")
    )


async def test_a_replay_is_published_once_until_it_is_forgotten(forgetful: Publisher) -> None:
    first, *others = (accepted(ITEM, number)._replace(entry_id="") for number in range(4))
    for event in (first, first):
        forgetful.add(event)
    assert forgetful.held == 1
    assert not forgetful.acknowledgement(first).done()
    forgetful._acknowledge([first])
    forgetful.add(first)
    assert forgetful.held == 0
    assert forgetful.acknowledgement(first).done()
    for event in others:
        forgetful.add(event)
    forgetful._acknowledge(others[:1])
    assert forgetful.acknowledgement(first).done()
    forgetful._acknowledge(others[1:])
    assert not forgetful.acknowledgement(first).done()
    forgetful.add(first)
    assert forgetful.held == 1


async def test_a_replay_is_published_again_in_another_revision_of_its_sale(
    forgetful: Publisher,
) -> None:
    replay = accepted(ITEM, 1)._replace(entry_id="")
    rebuilt = replay._replace(snapshot=replay.snapshot._replace(revision=2))
    for event in (replay, rebuilt):
        forgetful.add(event)
        assert forgetful.held == 1
        forgetful._acknowledge([event])
        assert forgetful.held == 0
        assert forgetful.acknowledgement(event).done()


async def test_the_memory_of_replays_is_bounded(forgetful: Publisher) -> None:
    for number in range(100):
        replay = accepted(ITEM, number)._replace(entry_id="")
        forgetful.add(replay)
        forgetful._acknowledge([replay])
        assert len(forgetful._recent) + len(forgetful._older) <= 4


async def test_an_acceptance_takes_no_memory_and_its_replay_is_published_once(
    forgetful: Publisher,
) -> None:
    first, *others = (accepted(ITEM, number) for number in range(6))
    replay = first._replace(entry_id="")
    for event in (first, replay, replay, *others):
        forgetful.add(event)
    assert forgetful.held == 7
    forgetful._acknowledge([first, replay, *others])
    assert forgetful.acknowledgement(replay).done()
    assert not forgetful.acknowledgement(others[0]).done()


async def test_items_are_settled_in_turn(outbox: RecordingOutbox) -> None:
    publisher = Publisher(
        KafkaSettings(kafka_bootstrap="127.0.0.1:1"), outbox, Metrics(), Engine("flashsale")
    )
    for item_id, number in (("many", 600), ("few", 300), ("one", 1)):
        publisher._acknowledged[item_id] = [(f"{n}-1", f"id-{n}", 1) for n in range(number)]
    publisher._to_settle.set()
    task = asyncio.create_task(publisher.settle())
    async with asyncio.timeout(10):
        while publisher._acknowledged:
            await asyncio.sleep(0.01)
    task.cancel()
    assert outbox.settled == [
        [("many", 256)],
        [("few", 256)],
        [("one", 1), ("many", 255)],
        [("few", 44), ("many", 89)],
    ]


async def test_an_item_that_cannot_be_settled_waits_and_delays_no_other(
    own_redis: RedisServer, own_inventory: Inventory, outbox: RecordingOutbox
) -> None:
    """Its outbox has another type, so Redis refuses to read it."""
    await own_inventory.server()
    key = ItemKeys.of("broken").outbox
    admin = redis_client.connect(own_redis.url)
    await admin.set(key, "text")
    request = Request(UNKNOWN_ID, "ann", 1)
    await own_inventory.reserve(ITEM, [request], timeout_seconds=5)
    [entry] = await outbox.page(ITEM, until_ms=2**50, count=10)
    publisher = Publisher(
        KafkaSettings(kafka_bootstrap="127.0.0.1:1"), outbox, Metrics(), Engine("flashsale")
    )
    publisher._acknowledged["broken"] = [("1-1", "no-id", 1)]
    publisher._acknowledged[ITEM] = [(entry.entry_id, UNKNOWN_ID, 1)]
    publisher._to_settle.set()
    task = asyncio.create_task(publisher.settle())

    async def settled() -> bool:
        return await outbox.lengths([ITEM]) == {ITEM: 0}

    await until(settled)
    assert outbox.settled == [[("broken", 1), (ITEM, 1)]]
    assert publisher._acknowledged == {"broken": [("1-1", "no-id", 1)]}
    await admin.delete(key)
    await until(lambda: not publisher._acknowledged)
    await until(lambda: outbox.settled[1:] == [[("broken", 1)]])
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


async def test_an_item_that_moves_during_its_settlement_is_settled_once(
    own_redis: RedisServer,
) -> None:
    client = redis_client.connect(redis_users.url_of(own_redis, redis_users.API))
    outbox = MovingOutbox(client)
    publisher = Publisher(
        KafkaSettings(kafka_bootstrap="127.0.0.1:1"), outbox, Metrics(), Engine("flashsale")
    )
    task = asyncio.create_task(publisher.settle())
    for first, count in ((0, 300), (300, 200)):
        entries = [(f"{n}-1", f"id-{n}", 1) for n in range(first, first + count)]
        publisher._acknowledged.setdefault(ITEM, []).extend(entries)
        publisher._to_settle.set()
        await until(lambda: outbox.node == "B")
    await until(lambda: outbox.settled == [[(ITEM, 244)]])
    outbox.moved.set()
    await until(lambda: outbox.settled == [[(ITEM, 244)], [(ITEM, 256)]])
    assert not task.done()
    task.cancel()
    await client.aclose()


async def test_a_pod_with_a_backlog_does_not_sweep(
    own_inventory: Inventory, outbox: RecordingOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage of Kafka, it would mostly read its own entries, again and again."""
    monkeypatch.setattr(sweeper_module, "BACKLOG", 10)
    monkeypatch.setattr(sweeper_module, "SWEEP_AGE_MS", -1_000)
    publisher = Publisher(
        KafkaSettings(kafka_bootstrap="127.0.0.1:1"), outbox, Metrics(), Engine("flashsale")
    )
    publisher.connected = True
    own = [accepted(ITEM, number) for number in range(10)]
    for each in own:
        publisher.add(each)
    others = Request(UNKNOWN_ID, "ann", 1)
    await own_inventory.reserve(ITEM, [others], timeout_seconds=5)
    sweeper = Sweeper(own_inventory, outbox, publisher, Metrics(), "pod")
    await sweeper.sweep()
    assert publisher.held == 10
    publisher._forget([(ITEM, own[0].entry_id)])
    await sweeper.sweep()
    assert publisher.held == 10
    assert publisher._pending[-1].reservation_id == others.reservation_id
