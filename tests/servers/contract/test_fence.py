"""The fence, on servers that lose keys, restart or fail over."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ReadOnlyError, RedisError

from dev.stack.servers import RedisServer
from flashsale import heartbeat, redis_client
from flashsale.clocks import ServerTime
from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.inventory import Applied, Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Outbox
from flashsale.reservations import Outcome
from tests.support.eventually import until
from tests.support.inventory import a_request, a_sale, answers, opened, outcome
from tests.support.proxy import Proxy


@pytest.mark.parametrize("part", ["buyers", "reservations", "outbox"])
async def test_a_sale_that_lost_a_key_is_fenced(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str, part: str
) -> None:
    spec = await opened(inventory, a_sale(item))
    first = a_request("ann")
    [answer] = await answers(inventory, item, [first])
    await outbox.settle(item, [(answer.detail, first.reservation_id, 1)])
    assert await outcome(inventory, item, a_request("bob")) is Outcome.ACCEPTED
    await redis.delete(getattr(ItemKeys.of(item), part))
    assert await outcome(inventory, item, a_request("cid")) is Outcome.FENCED
    assert (await inventory.sales([item]))[item].torn
    assert await inventory.apply(spec, 2) is Applied.FENCED


async def test_a_restarted_server_fences_its_sales(
    tmp_path: Path, redis_server: RedisServer, item: str
) -> None:
    with RedisServer(tmp_path, binary=redis_server.binary, appendfsync="always") as server:
        client = redis_client.connect(server.url)
        inventory = Inventory(client)
        spec = await opened(inventory, a_sale(item, 5))
        bought = a_request("ann")
        [answer] = await answers(inventory, item, [bought])
        server.kill()
        with pytest.raises(RedisUnavailable):
            await outcome(inventory, item, a_request("bob"))
        server.start()
        assert await outcome(inventory, item, a_request("bob")) is Outcome.FENCED
        assert await outcome(inventory, item, bought) is Outcome.FENCED
        assert await inventory.apply(spec, 2) is Applied.FENCED
        # Reservations accepted before the restart can still be published and settled.
        assert await Outbox(client).settle(item, [(answer.detail, bought.reservation_id, 1)]) == 1
        assert (await inventory.sales([item]))[item].accepted == 1
        await client.aclose()


async def follows(client: Redis) -> bool:
    """Whether the server has synchronised with its master."""
    return bool((await client.info("replication"))["master_link_status"] == "up")


class Endpoint:
    """An address that leads to one of two servers. A failover closes no connection to it."""

    def __init__(self, one: RedisServer, two: RedisServer) -> None:
        self.proxy = Proxy(one.port)
        self._ports = one.port, two.port
        self.former, self.successor = (redis_client.connect(each.url) for each in (one, two))

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.proxy.port}"

    async def fail_over(self) -> None:
        former, successor = self._ports
        await self.successor.replicaof("127.0.0.1", former)
        await until(lambda: follows(self.successor), "the replica follows")
        await self.successor.replicaof("NO", "ONE")
        await self.former.replicaof("127.0.0.1", successor)
        self.proxy.target_port = successor


@pytest.fixture
async def endpoint(tmp_path: Path) -> AsyncIterator[Endpoint]:
    with RedisServer(tmp_path / "one") as one, RedisServer(tmp_path / "two") as two:
        found = Endpoint(one, two)
        async with found.proxy.serve():
            yield found
        await found.former.aclose()
        await found.successor.aclose()


async def test_a_write_leaves_a_server_that_was_demoted(endpoint: Endpoint) -> None:
    inventory = Inventory(redis_client.connect(endpoint.url))
    await inventory.index.add(["phone"])
    await endpoint.fail_over()

    async def written() -> bool:
        await inventory.index.add(["other"])
        return "other" in await Inventory(endpoint.successor).index.items()

    await until(written, ignoring=(RedisUnavailable,))
    await inventory.redis.aclose()


async def test_a_refused_call_leaves_the_link_at_once(endpoint: Endpoint) -> None:
    inventory = Inventory(redis_client.connect(endpoint.url))
    [node] = await inventory.nodes.all()
    link = await node.pool.link()
    assert await link.ask("SET", "key", "before") == "OK"
    await endpoint.fail_over()
    with pytest.raises(ReadOnlyError) as refused:
        await link.ask("SET", "key", "after")
    inventory.nodes.unavailable(refused.value, node)
    # The call is repeated in the same turn of the loop.
    assert await (await node.pool.link()).ask("SET", "key", "after") == "OK"
    assert await endpoint.successor.get("key") == "after"
    await inventory.redis.aclose()


async def test_the_watch_leaves_a_server_that_was_demoted(endpoint: Endpoint) -> None:
    inventory = Inventory(redis_client.connect(endpoint.url))
    [node] = await inventory.nodes.all()
    watching = asyncio.create_task(inventory.nodes.watch())

    async def ports() -> set[str]:
        by_link = str(await (await node.pool.link()).ask("INFO", "server"))
        by_pool = await inventory.redis.info("server")
        return {by_link.partition("tcp_port:")[2].split()[0], str(by_pool["tcp_port"])}

    assert len(await ports()) == 1
    await endpoint.fail_over()

    async def followed() -> bool:
        return await ports() == {str(endpoint.proxy.target_port)}

    await until(followed, ignoring=(RedisError,))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await inventory.redis.aclose()


async def test_a_server_that_was_demoted_has_no_clock(endpoint: Endpoint) -> None:
    inventory = Inventory(redis_client.connect(endpoint.url))
    await inventory.server()
    await endpoint.fail_over()
    expected = await Inventory(endpoint.successor).server()
    found = await until(inventory.server, ignoring=(RedisUnavailable,))
    assert found.run_id == expected.run_id
    await inventory.redis.aclose()


async def test_a_server_that_was_demoted_and_promoted_again_fences_its_sales(
    tmp_path: Path, redis_server: RedisServer, item: str
) -> None:
    """It keeps its run_id, but can lack writes that the master in between did not replicate."""
    binary = redis_server.binary
    with (
        RedisServer(tmp_path / "one", binary=binary) as one,
        RedisServer(tmp_path / "two", binary=binary) as two,
    ):
        client, other = redis_client.connect(one.url), redis_client.connect(two.url)
        inventory = Inventory(client)
        before = await inventory.server(item)
        await opened(inventory, a_sale(item, 5))
        await other.replicaof("127.0.0.1", one.port)
        await until(lambda: other.exists(ItemKeys.of(item).sale), "the replica has the sale")
        # Getting its first replica does not change a master's run.
        assert (await inventory.server(item)).run_id == before.run_id
        assert await outcome(inventory, item, a_request("ann")) is Outcome.ACCEPTED
        await other.replicaof("NO", "ONE")
        assert await outcome(Inventory(other), item, a_request("bob")) is Outcome.FENCED
        await client.replicaof("127.0.0.1", two.port)
        await until(lambda: follows(client), "the former master follows")
        await client.replicaof("NO", "ONE")
        assert await outcome(inventory, item, a_request("cid")) is Outcome.FENCED
        assert (await client.info("server"))["run_id"] == before.run_id.partition(":")[0]
        await client.aclose()
        await other.aclose()


@pytest.mark.slow
async def test_a_server_that_forgets_its_failovers_stays_fenced(
    tmp_path: Path, redis_server: RedisServer, item: str
) -> None:
    """After a failover and back, a server without replicas has the run again that it had first."""
    binary = redis_server.binary
    with (
        RedisServer(tmp_path / "one", binary=binary) as one,
        RedisServer(tmp_path / "two", binary=binary) as two,
    ):
        client, other = redis_client.connect(one.url), redis_client.connect(two.url)
        inventory = Inventory(client)
        await opened(inventory, a_sale(item, 5))
        before = await inventory.server(item)
        await client.config_set("repl-backlog-ttl", 1)
        await other.replicaof("127.0.0.1", one.port)
        await until(lambda: other.exists(ItemKeys.of(item).sale), "the replica has the sale")
        await other.replicaof("NO", "ONE")
        await client.replicaof("127.0.0.1", two.port)
        await until(lambda: follows(client), "the former master follows")
        await client.replicaof("NO", "ONE")
        assert await outcome(inventory, item, a_request("ann")) is Outcome.FENCED

        async def forgotten() -> bool:
            return (await inventory.server(item)).run_id == before.run_id

        await until(forgotten, "the server has its first run again")
        assert await outcome(inventory, item, a_request("bob")) is Outcome.FENCED
        await client.aclose()
        await other.aclose()


async def test_a_report_by_the_clock_of_another_run_is_left_out(redis: Redis, item: str) -> None:
    inventory = Inventory(redis)
    server = await inventory.server(item)
    node = inventory.node_of(item)
    await heartbeat.beat(redis, "pod", {item: 1}, {node: ServerTime(server.now_ms, "another")})
    assert not await heartbeat.living(redis, item, server)
    await heartbeat.beat(redis, "pod", {item: 3}, {node: server})
    assert await heartbeat.living(redis, item, server) == [("pod", 3, server.now_ms)]
    later = ServerTime(server.now_ms + 1_000 * heartbeat.EXPIRY_SECONDS + 1, server.run_id)
    assert not await heartbeat.living(redis, item, later)
    await heartbeat.retire(redis, "pod", [item])
    assert not await heartbeat.living(redis, item, server)


async def test_the_pages_of_a_fenced_sale_are_not_read(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item))
    await answers(inventory, item, [a_request()])
    [(snapshot, page)] = [page async for page in inventory.reservation_pages(item)]
    assert (snapshot.sale_id, len(page)) == (f"default/{item}", 1)
    await redis.hset(ItemKeys.of(item).sale, "run_id", "another")
    with pytest.raises(ContractViolation, match="is fenced: rebuild it first"):
        await anext(inventory.reservation_pages(item))
