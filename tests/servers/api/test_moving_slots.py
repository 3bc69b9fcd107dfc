"""The API on a Redis Cluster while a slot moves, or has no owner. Kafka is absent."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from dev.services import Addresses, ApiServer
from dev.stack.ports import free_port
from dev.stack.servers import RedisCluster
from flashsale import redis_client
from flashsale.errors import RedisUnavailable
from flashsale.inventory import Inventory
from tests.support.api import problem, reserve
from tests.support.eventually import until
from tests.support.inventory import a_request, a_sale, opened, outcome
from tests.support.orders import TOKENS, order_client
from tests.support.redis_clusters import Migration

pytestmark = pytest.mark.slow

STOCK = 100


async def not_now(request: Awaitable[httpx.Response]) -> None:
    answer = await request
    problem(answer, 503, "redis-unavailable")
    assert int(answer.headers["retry-after"]) > 0


@dataclass(frozen=True)
class Scene:
    """An engine of its own, with one sale and an API process."""

    cluster: RedisCluster
    inventory: Inventory
    item: str
    http: httpx.AsyncClient
    orders: httpx.AsyncClient

    async def buy(self) -> str:
        """Buy a unit, and return the path of the reservation."""
        bought = await reserve(self.http, self.item, str(uuid.uuid4()))
        assert bought.status_code == 202, bought.text
        return bought.headers["location"]

    async def is_away(self, reservation: str) -> None:
        """Check the answers to all requests that need the item's keys."""
        await not_now(reserve(self.http, self.item, "bob"))
        await not_now(reserve(self.http, self.item, "bob", key="key"))
        await not_now(self.http.get(f"/sales/{self.item}"))
        await not_now(self.http.get(reservation))
        await not_now(self.orders.get(reservation))
        for verb in ("confirm", "cancel"):
            body = {"orderRef": "order"}
            await not_now(self.orders.post(f"{reservation}/{verb}", json=body))

    async def is_back(self, reservation: str) -> None:
        """Check that the sale goes on, and that no request took a unit in the meantime."""

        async def sells() -> bool:
            # A pod accepts nothing without a heartbeat on the node.
            return (await reserve(self.http, self.item, "carol", key="key")).status_code == 202

        async def shown() -> bool:
            answer = await self.http.get(f"/sales/{self.item}")
            return answer.status_code == 200 and answer.json()["available"] == STOCK - 2

        async def listed() -> bool:
            answer = await self.http.get("/sales")
            return answer.status_code == 200 and [
                (sale["itemId"], sale["available"]) for sale in answer.json()["sales"]
            ] == [(self.item, STOCK - 2)]

        await until(sells)
        await until(shown)
        await until(listed)
        assert (await self.http.get(reservation)).status_code == 200
        assert (await self.orders.get(reservation)).status_code == 200


@pytest.fixture
async def scene(redis_cluster: RedisCluster, tmp_path: Path, item: str) -> AsyncIterator[Scene]:
    engine = f"slots-{uuid.uuid4().hex[:8]}"
    addresses = Addresses(redis_cluster.url, f"127.0.0.1:{free_port()}", "", engine)
    client = redis_client.connect(redis_cluster.url)
    inventory = Inventory(client, engine)
    await inventory.index.claim(str(uuid.uuid4()))
    await opened(inventory, a_sale(item, STOCK))
    api = ApiServer(tmp_path / "api", addresses, order_tokens=TOKENS[0])
    await asyncio.to_thread(api.start)
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as http, order_client(api) as orders:
        yield Scene(redis_cluster, inventory, item, http, orders)
    api.kill()  # a graceful stop would wait for Kafka
    await client.aclose()


@pytest.mark.parametrize("moved", [False, True], ids=["some", "all"])
async def test_a_sale_whose_keys_move_is_answered_503_and_never_as_empty_or_unknown(
    scene: Scene, moved: bool
) -> None:
    """While some keys are missing, Redis says `TRYAGAIN`. After the last one it says `ASK`."""
    reservation = await scene.buy()
    migration = Migration(scene.cluster, scene.inventory, scene.item)
    migration.begin()
    if moved:
        migration.move_keys()
    with pytest.raises(RedisUnavailable, match="moves" if moved else "TRYAGAIN"):
        await outcome(scene.inventory, scene.item, a_request())
    await scene.is_away(reservation)
    await not_now(scene.http.get("/sales"))
    migration.give_up()
    await scene.is_back(reservation)


async def test_a_sale_whose_slot_has_no_owner_is_answered_503_and_never_as_empty_or_unknown(
    scene: Scene,
) -> None:
    reservation = await scene.buy()
    migration = Migration(scene.cluster, scene.inventory, scene.item)
    await migration.unassign()
    for _ in range(20):  # at first the node refuses, and then the pod knows that there is no owner
        await scene.is_away(reservation)
        await not_now(scene.http.get("/sales"))
        await asyncio.sleep(0.05)
    migration.assign()
    await scene.is_back(reservation)


async def test_a_slot_that_stays_between_two_nodes_stops_no_other_sale_of_its_node(
    scene: Scene, new_item: Callable[[], str]
) -> None:
    other = new_item()
    while scene.inventory.node_of(other) != scene.inventory.node_of(scene.item):
        other = new_item()
    await opened(scene.inventory, a_sale(other, STOCK))
    reservation = await scene.buy()
    migration = Migration(scene.cluster, scene.inventory, scene.item)
    migration.begin()
    migration.move_keys()
    # A pod without a heartbeat on a node for 5 s accepts nothing there.
    for _ in range(70):
        sold = await reserve(scene.http, other, str(uuid.uuid4()))
        assert sold.status_code == 202, sold.text
        await asyncio.sleep(0.1)
    await scene.is_away(reservation)
    migration.give_up()

    async def sells() -> bool:
        return (await reserve(scene.http, scene.item, "carol")).status_code == 202

    await until(sells)
