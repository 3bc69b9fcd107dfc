"""The API on a Redis Cluster of which a node is frozen. Kafka is absent."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from dev.services import Addresses, ApiServer
from dev.stack.ports import free_port
from dev.stack.servers import RedisCluster, RedisServer
from flashsale import keys, redis_client
from flashsale.errors import RedisUnavailable
from flashsale.heartbeat import EXPIRY_SECONDS
from flashsale.inventory import Inventory
from flashsale.nodes import PROBE_SECONDS
from flashsale.outbox import Entry, Outbox
from flashsale.settings import KafkaSettings
from flashsale_api import known_items
from flashsale_api.engine import Engine
from flashsale_api.known_items import KnownItems
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher
from flashsale_api.settler import Settler
from flashsale_api.sweeper import Sweeper
from tests.support.api import claim, problem, reserve
from tests.support.eventually import until
from tests.support.inventory import a_request, a_sale, answers, opened
from tests.support.redis_clusters import fail_over

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def api(
    redis_cluster: RedisCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiServer]:
    asyncio.run(claim(redis_cluster.url))
    addresses = Addresses(redis_cluster.url, f"127.0.0.1:{free_port()}", "")
    with ApiServer(tmp_path_factory.mktemp("api"), addresses) as server:
        yield server
        server.kill()  # a graceful stop would wait for Kafka


@pytest.fixture
async def inventory(redis_cluster: RedisCluster) -> AsyncIterator[Inventory]:
    client = redis_client.connect(redis_cluster.url)
    yield Inventory(client)
    await client.aclose()


@pytest.fixture
async def items(inventory: Inventory, new_item: Callable[[], str]) -> tuple[str, str]:
    """Two items with open sales, on two nodes."""
    await inventory.nodes.all()
    first = other = new_item()
    while inventory.node_of(other) == inventory.node_of(first):
        other = new_item()
    for item in (first, other):
        await opened(inventory, a_sale(item))
    return first, other


@contextlib.asynccontextmanager
async def frozen(cluster: RedisCluster, inventory: Inventory, item: str) -> AsyncIterator[None]:
    """Freeze the item's node meanwhile."""
    port = int(inventory.node_of(item).rpartition(":")[2])
    server: RedisServer
    [server] = [each for each in cluster.servers if each.port == port]
    server.pause()
    try:
        yield
    finally:
        server.resume()
        await until(lambda: inventory.sales([item]), ignoring=(RedisUnavailable,))


