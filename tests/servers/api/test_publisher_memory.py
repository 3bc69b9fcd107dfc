"""The events in a publisher's memory: replays, and a backlog that stops the sweep.

Kafka is absent. Needs Redis.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Outbox, Page
from flashsale.reservations import OutboxEntry, Record, Request, Snapshot, State
from flashsale.settings import KafkaSettings
from flashsale_api import known_items
from flashsale_api import publisher as publisher_module
from flashsale_api import sweeper as sweeper_module
from flashsale_api.engine import Engine, GroupOwner, OwnerUnknown
from flashsale_api.known_items import KnownItems
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher
from flashsale_api.sweeper import Sweeper
from tests.support import redis_users
from tests.support.api import OWN_SALE, UNKNOWN_ID
from tests.support.eventually import until

ITEM = OWN_SALE.item_id


@pytest.fixture
async def outbox(own_redis: RedisServer) -> AsyncIterator[Outbox]:
    client = redis_client.connect(redis_users.url_of(own_redis, redis_users.API))
    yield Outbox(client)
    await client.aclose()


def accepted(item_id: str, number: int) -> OutboxEntry:
    record = Record(State.CONFIRMED, 1, 1, 1_795_561_067_887, "ann", f"key-{number}")
    return OutboxEntry(item_id, f"{number}-1", f"id-{number}", record, Snapshot("s", 9, 9, 1), "")


async def test_each_version_of_a_replayed_reservation_is_an_event_of_its_own(
    outbox: Outbox,
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
def forgetful(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> Publisher:
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


async def test_a_replay_is_published_again_in_a_later_sale_of_the_item(
    forgetful: Publisher,
) -> None:
    """A user who uses the same key again has the same reservation id, version and revision."""
    replay = accepted(ITEM, 1)._replace(entry_id="")
    later = replay._replace(snapshot=replay.snapshot._replace(sale_id="another"))
    forgetful.add(replay)
    forgetful._acknowledge([replay])
    forgetful.add(later)
    assert forgetful.held == 1
    assert not forgetful.acknowledgement(later).done()


async def test_the_replay_of_a_former_sale_does_not_pass_for_that_of_a_later_sale(
    forgetful: Publisher,
) -> None:
    """The pod holds the former replay while Kafka is away for it only."""
    former = accepted(ITEM, 1)._replace(entry_id="")
    later = former._replace(snapshot=former.snapshot._replace(sale_id="another"))
    for event in (former, later):
        forgetful.add(event)
    assert forgetful.held == 2
    of_former, of_later = forgetful.acknowledgement(former), forgetful.acknowledgement(later)
    forgetful._acknowledge([former])
    assert (of_former.done(), of_later.done()) == (True, False)
    forgetful._acknowledge([later])
    assert of_later.done()


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


async def test_a_pod_with_a_backlog_does_not_sweep(
    own_inventory: Inventory, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
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
    sweeper = Sweeper(own_inventory, outbox, publisher, Metrics(), known=KnownItems(), pod_id="pod")
    await sweeper.sweep()
    assert publisher.held == 10
    # Acknowledged events can wait for a node that is away. The others are swept meanwhile.
    publisher._pending.clear()
    publisher._acknowledge(own)
    await sweeper.sweep()
    assert publisher.held == 11
    assert publisher._pending[-1].reservation_id == others.reservation_id


async def test_a_damaged_entry_is_logged_once_and_stops_no_other(
    own_redis: RedisServer,
    own_inventory: Inventory,
    outbox: Outbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sweeper_module, "SWEEP_AGE_MS", -1_000)
    monkeypatch.setattr(sweeper_module, "SWEEP_PAGE", 1)
    publisher = Publisher(
        KafkaSettings(kafka_bootstrap="127.0.0.1:1"), outbox, Metrics(), Engine("flashsale")
    )
    publisher.connected = True
    admin = redis_client.connect(own_redis.url)
    await admin.xadd(
        ItemKeys.of(ITEM).outbox,
        {"id": UNKNOWN_ID, "record": "parked,1,1,1,ann,", "sale": "s,9,9,1", "traceparent": ""},
        id="1-1",
    )
    await admin.aclose()
    await own_inventory.reserve(ITEM, [Request(UNKNOWN_ID, "ann", 1)], timeout_seconds=5)
    sweeper = Sweeper(own_inventory, outbox, publisher, Metrics(), known=KnownItems(), pod_id="pod")
    for _ in range(2):
        await sweeper.sweep()
    assert publisher.held == 1
    assert caplog.text.count("outbox entry 1-1 cannot be read") == 1


async def test_damaged_entries_are_read_and_logged_once_a_minute_by_each_pod(
    own_redis: RedisServer,
    own_inventory: Inventory,
    outbox: Outbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Such as the entries of a newer version, whose pods are gone."""
    monkeypatch.setattr(sweeper_module, "SWEEP_AGE_MS", -1_000)
    monkeypatch.setattr(sweeper_module, "SWEEP_PAGE", 2)
    parsed: list[str] = []
    parse = OutboxEntry.parse

    def counted(item_id: str, entry_id: str, fields: dict[str, str]) -> OutboxEntry:
        parsed.append(entry_id)
        return parse(item_id, entry_id, fields)

    monkeypatch.setattr(OutboxEntry, "parse", counted)
    publishers, sweepers = [], []
    for pod_id in ("first", "second"):
        kafka = KafkaSettings(kafka_bootstrap="127.0.0.1:1")
        publisher = Publisher(kafka, outbox, Metrics(), Engine("flashsale"))
        publisher.connected = True
        publishers.append(publisher)
        sweepers.append(
            Sweeper(own_inventory, outbox, publisher, Metrics(), known=KnownItems(), pod_id=pod_id)
        )
    key = ItemKeys.of(ITEM).outbox
    async with redis_client.connect(own_redis.url) as admin:
        for number in range(1, 6):
            await admin.xadd(key, {"id": UNKNOWN_ID, "record": "parked"}, id=f"1-{number}")
        for _ in range(3):
            for sweeper in sweepers:
                await sweeper.sweep()
        assert sorted(parsed) == sorted(2 * [f"1-{number}" for number in range(1, 6)])
        assert caplog.text.count("cannot be read") == len(sweepers)
        assert "1-1 cannot be read" in caplog.text
        assert "(1 of 5)" in caplog.text
        parsed.clear()
        await own_inventory.reserve(ITEM, [Request(UNKNOWN_ID, "ann", 1)], timeout_seconds=5)
        await sweepers[0].sweep()
        assert [publisher.held for publisher in publishers] == [1, 0]
        assert len(parsed) == 1
        await admin.xdel(key, "1-1")
        for known in sweepers[0]._unreadable.values():
            known.reread_at = 0.0
        await sweepers[0].sweep()
        assert "(1 of 4)" in caplog.text
        assert len(parsed) == 6


