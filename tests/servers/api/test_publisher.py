"""Accepted reservations reach Kafka, even if Kafka or the pod fails. Needs Redis and Kafka."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord

from dev.crowd import stampede
from dev.journal import Attempt, Journal
from dev.services import Addresses, ApiServer
from dev.stack.servers import KafkaServer, RedisServer
from flashsale import events, heartbeat, redis_client
from flashsale.inventory import Applied, Inventory
from flashsale.reservations import Request
from flashsale.sale import SaleSpec
from tests.support import redis_users
from tests.support.api import UNKNOWN_ID, reserve
from tests.support.eventually import until
from tests.support.topics import create_topic

ITEM = "phone"
SPEC = SaleSpec("default/phone", ITEM, 100_000, max_per_user=10)


@pytest.fixture
def redis_here(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis", options=redis_users.options()) as server:
        yield server


@pytest.fixture
async def inventory_here(redis_here: RedisServer) -> AsyncIterator[Inventory]:
    client = redis_client.connect(redis_here.url)
    inventory = Inventory(client)
    assert await inventory.apply(SPEC, 1, seed_until_ms=2**53) is Applied.SEEDED
    yield inventory
    await client.aclose()


@pytest.fixture
def kafka_here(tmp_path: Path) -> Iterator[KafkaServer]:
    """A broker that the test starts, stops or kills."""
    server = KafkaServer(tmp_path / "kafka")
    yield server
    server.kill()


@pytest.fixture
def new_api(
    tmp_path: Path, redis_here: RedisServer, kafka_here: KafkaServer
) -> Iterator[Callable[[str], ApiServer]]:
    servers = []

    def make(name: str) -> ApiServer:
        url = redis_users.url_of(redis_here, redis_users.API)
        addresses = Addresses(url, kafka_here.bootstrap, "")
        servers.append(ApiServer(tmp_path / name, addresses))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


async def start_kafka(kafka: KafkaServer) -> None:
    await asyncio.to_thread(kafka.start)
    await create_topic(kafka.bootstrap, events.topic(), 3)


async def published(kafka: KafkaServer) -> list[ConsumerRecord[bytes, bytes]]:
    """Return all records of the topic."""
    consumer = AIOKafkaConsumer(
        events.topic(), bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        ends = await consumer.end_offsets(sorted(consumer.assignment()))
        records: list[ConsumerRecord[bytes, bytes]] = []
        async with asyncio.timeout(30):
            while len(records) < sum(ends.values()):
                for page in (await consumer.getmany(timeout_ms=200)).values():
                    records += page
        return records
    finally:
        await consumer.stop()


async def outbox_is_empty(inventory: Inventory) -> None:
    async def empty() -> bool:
        return not (await inventory.sales([ITEM]))[ITEM].outbox_length

    await until(empty)


async def producer_is_discarded(api: ApiServer) -> None:
    """Wait until Kafka has been down for so long that the API has discarded a producer."""
    async with httpx.AsyncClient() as http:

        async def discarded() -> bool:
            text = (await http.get(api.metrics_url)).text
            return "flashsale_api_publish_failures_total 0.0" not in text

        await until(discarded, pause=0.2)


def a_crowd(number: int, name: str = "u") -> list[Attempt]:
    return [
        Attempt(f"{name}{n}", {"userId": f"{name}{n}", "itemId": ITEM, "quantity": 2}, f"key-{n}")
        for n in range(number)
    ]


def ids(records: list[ConsumerRecord[bytes, bytes]]) -> set[str]:
    return {events.decode(record.value).reservation_id for record in records}


async def test_a_pod_that_answers_a_replay_also_publishes_it(
    kafka_here: KafkaServer,
    new_api: Callable[[str], ApiServer],
    redis_here: RedisServer,
    inventory_here: Inventory,
) -> None:
    """A dead pod accepted the reservation, and Redis loses it after the second 202."""
    request = {"userId": "ann", "itemId": ITEM, "quantity": 2}
    first, second = new_api("first"), new_api("second")
    await asyncio.to_thread(first.start)
    async with httpx.AsyncClient(base_url=first.url) as http:
        answer = await http.post("/reserve", json=request, headers={"Idempotency-Key": "k"})
    first.kill()
    await asyncio.to_thread(second.start)
    async with httpx.AsyncClient(base_url=second.url) as http:
        for _ in range(3):  # several replays are one event
            again = await http.post("/reserve", json=request, headers={"Idempotency-Key": "k"})
            assert (again.status_code, again.json()) == (202, answer.json())
    sale = (await inventory_here.sales([ITEM]))[ITEM]
    assert (sale.accepted, sale.outbox_length) == (2, 1)
    client = redis_client.connect(redis_here.url)
    await client.flushall()
    await client.aclose()
    await start_kafka(kafka_here)
    records = await until(lambda: published(kafka_here), pause=0.2)
    assert ids(records) == {answer.json()["reservationId"]}
    assert len(records) == 1


async def test_an_event_carries_the_reservation_and_its_sale(
    kafka_here: KafkaServer,
    new_api: Callable[[str], ApiServer],
    inventory_here: Inventory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASHSALE_TRUST_TRACEPARENT", "true")
    await start_kafka(kafka_here)
    api = new_api("api")
    await asyncio.to_thread(api.start)
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    async with httpx.AsyncClient(base_url=api.url) as http:
        answer = await http.post(
            "/reserve",
            json={"userId": "ann", "itemId": ITEM, "quantity": 2},
            headers={"Idempotency-Key": "k", "traceparent": trace},
        )
    shown: dict[str, Any] = answer.json()
    await outbox_is_empty(inventory_here)
    [record] = await published(kafka_here)
    assert record.key == shown["reservationId"].encode()
    assert dict(record.headers) == {
        "traceparent": trace.encode(),
        "content-type": b"application/json",
        "schema": b"1",
    }
    event = events.decode(record.value)
    assert event.accepted_at.isoformat(timespec="milliseconds")[:23] == shown["acceptedAt"][:23]
    assert (event.reservation_id, event.sale_id, event.item_id, event.user_id) == (
        shown["reservationId"],
        "default/phone",
        ITEM,
        "ann",
    )
    assert (event.quantity, event.state, event.version, event.request_key) == (
        2,
        "confirmed",
        1,
        "k",
    )
    assert (event.allocated, event.capacity, event.revision) == (100_000, 100_000, 1)


async def test_reservations_from_before_kafkas_first_start_are_published(
    kafka_here: KafkaServer, new_api: Callable[[str], ApiServer], inventory_here: Inventory
) -> None:
    api = new_api("api")
    await asyncio.to_thread(api.start)
    journal = await stampede([api.url], a_crowd(300))
    assert {entry.status for entry in journal.entries} == {202}
    assert (await inventory_here.sales([ITEM]))[ITEM].outbox_length == 300
    await start_kafka(kafka_here)
    await outbox_is_empty(inventory_here)
    assert ids(await published(kafka_here)) == set(journal.accepted())


async def test_another_pod_sweeps_the_events_of_a_killed_pod(
    kafka_here: KafkaServer, new_api: Callable[[str], ApiServer], inventory_here: Inventory
) -> None:
    victim, survivor = new_api("victim"), new_api("survivor")
    await asyncio.gather(asyncio.to_thread(victim.start), asyncio.to_thread(survivor.start))
    by_victim = await stampede([victim.url], a_crowd(200, "v"))
    by_survivor = await stampede([survivor.url], a_crowd(200, "s"))
    victim.kill()
    await start_kafka(kafka_here)
    await outbox_is_empty(inventory_here)
    assert ids(await published(kafka_here)) == {*by_victim.accepted(), *by_survivor.accepted()}


@pytest.mark.slow
@pytest.mark.parametrize("graceful", [True, False], ids=["stopped", "killed"])
async def test_kafka_restarted_under_load_loses_nothing(
    kafka_here: KafkaServer,
    new_api: Callable[[str], ApiServer],
    inventory_here: Inventory,
    graceful: bool,
) -> None:
    await start_kafka(kafka_here)
    apis = [new_api("one"), new_api("two")]
    await asyncio.gather(*(asyncio.to_thread(api.start) for api in apis))
    journal = Journal()
    crowd = asyncio.create_task(
        stampede([api.url for api in apis], a_crowd(6_000), connections=20, journal=journal)
    )
    async with asyncio.timeout(60):
        while len(journal.entries) < 500:
            await asyncio.sleep(0.01)
    await asyncio.to_thread(kafka_here.stop if graceful else kafka_here.kill)
    await crowd
    late = a_crowd(100, "late")
    await stampede([api.url for api in apis], late, connections=20, journal=journal)
    assert {entry.status for entry in journal.entries} == {202}
    for api in apis:
        await producer_is_discarded(api)
    await start_kafka(kafka_here)
    await outbox_is_empty(inventory_here)
    assert ids(await published(kafka_here)) == set(journal.accepted())


async def test_a_stopping_pod_publishes_its_accepted_reservations(
    kafka_here: KafkaServer,
    redis_here: RedisServer,
    new_api: Callable[[str], ApiServer],
    inventory_here: Inventory,
) -> None:
    await start_kafka(kafka_here)
    api = new_api("api")
    await asyncio.to_thread(api.start)
    journal = await stampede([api.url], a_crowd(500))
    await asyncio.to_thread(api.stop)
    assert (await inventory_here.sales([ITEM]))[ITEM].outbox_length == 0
    assert ids(await published(kafka_here)) == set(journal.accepted())
    client = redis_client.connect(redis_here.url)
    assert not await heartbeat.living(client, ITEM, await inventory_here.server())
    await client.aclose()


@pytest.mark.slow
async def test_a_heartbeat_counts_the_unacknowledged_events_per_item(
    kafka_here: KafkaServer,
    redis_here: RedisServer,
    new_api: Callable[[str], ApiServer],
    inventory_here: Inventory,
) -> None:
    api = new_api("api")
    await asyncio.to_thread(api.start)
    client = redis_client.connect(redis_here.url)

    async def beats(unacknowledged: int) -> None:
        """Wait for a heartbeat with this count, or for none of the item."""
        async with asyncio.timeout(60):
            while True:
                server = await inventory_here.server()
                pods = await heartbeat.living(client, ITEM, server)
                if sum(pod.unacknowledged for pod in pods) == unacknowledged:
                    # A beat may have come after the clock was read.
                    now_ms = (await inventory_here.server()).now_ms
                    assert all(0 < pod.sampled_ms <= now_ms for pod in pods)
                    return
                await asyncio.sleep(0.1)

    await beats(0)
    await stampede([api.url], a_crowd(25))
    await beats(25)
    await start_kafka(kafka_here)
    await beats(0)
    api.kill()
    async with asyncio.timeout(60):
        while await heartbeat.living(client, ITEM, await inventory_here.server()):
            await asyncio.sleep(0.1)
    await client.aclose()


async def test_a_reservation_whose_reply_was_lost_is_published_by_the_sweep(
    kafka_here: KafkaServer, new_api: Callable[[str], ApiServer], inventory_here: Inventory
) -> None:
    """Redis has the outbox entry, and no pod holds the event."""
    await start_kafka(kafka_here)
    request = Request(UNKNOWN_ID, "ann", 1)
    await inventory_here.reserve(ITEM, [request], timeout_seconds=5)
    api = new_api("api")
    await asyncio.to_thread(api.start)
    await outbox_is_empty(inventory_here)
    assert ids(await published(kafka_here)) == {request.reservation_id}
    async with httpx.AsyncClient(base_url=api.url) as http:
        assert (await reserve(http, ITEM, "bob")).status_code == 202
