"""Floods of requests that try to starve other buyers or the pod itself. Needs Redis.

They need 18,000 descriptors in a process (`ulimit -n`), which the tests set if they may.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dev.services import Addresses, ApiServer
from dev.stack.ports import free_port
from dev.stack.servers import RedisServer
from flashsale import heartbeat
from flashsale.inventory import Applied, Inventory
from flashsale.reservations import BATCH_LIMIT
from flashsale.sale import SaleSpec
from flashsale_api.calls import CALLS_IN_FLIGHT, MAX_WAITING
from tests.support.api import OWN_SALE, OpenSale, accepted
from tests.support.eventually import until
from tests.support.flood import (
    Flood,
    Watch,
    allow_connections,
    open_connections,
    patient,
    request_of,
)
from tests.support.redis_users import API, url_of
from tests.support.wire import stopped

OTHERS = 3
FLOOD_CONNECTIONS = 3_000
FLOOD_SECONDS = 20.0
POD_BYTES = 512 * 1024 * 1024
"""The memory limit of a pod in the chart."""


@pytest.fixture(autouse=True, scope="module")
def many_connections() -> None:
    allow_connections(17_500)


async def test_a_busy_item_leaves_waiting_places_to_others(
    own_redis: RedisServer, own_inventory: Inventory, own_api: ApiServer
) -> None:
    """Redis is frozen, so that the requests of the busy item wait and fill their places.

    The other items have one request each. A second one would wait for the call of the first, and
    be refused after half a second on a slow machine.
    """
    items = [f"other-{number}" for number in range(OTHERS)]
    for name in items:
        other = SaleSpec(f"default/{name}", name, 1)
        assert await own_inventory.apply(other, 1, seed_until_ms=2**53) is Applied.SEEDED
    busy_answers: Counter[str] = Counter()
    others: Counter[str] = Counter()

    def count(answers: Counter[str], body: bytes) -> None:
        answers[json.loads(body).get("type", "accepted").rpartition(":")[2]] += 1

    number = MAX_WAITING + CALLS_IN_FLIGHT * BATCH_LIMIT + 100
    busy = await open_connections(
        own_api.url, number, lambda _, __, body: count(busy_answers, body)
    )
    calm = await open_connections(own_api.url, OTHERS, lambda _, __, body: count(others, body))
    own_redis.pause()
    for connection in busy:
        connection.send(request_of(OWN_SALE.item_id, "ann"))
    await until(lambda: busy_answers["too-many-waiting"], pause=0.001)
    for name, connection in zip(items, calm, strict=True):
        connection.send(request_of(name, "bob"))
    refused = number - MAX_WAITING // 2 - CALLS_IN_FLIGHT * BATCH_LIMIT
    await until(lambda: busy_answers.total() >= refused, pause=0.001)
    own_redis.resume()
    await until(lambda: others.total() == len(calm))
    assert not others["too-many-waiting"]
    for connection in (*busy, *calm):
        connection.close()


async def test_thousands_of_requests_after_a_standstill_take_several_turns_of_calls(
    open_sale: OpenSale, item: str, api: ApiServer
) -> None:
    """One turn has calls and waiting places for a part of them. Many would expire before a call."""
    await open_sale(item, 100_000)
    answers: Counter[str] = Counter()

    def count(_: object, status: int, body: bytes) -> None:
        problem = json.loads(body)["type"].rpartition(":")[2] if status >= 400 else str(status)
        answers[problem] += 1

    connections = await open_connections(api.url, 15_000, count)
    with stopped(api):
        for user, connection in enumerate(connections):
            connection.send(request_of(item, str(user)))
    await until(lambda: answers.total() == len(connections))
    assert answers["202"] > MAX_WAITING // 2 + CALLS_IN_FLIGHT * BATCH_LIMIT, answers
    for connection in connections:
        connection.close()


@pytest.fixture
async def flooded(
    tmp_path: Path, own_redis: RedisServer, own_inventory: Inventory
) -> AsyncIterator[ApiServer]:
    """An API with a Redis of its own, and without a proxy that the flood would slow down."""
    del own_inventory  # the sale exists before the API starts
    nowhere = f"127.0.0.1:{free_port()}"
    server = ApiServer(tmp_path / "api", Addresses(url_of(own_redis, API), nowhere, ""))
    await asyncio.to_thread(server.start)
    yield server
    server.kill()


async def test_a_flood_of_any_requests_leaves_the_heartbeat_fresh(
    own_redis: RedisServer, own_inventory: Inventory, flooded: ApiServer
) -> None:
    sold_out = SaleSpec("default/none", "none", 1)
    assert await own_inventory.apply(sold_out, 1, seed_until_ms=2**53) is Applied.SEEDED
    client = patient(own_redis.url)
    watch = Watch(client, flooded)
    flood = Flood(flooded.url)
    async with flood.running(OWN_SALE.item_id, sold_out.item_id, FLOOD_CONNECTIONS):
        seen = await watch.look_for(FLOOD_SECONDS)
    made_up = await client.keys("*nothing*")
    await client.aclose()
    print(seen, dict(flood.answers))
    assert seen.oldest_ms < heartbeat.EXPIRY_SECONDS * 1000 / 2
    assert seen.resident_bytes < POD_BYTES
    assert await accepted(own_inventory, OWN_SALE.item_id) == OWN_SALE.stock
    assert {"202", "200", "400", "409 sold-out", "422 invalid-field"} <= set(flood.answers)
    assert {"404 unknown-item", "404 unknown-reservation"} <= set(flood.answers)
    assert not made_up
    assert b"Traceback" not in flooded.log.read_bytes()