async def test_an_entry_of_a_clock_that_was_ahead_is_swept(
    own_redis: RedisServer, own_inventory: Inventory, outbox: Outbox
) -> None:
    publisher = Publisher(
        KafkaSettings(kafka_bootstrap="127.0.0.1:1"), outbox, Metrics(), Engine("flashsale")
    )
    publisher.connected = True
    ahead = (await own_inventory.server(ITEM)).now_ms + 600_000
    admin = redis_client.connect(own_redis.url)
    await admin.hset(ItemKeys.of(ITEM).sale, "last_now_ms", str(ahead))
    await admin.aclose()
    request = Request(UNKNOWN_ID, "ann", 1)
    await own_inventory.reserve(ITEM, [request], timeout_seconds=5)
    sweeper = Sweeper(own_inventory, outbox, publisher, Metrics(), known=KnownItems(), pod_id="pod")
    await sweeper.sweep()
    assert publisher.held == 1


async def test_a_sweep_reads_no_outbox_whose_entries_are_young(
    own_inventory: Inventory, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand busy sales would otherwise take a third of the pod's time."""
    monkeypatch.setattr(sweeper_module, "SWEEP_AGE_MS", 3_600_000)
    read: list[str] = []
    page = outbox.page

    async def noted(item_id: str, *, after: str = "-", until_ms: int, count: int) -> Page:
        read.append(item_id)
        return await page(item_id, after=after, until_ms=until_ms, count=count)

    monkeypatch.setattr(outbox, "page", noted)
    publisher = Publisher(
        KafkaSettings(kafka_bootstrap="127.0.0.1:1"), outbox, Metrics(), Engine("flashsale")
    )
    publisher.connected = True
    await own_inventory.reserve(ITEM, [Request(UNKNOWN_ID, "ann", 1)], timeout_seconds=5)
    sweeper = Sweeper(own_inventory, outbox, publisher, Metrics(), known=KnownItems(), pod_id="pod")
    await sweeper.sweep()
    assert (read, publisher.held) == ([], 0)
    monkeypatch.setattr(sweeper_module, "SWEEP_AGE_MS", -1_000)
    await sweeper.sweep()
    assert ITEM in read
    assert publisher.held == 1


async def test_an_item_of_the_index_is_known_however_long_its_keys_are_lost(
    own_redis: RedisServer,
    own_inventory: Inventory,
    outbox: Outbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its sale cannot be rebuilt while PostgreSQL is away. A 404 would void payments meanwhile."""
    monkeypatch.setattr(known_items, "LOOKS", 1)
    known = KnownItems()
    publisher = Publisher(
        KafkaSettings(kafka_bootstrap="127.0.0.1:1"), outbox, Metrics(), Engine("flashsale")
    )
    sweeper = Sweeper(own_inventory, outbox, publisher, Metrics(), known=known, pod_id="pod")
    admin = redis_client.connect(own_redis.url)
    await admin.delete(*ItemKeys.of(ITEM).sold)
    for _ in range(2):
        await sweeper.sweep()
        assert ITEM in known
    await own_inventory.index.remove(ITEM)
    await sweeper.sweep()
    assert ITEM not in known, "its sale was freed"
    await admin.aclose()


async def test_a_wrong_certificate_is_an_outage_of_kafka(outbox: Outbox, tmp_path: Path) -> None:
    """A Secret that was renewed wrongly must not end the pods: sales go on meanwhile."""
    renewed = tmp_path / "ca.crt"
    trustme.CA().cert_pem.write_to_path(str(renewed))
    settings = KafkaSettings(
        kafka_bootstrap="127.0.0.1:1", kafka_tls=True, kafka_ca_file=str(renewed)
    )
    renewed.write_text("no certificate")
    metrics = Metrics()
    publisher = Publisher(settings, outbox, metrics, Engine("flashsale"))
    task = asyncio.create_task(publisher.run())
    name = "flashsale_api_publish_failures_total"
    await until(lambda: (metrics.registry.get_sample_value(name) or 0) >= 2)
    assert not task.done()
    task.cancel()
    with pytest.raises(OwnerUnknown, match="KAFKA_CA_FILE"):
        await GroupOwner(settings).read()
