"""Clients of a Redis Cluster, for tests that also run on one server, and slots that move."""

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias, cast

import redis as blocking
from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import MovedError, RedisError, ResponseError

from dev.stack.servers import RedisCluster, RedisServer
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.nodes import Nodes
from tests.support.eventually import until

Deployment: TypeAlias = RedisServer | RedisCluster


def servers_of(deployment: Deployment) -> Sequence[RedisServer]:
    return deployment.servers if isinstance(deployment, RedisCluster) else [deployment]


@asynccontextmanager
async def routed(deployment: Deployment) -> AsyncIterator[Redis]:
    """Yield a client whose commands go to the server of their key, which is the first argument."""
    client: Any = redis_client.connect(deployment.url)
    router = redis_client.connect(deployment.url)
    nodes = Nodes.of_client(router)

    async def execute_command(*words: Any, **options: Any) -> Any:  # noqa: ANN401 - redis-py's
        return await nodes.call(
            str(words[1]), lambda redis: cast("Any", redis).execute_command(*words, **options)
        )

    if isinstance(deployment, RedisCluster):
        client.execute_command = execute_command
    try:
        yield client
    finally:
        await client.aclose()
        await router.aclose()


@contextmanager
def refused_by_one(cluster: RedisCluster) -> Iterator[tuple[str, str]]:
    """Yield an address whose user one primary does not know, and the name of that primary."""
    *knowing, refusing = cluster.servers
    clients = [blocking.Redis.from_url(server.url) for server in knowing]
    for client in clients:
        client.acl_setuser(
            "guest", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all"]
        )
    try:
        yield (
            cluster.url.replace("redis://", "redis://guest:secret@"),
            f"127.0.0.1:{refusing.port}",
        )
    finally:
        for client in clients:
            client.acl_deluser("guest")
            client.close()


def server_of(cluster: RedisCluster, inventory: Inventory, item: str) -> RedisServer:
    port = int(inventory.node_of(item).rpartition(":")[2])
    [found] = [server for server in cluster.servers if server.port == port]
    return found


async def fail_over(cluster: RedisCluster, inventory: Inventory, item: str) -> RedisServer:
    """Makes the replica of the item's primary the primary, and returns it. Both servers run."""
    former, count = server_of(cluster, inventory, item), len(cluster.servers)
    successor = cluster.servers[(cluster.servers.index(former) + count // 2) % count]
    client: Any = redis_client.connect(successor.url)

    async def promoted() -> bool:
        """Asks the replica to take over. It gives up after 5 s without enough votes."""
        with contextlib.suppress(ResponseError):
            await client.execute_command("CLUSTER", "FAILOVER")
        with contextlib.suppress(AssertionError):
            await until(is_primary, seconds=6)
        return await is_primary()

    async def is_primary() -> bool:
        return bool((await client.info("replication"))["role"] == "master")

    await until(promoted, ignoring=(RedisError,))
    await client.aclose()
    return successor


class Migration:
    """Moves the slot of an item to another node, one step at a time, or takes it from its owner."""

    def __init__(self, cluster: RedisCluster, inventory: Inventory, item: str) -> None:
        self.source = server_of(cluster, inventory, item)
        [self.target, *_] = [each for each in cluster.servers if each is not self.source]
        self.servers = cluster.servers
        self.key = ItemKeys.of(item, inventory.engine).sale
        self.slot = key_slot(self.key.encode())

    def ask(self, server: RedisServer, *words: object) -> object:
        with blocking.Redis.from_url(server.url, decode_responses=True) as client:
            return client.execute_command(*words)

    def owns_slot(self, server: RedisServer) -> bool:
        try:
            self.ask(server, "EXISTS", self.key)
        except MovedError:
            return False
        return True

    def begin(self) -> None:
        ids = {each: self.ask(each, "CLUSTER", "MYID") for each in (self.source, self.target)}
        slot = "CLUSTER", "SETSLOT", self.slot
        self.ask(self.target, *slot, "IMPORTING", ids[self.source])
        self.ask(self.source, *slot, "MIGRATING", ids[self.target])

    def move_keys(self) -> None:
        self._move(self.source, self.target)

    def end(self) -> None:
        owner = self.ask(self.target, "CLUSTER", "MYID")
        first = [self.target, self.source]
        for server in [*first, *(each for each in self.servers if each not in first)]:
            self.ask(server, "CLUSTER", "SETSLOT", self.slot, "NODE", owner)

    def give_up(self) -> None:
        """Move the keys back instead of the end."""
        self.ask(self.source, "CLUSTER", "SETSLOT", self.slot, "STABLE")
        self._move(self.target, self.source)
        self.ask(self.target, "CLUSTER", "SETSLOT", self.slot, "STABLE")

    async def unassign(self) -> None:
        """Leave the slot without an owner. Its keys stay."""

        def unassigned() -> bool:
            # The owner's last message may assign the slot again.
            for server in (self.source, *self.servers):
                with contextlib.suppress(ResponseError):
                    self.ask(server, "CLUSTER", "DELSLOTS", self.slot)
            infos = [self.ask(server, "CLUSTER INFO") for server in self.servers]
            return all(
                isinstance(info, dict) and info["cluster_slots_assigned"] == "16383"
                for info in infos
            )

        await until(unassigned)

    def assign(self) -> None:
        """Give the slot back to its owner."""
        self.ask(self.source, "CLUSTER", "ADDSLOTS", self.slot)

    def _move(self, source: RedisServer, target: RedisServer) -> None:
        keys = self.ask(source, "CLUSTER", "GETKEYSINSLOT", self.slot, 100)
        assert isinstance(keys, list)
        if keys:
            # A pod may have sent a heartbeat to the target, if that has been the owner again.
            to = "MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "REPLACE", "KEYS"
            self.ask(source, *to, *keys)
