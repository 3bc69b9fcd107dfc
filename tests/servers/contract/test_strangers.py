"""Other servers at the addresses of the nodes of a Redis Cluster. Needs real servers."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dev.stack.servers import RedisCluster, RedisServer
from flashsale import nodes, redis_client
from flashsale.errors import RedisUnavailable
from flashsale.inventory import Inventory
from flashsale.reservations import Outcome
from tests.support.eventually import until
from tests.support.inventory import a_request, a_sale, opened, outcome
from tests.support.redis_clusters import server_of

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    """Three primaries with a replica each. A test loses some of them."""
    with RedisCluster(tmp_path / "cluster", replicas=1) as started:
        yield started


@pytest.fixture
async def inventory(cluster: RedisCluster) -> AsyncIterator[Inventory]:
    """Knows the primaries."""
    client = redis_client.connect(cluster.url)
    found = Inventory(client)
    await found.nodes.all()
    yield found
    await client.aclose()


def item_on(server: RedisServer, inventory: Inventory) -> str:
    items = map("item-{}".format, range(1_000))
    return next(each for each in items if inventory.node_of(each).endswith(f":{server.port}"))


@contextlib.contextmanager
def at_port(server: RedisServer, port: int) -> Iterator[None]:
    """Move a server to another port meanwhile."""
    server.kill()
    server._ports["main"] = port
    with server:
        yield


@pytest.fixture(params=["one server", "node of another cluster"])
def stranger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    """A server that is not of the cluster."""
    if request.param == "one server":
        with RedisServer(tmp_path / "stranger") as server:
            yield server
    else:
        with RedisCluster(tmp_path / "stranger") as other:
            yield other.servers[-1]


async def test_another_server_at_the_address_of_a_primary_is_never_asked(
    cluster: RedisCluster, inventory: Inventory, stranger: RedisServer
) -> None:
    """It would say that its items have no sale, and the operator would rebuild them there."""
    item, other = (item_on(server, inventory) for server in cluster.servers[1:3])
    await opened(inventory, a_sale(other, stock=1_000_000))
    victim, successor = server_of(cluster, inventory, item), cluster.servers[4]
    victim.kill()

    async def answered() -> bool:
        request = a_request(str(uuid.uuid4()))
        assert await outcome(inventory, other, request) is Outcome.ACCEPTED
        await inventory.sales([item])
        return True

    with at_port(stranger, victim.port):
        with pytest.raises(RedisUnavailable, match="is no node of the cluster"):
            await inventory.sales([item])
        await until(answered, ignoring=(RedisUnavailable,))
        assert inventory.node_of(item) == f"127.0.0.1:{successor.port}"


async def test_a_server_of_no_cluster_at_the_address_takes_no_sale_from_known_nodes(
    cluster: RedisCluster, inventory: Inventory, tmp_path: Path
) -> None:
    lost, other = (item_on(server, inventory) for server in cluster.servers[:2])
    former, port = inventory.node_of(lost), cluster.servers[0].port
    cluster.servers[0].kill()

    async def replaced() -> bool:
        await inventory.sales([lost])
        return inventory.node_of(lost) != former

    await until(replaced, ignoring=(RedisUnavailable,))
    await opened(inventory, a_sale(other))
    with RedisServer(tmp_path / "stranger", port=port):
        for _ in range(100):
            inventory.nodes.look_soon(at_once=True)
            look: Any = inventory.nodes._look
            await look
            assert inventory.nodes.single is None
        assert await outcome(inventory, other, a_request()) is Outcome.ACCEPTED


@pytest.mark.parametrize("kind", ["server", "cluster"])
async def test_servers_that_have_replaced_all_nodes_are_used(
    cluster: RedisCluster,
    inventory: Inventory,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nodes, "STRANGER_SECONDS", 1.0)
    item = item_on(cluster.servers[1], inventory)
    await opened(inventory, a_sale(item))
    for server in cluster.servers:
        server.kill()
    with contextlib.ExitStack() as stack:
        if kind == "server":
            stack.enter_context(RedisServer(tmp_path / "new", port=cluster.servers[0].port))
        else:
            new = RedisCluster(tmp_path / "new")
            for server, killed in zip(new.servers, cluster.servers, strict=False):
                server._ports["main"] = killed.port
                stack.callback(server.kill)
            for server in new.servers:
                await asyncio.to_thread(server.start)
            await new._form()

        async def lost() -> bool:
            return not await inventory.sales([item])

        await until(lost, ignoring=(RedisUnavailable,))
        await opened(inventory, a_sale(item))
        assert await outcome(inventory, item, a_request()) is Outcome.ACCEPTED
    assert (inventory.nodes.single is not None) is (kind == "server")
