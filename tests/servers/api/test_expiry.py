"""The end of holds by any pod, without Kafka: bounded turns, leases, backlogs and gauges."""

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from dev.services import ApiServer
from flashsale.errors import RedisUnavailable
from flashsale.heartbeat import CALL_DEADLINE_SECONDS
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Outbox
from flashsale.reservations import BATCH_LIMIT, Expired, Transition
from flashsale.settings import KafkaSettings
from flashsale_api import expiry as expiry_module
from flashsale_api.engine import Engine
from flashsale_api.expiry import Expiry
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher
from tests.support.api import problem, reserve
from tests.support.eventually import until
from tests.support.inventory import a_request, a_sale, opened

OWN = "11111111-1111-1111-1111-111111111111"
OTHER = "22222222-2222-2222-2222-222222222222"


@pytest.fixture
def inventory(redis: Redis) -> Inventory:
    """An engine without other sales and without pods."""
    return Inventory(redis, f"shop-{uuid.uuid4().hex[:8]}")


class Pod:
    """The expiry of a pod without its other tasks."""

    def __init__(self, inventory: Inventory, name: str = "pod") -> None:
        self.metrics = Metrics()
        self.engine = Engine(inventory.engine)
        kafka = KafkaSettings(kafka_bootstrap="127.0.0.1:1", engine=inventory.engine)
        outbox = Outbox(inventory.redis, inventory.engine)
        self.publisher = Publisher(kafka, outbox, self.metrics, self.engine)
        self.expiry = Expiry(inventory, self.publisher, self.metrics, self.engine, pod_id=name)

    def gauge(self, name: str, item: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"flashsale_api_{name}", {"item": item})


async def hold(inventory: Inventory, item: str, number: int) -> Sequence[str]:
    """Open a sale with as many holds, which are all due. Return their ids."""
    await opened(inventory, a_sale(item, number, hold_seconds=60))
    requests = [a_request(f"u{n}") for n in range(number)]
    for first in range(0, number, BATCH_LIMIT):
        batch = requests[first : first + BATCH_LIMIT]
        await inventory.reserve(item, batch, timeout_seconds=30)
    ids = [request.reservation_id for request in requests]
    key = ItemKeys.of(item, inventory.engine).holds
    for first in range(0, number, 1000):
        await inventory.redis.zadd(key, dict.fromkeys(ids[first : first + 1000], 1000))
    return ids


async def held(inventory: Inventory, item: str) -> int:
    return (await inventory.sales([item]))[item].held


async def test_a_hold_has_counters_before_it_ends(inventory: Inventory, item: str) -> None:
    """Otherwise Prometheus finds no increase if all holds end between two scrapes."""
    await opened(inventory, a_sale(item, 1, hold_seconds=60))
    await inventory.reserve(item, [a_request("u")], timeout_seconds=30)
    pod = Pod(inventory)
    await pod.expiry.expire_due()
    for verb in ("confirm", "cancel", "expire"):
        labels = {"item": item, "verb": verb, "outcome": "changed"}
        sample = pod.metrics.registry.get_sample_value("flashsale_api_transitions_total", labels)
        assert sample == 0


async def test_a_turn_is_bounded_and_says_whether_more_is_due(
    inventory: Inventory, item: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry_module, "BATCH", 2)
    monkeypatch.setattr(expiry_module, "BATCHES", 3)
    await hold(inventory, item, 11)
    pod = Pod(inventory)
    found = []
    for _ in range(2):
        more = await pod.expiry.expire_due()
        found.append((more, await held(inventory, item)))
    assert found == [(True, 5), (False, 0)]
    assert pod.publisher.held == 11


async def test_each_item_has_its_turn_while_one_has_more(
    inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry_module, "BATCH", 2)
    monkeypatch.setattr(expiry_module, "BATCHES", 1)
    items = {"phone-1": 3, "phone-2": 1}
    for item, number in items.items():
        await hold(inventory, item, number)
    pod = Pod(inventory)
    assert await pod.expiry.expire_due()
    assert [await held(inventory, item) for item in items] == [1, 0]


