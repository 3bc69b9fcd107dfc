"""A Redis Cluster: each sale depends on its own node only. Needs real servers."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as Disconnected

from dev.stack.packages import redis_binaries
from dev.stack.servers import RedisCluster, RedisServer
from flashsale import heartbeat, keys, nodes, redis_client, redis_facts
from flashsale.errors import RedisUnavailable, UnmetRequirement
from flashsale.inventory import Applied, Inventory
from flashsale.outbox import Outbox
from flashsale.reservations import Outcome
from flashsale.slots import View
from tests.support import redis_users
from tests.support.eventually import until
from tests.support.inventory import a_request, a_sale, opened, outcome
from tests.support.redis_clusters import Migration, fail_over, server_of
from tests.support.redis_users import OPERATOR, url_of

FIRST, *OTHERS = sorted(redis_binaries(), reverse=True)


@pytest.fixture(
    scope="module",
    params=[FIRST, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)],
)
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisCluster]:
    folder = tmp_path_factory.mktemp(f"{request.param}-nodes")
    binary = redis_binaries()[request.param]
    # The users of one server cannot ask for the slots.
    with RedisCluster(folder, binary, options=redis_users.options()) as started:
        yield started


@pytest.fixture
async def inventory(cluster: RedisCluster) -> AsyncIterator[Inventory]:
    client = redis_client.connect(cluster.url)
    found = Inventory(client)
    yield found
    await client.aclose()


@pytest.fixture
async def items(inventory: Inventory, new_item: Callable[[], str]) -> list[str]:
    """An item with an open sale on each node, in the order of the nodes."""
    names = [node.name for node in await inventory.nodes.all()]
    found: dict[str, str] = {}
    while len(found) < len(names):
        item = new_item()
        found.setdefault(inventory.node_of(item), item)
    for item in found.values():
        await opened(inventory, a_sale(item))
    return [found[name] for name in sorted(found)]


@contextlib.asynccontextmanager
async def stopped(
    server: RedisServer, inventory: Inventory, items: Sequence[str]
) -> AsyncIterator[None]:
    """Stop a server meanwhile. At the end, all items can be read again."""
    server.kill()
    try:
        yield
    finally:
        server.start()
        await until(lambda: inventory.sales(items), ignoring=(RedisUnavailable,))


async def sells(inventory: Inventory, item: str) -> bool:
    return await outcome(inventory, item, a_request(str(uuid.uuid4()))) is Outcome.ACCEPTED


async def test_any_node_leads_to_all_sales(
    cluster: RedisCluster, inventory: Inventory, items: list[str]
) -> None:
    for server in cluster.servers:
        client = redis_client.connect(server.url)
        other = Inventory(client)
        assert [await sells(other, item) for item in items] == [True] * len(items)
        await client.aclose()
    assert len({inventory.node_of(item) for item in items}) == len(cluster.servers)
    sales = await inventory.sales(items)
    assert [sales[item].accepted for item in items] == [len(cluster.servers)] * len(items)
    servers = await inventory.servers(items)
    assert {server.run_id for server in servers.values()} == {
        sale.run_id for sale in sales.values()
    }


async def test_a_dead_node_takes_only_its_own_sales_with_it(
    cluster: RedisCluster, inventory: Inventory, items: list[str]
) -> None:
    lost, *others = items
    outbox = Outbox(inventory.redis)
    async with stopped(server_of(cluster, inventory, lost), inventory, items):
        for item in others:
            assert await sells(inventory, item)
            assert (await inventory.look(item)).sale is not None
        with pytest.raises(RedisUnavailable):
            await outcome(inventory, lost, a_request())
        with pytest.raises(RedisUnavailable):
            await inventory.look(lost)
        # A sale that cannot be read is never an empty one.
        with pytest.raises(RedisUnavailable):
            await inventory.sales([lost])
        with pytest.raises(RedisUnavailable):
            await inventory.sales(items)
        assert set(await inventory.sales(items, skip_unreadable=True)) == set(others)
        assert set(await inventory.servers(items)) == set(others)
        assert set(await outbox.lengths(items, partial=True)) == set(others)
        assert set(await outbox.oldest(dict.fromkeys(items, 0))) == set(others)
        assert len(await redis_facts.read(inventory.redis)) == len(others)
    assert (await inventory.sales([lost]))[lost].run_id != (await inventory.server(lost)).run_id
    assert await outcome(inventory, lost, a_request()) is Outcome.FENCED
    assert [await sells(inventory, item) for item in others] == [True] * len(others)


async def test_the_node_of_the_index_and_of_the_engine_id_may_be_away(
    cluster: RedisCluster, inventory: Inventory, items: list[str], new_item: Callable[[], str]
) -> None:
    listed = await inventory.index.items()
    name = inventory.nodes.name_of(keys.items(inventory.engine))
    assert inventory.nodes.name_of(keys.engine_id(inventory.engine)) == name
    [server] = [each for each in cluster.servers if name.endswith(f":{each.port}")]
    async with stopped(server, inventory, items):
        item = new_item()
        while inventory.node_of(item) == name:
            item = new_item()
        await inventory.index.claim("e-1")
        assert await inventory.apply(a_sale(item), 1, seed_until_ms=2**53) is Applied.SEEDED
        assert await sells(inventory, item)
        assert set(items) <= set(listed) <= set(await inventory.index.items())


async def test_a_frozen_node_delays_no_other(
    cluster: RedisCluster, inventory: Inventory, items: list[str]
) -> None:
    lost, *others = items
    server = server_of(cluster, inventory, lost)
    server.pause()
    try:
        waiting = asyncio.create_task(outcome(inventory, lost, a_request()))
        for _ in range(50):
            assert await sells(inventory, others[0])
        assert not waiting.done()  # its deadline is 5 s
        assert set(await inventory.servers(items)) == set(others)
    finally:
        server.resume()
    with contextlib.suppress(RedisUnavailable):
        await waiting


async def test_the_link_of_a_silent_node_is_closed(
    cluster: RedisCluster,
    inventory: Inventory,
    items: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replaced primary that thaws could otherwise execute a call that it got before."""
    # The nodes that are not frozen always answer within this time.
    monkeypatch.setattr(nodes, "PROBE_SECONDS", 3.0)
    by_name = {node.name: node for node in await inventory.nodes.all()}
    links = {item: await by_name[inventory.node_of(item)].pool.link() for item in items}
    watching = asyncio.create_task(inventory.nodes.watch())
    frozen, *others = items
    server = server_of(cluster, inventory, frozen)
    server.pause()
    try:
        await until(lambda: links[frozen].closed)
    finally:
        server.resume()
    assert not any(links[item].closed for item in others)
    await until(lambda: sells(inventory, frozen), ignoring=(RedisUnavailable,))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_call_survives_that_its_node_leaves_the_map(
    cluster: RedisCluster, items: list[str]
) -> None:
    """A replica that is elected replaces its primary, while calls still use that one."""
    for turns in range(1, 40):
        client = redis_client.connect(cluster.url)
        inventory = Inventory(client)
        await inventory.nodes.all()
        calling = asyncio.create_task(inventory.servers(items[:1]))
        for _ in range(turns):
            await asyncio.sleep(0)
        inventory.nodes._take(View([], frozenset()))
        assert set(await calling) == set(items[:1])
        await client.aclose()