async def test_a_frozen_node_is_an_outage_of_its_own_sales_only(
    redis_cluster: RedisCluster, api: ApiServer, inventory: Inventory, items: tuple[str, str]
) -> None:
    lost, other = items
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as http:
        assert (await reserve(http, lost, "ann")).status_code == 202
        # The pod cannot list sales before it has read the index, which may be on the lost node.
        assert (await http.get("/sales")).status_code == 200
        async with frozen(redis_cluster, inventory, lost):
            refused = await reserve(http, lost, "bob")
            assert refused.status_code == 503
            assert refused.json()["type"].endswith((":redis-unavailable", ":outcome-unknown"))
            assert "retry-after" in refused.headers
            problem(await http.get(f"/sales/{lost}"), 503, "redis-unavailable")

            async def listed() -> bool:
                answer = (await http.get("/sales")).json()
                assert (await reserve(http, other, f"user-{len(sold)}")).status_code == 202
                sold.append(other)
                ids = {sale["itemId"] for sale in answer["sales"]}
                return other in ids and lost in answer.get("unreadable", ())

            sold: list[str] = []
            await until(listed)
            # A pod without a heartbeat on the node for 5 s accepts nothing there.
            while len(sold) < 60:
                await listed()
                await asyncio.sleep(0.1)
            problem(await reserve(http, lost, "bob"), 503, "redis-unavailable")

        async def sells() -> bool:
            # The node may have executed a request of bob when it thawed.
            return (await reserve(http, lost, str(uuid.uuid4()))).status_code == 202

        await until(sells)


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three primaries with a replica each."""
    with RedisCluster(tmp_path_factory.mktemp("replicated"), replicas=1) as started:
        yield started


async def test_a_pod_without_requests_follows_a_failover(
    replicated: RedisCluster, tmp_path: Path, new_item: Callable[[], str]
) -> None:
    client = redis_client.connect(replicated.url)
    inventory, item = Inventory(client), new_item()
    await inventory.nodes.all()
    # The node of the engine's id would answer the heartbeat that it has moved.
    while inventory.node_of(item) == inventory.nodes.name_of(keys.engine_id(inventory.engine)):
        item = new_item()
    await opened(inventory, a_sale(item))
    addresses = Addresses(replicated.url, f"127.0.0.1:{free_port()}", "")
    with ApiServer(tmp_path, addresses) as server:
        await fail_over(replicated, inventory, item)
        await asyncio.sleep(3 * PROBE_SECONDS)  # so that no request meets the former primary
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
            # The pod asks the new primary only if that one has its heartbeat.
            await until(lambda: answered(http, item, "fenced"))
        server.kill()
    await client.aclose()


async def test_a_pod_follows_a_server_that_becomes_a_cluster(
    tmp_path: Path, new_item: Callable[[], str]
) -> None:
    single, cluster = RedisServer(tmp_path / "single"), RedisCluster(tmp_path / "cluster")
    cluster.servers[0]._ports["main"] = single.port
    addresses = Addresses(single.url, f"127.0.0.1:{free_port()}", "")
    client = redis_client.connect(cluster.url)
    inventory = Inventory(client)
    with contextlib.ExitStack() as stack:
        with single:
            api = stack.enter_context(ApiServer(tmp_path / "api", addresses))
            stack.callback(api.kill)
        for server in cluster.servers:
            await asyncio.to_thread(stack.enter_context, server)
        await cluster._form()
        names = {node.name for node in await inventory.nodes.all()}
        items: dict[str, str] = {}
        while len(items) < len(names):
            item = new_item()
            items.setdefault(inventory.node_of(item), item)
        for item in items.values():
            await opened(inventory, a_sale(item))
        async with httpx.AsyncClient(base_url=api.url, timeout=30) as http:

            async def sells() -> bool:
                answers = [await reserve(http, item, str(uuid.uuid4())) for item in items.values()]
                return {answer.status_code for answer in answers} == {202}

            await until(sells)
            # A heartbeat that has not followed ends after 5 s.
            await asyncio.sleep(EXPIRY_SECONDS)
            await until(sells)
    await client.aclose()


async def test_a_new_pod_takes_no_lost_sale_for_an_unknown_one(
    redis_cluster: RedisCluster, tmp_path: Path, new_item: Callable[[], str]
) -> None:
    """The node of the sale and of the index came back empty, and the operator is away."""
    engine = f"lost-{uuid.uuid4().hex[:8]}"
    client = redis_client.connect(redis_cluster.url)
    inventory, item = Inventory(client, engine), new_item()
    await inventory.nodes.all()
    name = inventory.nodes.name_of(keys.items(engine))
    while inventory.node_of(item) != name:
        item = new_item()
    await opened(inventory, a_sale(item))
    await inventory.index.claim("e-1")
    addresses = Addresses(redis_cluster.url, f"127.0.0.1:{free_port()}", "", engine)
    async with httpx.AsyncClient(timeout=30) as http:
        with ApiServer(tmp_path / "before", addresses) as server:
            http.base_url = httpx.URL(server.url)
            await until(lambda: answered(http, new_item(), "unknown-item"))
            server.kill()
        [node] = [each for each in redis_cluster.servers if name.endswith(f":{each.port}")]
        async with Redis.from_url(node.url) as redis:
            await redis.flushall()
        with ApiServer(tmp_path / "after", addresses) as server:
            http.base_url = httpx.URL(server.url)
            await until(lambda: answered(http, item, "fenced"))
            await asyncio.sleep(3)  # looks at the index
            assert await answered(http, item, "fenced")
            assert await answered(http, new_item(), "fenced"), "it cannot know that either"
            server.kill()
    await client.aclose()


async def answered(http: httpx.AsyncClient, item: str, kind: str) -> bool:
    answer = await reserve(http, item, str(uuid.uuid4()))
    return str(answer.json().get("type")).endswith(f":{kind}")


class RecordingOutbox(Outbox):
    """Records the items of finished calls, whether they failed or not."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self.finished: list[str] = []

    async def settle_all(
        self, pages: Sequence[tuple[str, Sequence[Entry]]]
    ) -> list[int | RedisUnavailable]:
        try:
            return await super().settle_all(pages)
        finally:
            self.finished += [item_id for item_id, _ in pages]


async def test_a_frozen_node_delays_no_settlement_of_the_others(
    redis_cluster: RedisCluster, inventory: Inventory, items: tuple[str, str]
) -> None:
    lost, other = items
    outbox = RecordingOutbox(inventory.redis)
    settler = Settler(outbox, lambda _: None)
    for item in items:
        await answers(inventory, item, [a_request()])
        [entry] = (await outbox.page(item, until_ms=2**50, count=10)).entries
        settler.add(item, (entry.entry_id, entry.reservation_id, entry.record.version))
    async with frozen(redis_cluster, inventory, lost):
        settling = asyncio.create_task(settler.run())
        await until(lambda: outbox.finished)
        assert outbox.finished == [other]

    async def settled() -> bool:
        return await outbox.lengths(items) == {lost: 0, other: 0}

    await until(settled)
    settling.cancel()
    await asyncio.gather(settling, return_exceptions=True)


async def test_an_item_whose_node_is_away_is_not_forgotten(
    redis_cluster: RedisCluster,
    inventory: Inventory,
    items: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The node can come back without its keys."""
    monkeypatch.setattr(known_items, "LOOKS", 1)
    lost, other = items
    outbox, known = Outbox(inventory.redis), KnownItems()
    publisher = Publisher(
        KafkaSettings(kafka_bootstrap="127.0.0.1:1"), outbox, Metrics(), Engine("flashsale")
    )
    sweeper = Sweeper(inventory, outbox, publisher, Metrics(), known=known, pod_id="pod")
    await sweeper.sweep()
    assert lost in known
    async with frozen(redis_cluster, inventory, lost):
        for _ in range(2):
            with contextlib.suppress(RedisUnavailable):
                await sweeper.sweep()
        assert lost in known
    assert other in known