async def test_only_due_holds_expire_and_the_gauges_tell(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    ids = await hold(inventory, item, 5)
    now_ms = (await inventory.server()).now_ms
    key = ItemKeys.of(item, inventory.engine).holds
    await redis.zadd(key, {ids[0]: now_ms + 60_000, ids[1]: now_ms + 60_000})
    await redis.zadd(key, {ids[2]: now_ms - 7_000})
    await redis.zadd(key, dict.fromkeys(ids[3:], now_ms - 1_000))
    pod = Pod(inventory)
    await pod.expiry.expire_due()
    assert (pod.gauge("open_holds", item), pod.gauge("overdue_holds", item)) == (5, 3)
    assert 7 <= (pod.gauge("overdue_hold_seconds", item) or 0) < 60
    await pod.expiry.expire_due()
    assert (pod.gauge("open_holds", item), pod.gauge("overdue_holds", item)) == (2, 0)
    assert pod.gauge("overdue_hold_seconds", item) == 0
    looks = [await inventory.look(item, one) for one in ids]
    assert [look.record.state for look in looks if look.record] == ["held"] * 2 + ["expired"] * 3
    await redis.srem(f"{inventory.engine}:items", item)
    await pod.expiry.expire_due()
    assert pod.gauge("open_holds", item) is None


async def test_one_pod_at_a_time_expires_the_holds_of_an_item(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    await hold(inventory, item, 3)
    assert await inventory.lease_expiry(item, "another", 60_000)
    pod = Pod(inventory)
    assert not await pod.expiry.expire_due()
    assert await held(inventory, item) == 3
    assert pod.gauge("overdue_holds", item) == 3
    await redis.delete(ItemKeys.of(item, inventory.engine).expiry)
    await pod.expiry.expire_due()
    assert await held(inventory, item) == 0


async def test_a_pod_with_a_backlog_leaves_the_events_to_the_sweep(
    inventory: Inventory, item: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Kafka is away, expired holds must not fill the pod's memory."""
    monkeypatch.setattr(expiry_module, "BACKLOG", 4)
    monkeypatch.setattr(expiry_module, "BATCH", 2)
    await hold(inventory, item, 11)
    pod = Pod(inventory)
    await pod.expiry.expire_due()
    assert (await held(inventory, item), pod.publisher.held) == (0, 4)
    assert (await inventory.sales([item]))[item].outbox_length == 22


async def test_a_reply_from_before_a_suspension_is_not_published(
    inventory: Inventory, item: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sale may have been rebuilt since then. A sweep finds the events that it still has."""
    await hold(inventory, item, 1)
    loop, expire = asyncio.get_running_loop(), inventory.expire
    clock = loop.time

    async def expire_and_stand_still(*arguments: Any, **options: Any) -> Expired | Transition:  # noqa: ANN401
        reply = await expire(*arguments, **options)
        monkeypatch.setattr(loop, "time", lambda: clock() + CALL_DEADLINE_SECONDS)
        return reply

    monkeypatch.setattr(inventory, "expire", expire_and_stand_still)
    pod = Pod(inventory)
    assert not await pod.expiry.expire_due()
    assert (await held(inventory, item), pod.publisher.held) == (0, 0)


async def test_an_unreadable_or_foreign_sale_does_not_stop_the_others(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    for name in ("a", "b", "c"):
        await hold(inventory, f"{item}-{name}", 2)
    await redis.hset(ItemKeys.of(f"{item}-a", inventory.engine).sale, "format", "99")
    await redis.hset(ItemKeys.of(f"{item}-b", inventory.engine).sale, "engine", OTHER)
    pod = Pod(inventory)
    pod.engine.found_in_redis(OWN)
    await pod.expiry.expire_due()
    holds = await inventory.holds({f"{item}-{name}": 2**53 for name in "abc"})
    assert [found.open for found in holds.values()] == [2, 2, 0]


async def test_an_item_whose_server_is_away_does_not_stop_the_others(
    inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for item in ("phone-1", "phone-2"):
        await hold(inventory, item, 1)
    lease = inventory.lease_expiry

    async def only_of_the_second(item_id: str, pod_id: str, lease_ms: int) -> bool:
        if item_id == "phone-1":
            raise RedisUnavailable("away", maybe_executed=False)
        return await lease(item_id, pod_id, lease_ms)

    monkeypatch.setattr(inventory, "lease_expiry", only_of_the_second)
    assert not await Pod(inventory).expiry.expire_due()
    assert [await held(inventory, item) for item in ("phone-1", "phone-2")] == [1, 0]


async def test_a_pod_that_meets_another_engine_expires_nothing(
    inventory: Inventory, item: str
) -> None:
    await hold(inventory, item, 2)
    pod = Pod(inventory)
    pod.engine.found_in_redis(OWN)
    pod.engine.found_in_redis(OTHER)
    await pod.expiry.expire_due()
    assert await held(inventory, item) == 2


async def test_a_hold_expires_without_kafka_and_its_unit_waits_for_kafka(
    api: ApiServer, http: httpx.AsyncClient, redis: Redis, item: str
) -> None:
    await opened(Inventory(redis), a_sale(item, 1, hold_seconds=1))
    answer = await reserve(http, item)
    assert answer.json()["state"] == "held"

    async def expired() -> bool:
        return bool((await http.get(answer.headers["location"])).json()["state"] == "expired")

    await until(expired)
    refusal = problem(await reserve(http, item, "bob", key="k"), 409, "sold-out")
    assert refusal["held"] == 0
    async with httpx.AsyncClient() as scraper:

        async def shown() -> bool:
            text = (await scraper.get(api.metrics_url)).text
            return all(
                sample in text
                for sample in (
                    f'transitions_total{{item="{item}",outcome="changed",verb="expire"}} 1.0',
                    f'flashsale_api_open_holds{{item="{item}"}} 0.0',
                    f'flashsale_api_overdue_hold_seconds{{item="{item}"}} 0.0',
                )
            )

        await until(shown)


async def test_buyers_are_served_while_thousands_of_holds_expire(
    http: httpx.AsyncClient, redis: Redis, item: str
) -> None:
    of_api = Inventory(redis)
    await hold(of_api, item, 5_000)
    other = f"{item}-2"
    await opened(of_api, a_sale(other, 5_000))
    number = 0
    while number == 0 or await held(of_api, item):
        number += 1
        assert (await reserve(http, other, f"u{number}")).status_code == 202
    sale = (await of_api.sales([item]))[item]
    assert (sale.accepted, sale.held, sale.released) == (5_000, 0, 0)