async def test_a_slot_that_moves_is_an_outage_of_its_sale_and_then_fences_it(
    cluster: RedisCluster, inventory: Inventory, items: list[str]
) -> None:
    item, *others = items
    outbox = Outbox(inventory.redis)
    assert await sells(inventory, item)
    before, accepted = inventory.node_of(item), (await inventory.sales([item]))[item].accepted
    migration = Migration(cluster, inventory, item)

    async def is_away() -> None:
        with pytest.raises(RedisUnavailable, match=r"TRYAGAIN|moves") as refused:
            await outcome(inventory, item, a_request())
        assert not refused.value.maybe_executed
        with pytest.raises(RedisUnavailable):
            await inventory.sales([item])
        assert set(await inventory.sales(items, skip_unreadable=True)) == set(others)
        survey = await inventory.survey(items)
        assert set(survey.sales) == set(survey.servers) == set(others)
        assert survey.unread.startswith(f"no node of Redis answers for {item}: ")
        assert [await sells(inventory, each) for each in others] == [True] * len(others)

    migration.begin()
    await is_away()
    migration.move_keys()
    await is_away()
    migration.end()
    assert await outcome(inventory, item, a_request()) is Outcome.FENCED
    assert inventory.node_of(item) != before
    assert (await inventory.sales([item]))[item].accepted == accepted
    assert await outbox.lengths([item]) == {item: accepted}


async def test_two_nodes_that_name_each_other_are_an_outage_of_the_sale(
    cluster: RedisCluster, inventory: Inventory, items: list[str]
) -> None:
    item, *others = items
    migration = Migration(cluster, inventory, item)
    migration.begin()
    migration.move_keys()
    # The target still names the source.
    owner = migration.ask(migration.target, "CLUSTER", "MYID")
    migration.ask(migration.source, "CLUSTER", "SETSLOT", migration.slot, "NODE", owner)
    for _ in range(3):
        results = await asyncio.gather(
            outcome(inventory, item, a_request()),
            inventory.sales([item]),
            inventory.close(item, f"default/{item}", 2),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, RedisUnavailable):
                assert "moves" in str(result)
                assert not result.maybe_executed
            else:  # Valkey's target takes the slot when it next hears from the source
                assert not isinstance(result, Exception)
                assert migration.owns_slot(migration.target)
    assert [await sells(inventory, each) for each in others] == [True] * len(others)
    migration.end()
    assert await outcome(inventory, item, a_request()) is Outcome.FENCED


async def test_a_slot_without_an_owner_is_an_outage_of_its_sale_only(
    cluster: RedisCluster, inventory: Inventory, items: list[str]
) -> None:
    item, *others = items
    migration = Migration(cluster, inventory, item)

    await migration.unassign()
    try:

        async def noticed() -> bool:
            with pytest.raises(RedisUnavailable):
                await outcome(inventory, item, a_request())
            return not inventory.node_of(item)

        await until(noticed)
        with pytest.raises(RedisUnavailable, match="no node of the cluster has slot"):
            await outcome(inventory, item, a_request())
        with pytest.raises(RedisUnavailable):
            await inventory.sales([item])
        with pytest.raises(RedisUnavailable):
            await inventory.servers([item])
        survey = await inventory.survey(items)
        assert set(survey.sales) == set(survey.servers) == set(others)
        assert survey.unread.startswith(f"no node of Redis answers for {item}: ")
        assert [await sells(inventory, each) for each in others] == [True] * len(others)
    finally:
        migration.assign()
    await until(lambda: sells(inventory, item), ignoring=(RedisUnavailable,))


@pytest.mark.parametrize("read", ["sales", "call"])
async def test_a_stale_map_is_corrected_by_the_first_answer(
    cluster: RedisCluster, inventory: Inventory, items: list[str], read: str
) -> None:
    item = items[0]
    stale = redis_client.connect(cluster.url)
    other = Inventory(stale)
    await other.sales(items)
    migration = Migration(cluster, inventory, item)
    migration.begin()
    migration.move_keys()
    migration.end()
    if read == "sales":
        assert set(await other.sales(items)) == set(items)
    else:
        assert await other.close(item, f"default/{item}", 2) == "closed"
    await stale.aclose()


async def test_a_heartbeat_is_written_on_the_node_of_each_item(
    cluster: RedisCluster, inventory: Inventory, items: list[str]
) -> None:
    lost, *others = items
    counts = dict.fromkeys(items, 3)
    clocks = await inventory.clocks()
    assert await heartbeat.beat(inventory.redis, "pod", counts, clocks) == (set(clocks), set())
    for item in items:
        server = await inventory.server(item)
        [report] = await heartbeat.living(inventory.redis, item, server)
        assert report[:2] == ("pod", 3)
        assert report.sampled_ms == clocks[inventory.node_of(item)].now_ms
    async with stopped(server_of(cluster, inventory, lost), inventory, items):
        clocks = await inventory.clocks()
        assert set(clocks) == {inventory.node_of(item) for item in others}
        assert await heartbeat.beat(inventory.redis, "pod", counts, clocks) == (set(clocks), set())


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three primaries with a replica each."""
    with RedisCluster(tmp_path_factory.mktemp("replicated"), replicas=1) as started:
        yield started


@pytest.fixture
async def of_replicated(replicated: RedisCluster) -> AsyncIterator[Inventory]:
    """Knows the primaries."""
    client = redis_client.connect(replicated.url)
    found = Inventory(client)
    await found.nodes.all()
    yield found
    await client.aclose()


@pytest.mark.slow
async def test_the_watch_finds_the_successor_of_a_primary_without_any_call(
    replicated: RedisCluster, of_replicated: Inventory, new_item: Callable[[], str]
) -> None:
    inventory, item = of_replicated, new_item()
    former = inventory.node_of(item)
    watching = asyncio.create_task(inventory.nodes.watch())
    successor = await fail_over(replicated, inventory, item)
    await until(lambda: inventory.node_of(item) != former)
    assert inventory.node_of(item) == f"127.0.0.1:{successor.port}"
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.slow
async def test_a_former_primary_has_no_clock(
    replicated: RedisCluster, of_replicated: Inventory, new_item: Callable[[], str]
) -> None:
    item = new_item()
    former = of_replicated.node_of(item)
    successor = await fail_over(replicated, of_replicated, item)

    async def followed() -> bool:
        return f"127.0.0.1:{successor.port}" in await of_replicated.clocks()

    await until(followed, ignoring=(RedisUnavailable,))
    assert former not in await of_replicated.clocks()


@pytest.mark.slow
async def test_a_failover_fences_the_sales_of_its_node_only(
    replicated: RedisCluster, of_replicated: Inventory, new_item: Callable[[], str]
) -> None:
    inventory = of_replicated
    items = [new_item() for _ in range(12)]
    for item in items:
        await opened(inventory, a_sale(item, stock=1_000_000))
    lost, node = items[0], inventory.node_of(items[0])
    others = [item for item in items if inventory.node_of(item) != node]
    server_of(replicated, inventory, lost).kill()

    async def fenced() -> bool:
        assert all([await sells(inventory, item) for item in others])
        return await outcome(inventory, lost, a_request()) is Outcome.FENCED

    await until(fenced, ignoring=(RedisUnavailable,))
    assert inventory.node_of(lost) != node


async def test_the_watch_notices_that_the_only_server_became_a_node(inventory: Inventory) -> None:
    """A call of several items gets no MOVED."""
    inventory.nodes.single = inventory.nodes._seed
    watching = asyncio.create_task(inventory.nodes.watch())
    await until(lambda: inventory.nodes.single is None)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_look_that_fails_after_a_moved_is_an_outage(
    inventory: Inventory, new_item: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> None:
        raise Disconnected("no node has answered in time")

    inventory.nodes.single = inventory.nodes._seed
    monkeypatch.setattr(inventory.nodes, "_read", fails)
    items = [new_item() for _ in range(20)]  # not all are on the node of the address
    with pytest.raises(RedisUnavailable, match="no node has answered in time"):
        await inventory.sales(items)


async def test_a_cluster_without_slots_has_a_remedy(tmp_path: Path) -> None:
    with RedisServer(tmp_path, clustered=True) as server:
        client = redis_client.connect(server.url)
        remedy = rf"the cluster of 127.0.0.1:{server.port} has no slots .*form-redis-cluster"
        with pytest.raises(RedisUnavailable, match=remedy):
            await redis_facts.read(client)
        await client.aclose()


async def test_a_user_without_the_command_for_slots_is_a_mistake_and_no_outage(
    cluster: RedisCluster,
) -> None:
    client = redis_client.connect(url_of(cluster.servers[0], OPERATOR))
    with pytest.raises(UnmetRequirement, match="needs the command CLUSTER SLOTS"):
        await redis_facts.read(client)
    await client.aclose()


async def test_a_database_besides_0_is_a_mistake_and_no_outage(cluster: RedisCluster) -> None:
    client = redis_client.connect(cluster.url.replace("/0", "/3"))
    with pytest.raises(UnmetRequirement, match="names database 3"):
        await redis_facts.read(client)
    await client.aclose()
