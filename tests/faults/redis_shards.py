"""A Redis Cluster of three primaries with a replica each. Faults hit the node of one item."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from redis.crc import key_slot
from redis.exceptions import RedisError, ResponseError

from dev.stack.redis import RedisServer
from dev.stack.redis_cluster import RedisCluster
from flashsale.keys import ItemKeys
from flashsale.requirements import SLOTS
from tests.faults.bus import Bus
from tests.faults.redis_pair import DEADLINE_SECONDS, RedisPair, ask
from tests.support import redis_users

NODE_TIMEOUT_MS: Final = "2000"
"""How long a primary must be silent before its replica is elected."""
FORCE_SECONDS: Final = 6.0
"""A replica gives up a failover by force after 5 s."""
ANSWER_SECONDS: Final = 0.5
PRIMARIES: Final = 3
MOVED_AT_ONCE: Final = 100


def shard_of(item: str) -> int:
    """Return which third of the slots an item is in. Each third has a primary of its own."""
    return key_slot(ItemKeys.of(item).sale.encode()) * PRIMARIES // SLOTS


def spared(shard: int) -> int:
    """Return the third of the slots whose primary no fault of an item in `shard` hits."""
    return (shard + 1) % PRIMARIES


class RedisShards(RedisPair):
    """The servers. Each fault affects the primary of the item that `follow` has named."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        users = redis_users.options(clustered=True)
        options = ("--cluster-node-timeout", NODE_TIMEOUT_MS, *users)
        self.cluster = RedisCluster(folder / "shards", replicas=1, options=options)
        self.servers = tuple(self.cluster.servers)
        self.bus = Bus(self.servers)
        self._following = self.servers[0]
        self._slot = 0

    @property
    def url(self) -> str:
        return redis_users.url_of(self.servers[0], redis_users.OPERATOR)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["RedisShards"]:
        tasks: list[asyncio.Task[None]] = []
        async with self.bus.serve():
            try:
                for server in self.servers:
                    await asyncio.to_thread(server.start)
                await asyncio.to_thread(self.cluster.form)
                tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._measure())]
                await self.await_health()
                yield self
            finally:
                self._serving = False
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for server in self.servers:
                    await asyncio.to_thread(server.kill)

    async def follow(self, item: str) -> None:
        """Let the following faults affect the primary of an item."""
        self._slot = key_slot(ItemKeys.of(item).sale.encode())
        self._following = await self._primary()

    async def await_health(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not all(await asyncio.gather(*(_healthy(server) for server in self.servers))):
            assert time.monotonic() < deadline, "the Redis Cluster is not whole"
            await asyncio.sleep(0.1)
        self._following = await self._primary()

    async def cut(self, times: int) -> None:
        """Close all connections of clients again and again."""
        for _ in range(times):
            with contextlib.suppress(RedisError, OSError):
                await ask(self._following.port, "CLIENT", "KILL", "TYPE", "normal")
            await asyncio.sleep(0.05)

    async def lose_two(self, seconds: float) -> None:
        """Kill the item's primary and another one. Later promote their replicas by hand."""
        await self.await_health()
        lost = [self._following, await self._other_primary()]
        for server in lost:
            await asyncio.to_thread(server.kill)
        await asyncio.sleep(seconds)
        for server in lost:
            # With the first replica there is a majority, which may have elected the second one.
            with contextlib.suppress(ResponseError):
                await ask(self._partner(server).port, "CLUSTER", "FAILOVER", "TAKEOVER")
        for server in lost:
            await asyncio.to_thread(server.start)

    async def force(self) -> None:
        """Promote the replica, while its primary sells on."""
        await self.await_health()
        replica, deadline = self._replica, time.monotonic() + DEADLINE_SECONDS
        while True:
            with contextlib.suppress(ResponseError):  # it may be the primary by now
                await ask(replica.port, "CLUSTER", "FAILOVER", "FORCE")
            # A node that still takes the replica for a primary does not vote for it.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FORCE_SECONDS):
                    return await self._elected(replica)
            assert time.monotonic() < deadline, "the replica is not elected by force"

    async def partition(self, seconds: float) -> None:
        """Cut the primary off from the other nodes until its replica is elected, and longer.

        Clients still reach all nodes.
        """
        await self.await_health()
        old, replica = self._following, self._replica
        # A wrong password keeps the replica from connecting again.
        await ask(replica.port, "CONFIG", "SET", "masterauth", "cut off")
        self.bus.cut(old, await ask(old.port, "CLUSTER", "MYID"))
        await ask(old.port, "CLIENT", "KILL", "TYPE", "replica")
        try:
            await self._elected(replica)
            await asyncio.sleep(seconds)
        finally:
            self.bus.reconnect()
            await ask(replica.port, "CONFIG", "SET", "masterauth", "")

    async def _elected(self, replica: RedisServer) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (await ask(replica.port, "INFO", "replication"))["role"] != "master":
            assert time.monotonic() < deadline, "the replica is not elected"
            await asyncio.sleep(0.1)

    async def move_slot(self) -> None:
        """Move the item's slot to another primary, while calls arrive. Further faults hit it."""
        await self.await_health()
        bystander = self.servers[spared(self._slot * PRIMARIES // SLOTS)]
        pair = bystander, self._partner(bystander)
        source, target = self._following, await self._other_primary(besides=pair)
        ids = {each: await ask(each.port, "CLUSTER", "MYID") for each in (source, target)}
        setting = "CLUSTER", "SETSLOT", str(self._slot)
        await ask(target.port, *setting, "IMPORTING", ids[source])
        await ask(source.port, *setting, "MIGRATING", ids[target])
        while keys := await ask(
            source.port, "CLUSTER", "GETKEYSINSLOT", str(self._slot), str(MOVED_AT_ONCE)
        ):
            to = "MIGRATE", "127.0.0.1", str(target.port), "", "0", "5000", "KEYS"
            await ask(source.port, *to, *keys)
        for server in (target, source):
            await ask(server.port, *setting, "NODE", ids[target])

    async def _other_primary(self, besides: Sequence[RedisServer] = ()) -> RedisServer:
        for server in self.servers:
            if server not in (self._following, self._replica, *besides):
                info = await ask(server.port, "INFO", "replication")
                if info["role"] == "master":
                    return server
        raise AssertionError("the cluster has no other primary")

    def _partner(self, server: RedisServer) -> RedisServer:
        """Return the other server of the same shard."""
        at = self.servers.index(server)
        return self.servers[(at + PRIMARIES) % len(self.servers)]

    @property
    def _replica(self) -> RedisServer:
        return self._partner(self._following)

    async def _start(self, server: RedisServer) -> None:
        await asyncio.to_thread(server.start)

    async def _primary(self) -> RedisServer:
        """Return the owner of the slot, by the view of the first node that answers."""
        for server in self.servers:
            if server is self.bus.cut_off:
                continue
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    ranges = await ask(server.port, "CLUSTER", "SLOTS")
                [port] = [entry[2][1] for entry in ranges if entry[0] <= self._slot <= entry[1]]
                return next(each for each in self.servers if each.port == port)
        return self._following

    async def _follow(self) -> None:
        while self._serving:
            self._following = await self._primary()
            await asyncio.sleep(0.1)


async def _healthy(server: RedisServer) -> bool:
    """Whether the server sees all slots, and is connected to its primary or its replica."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            info = await ask(server.port, "CLUSTER INFO")
            replication = await ask(server.port, "INFO", "replication")
    except (RedisError, OSError, TimeoutError):
        return False
    linked = replication.get("master_link_status") == "up"
    replicated = replication.get("slave0", {}).get("state") == "online"
    return bool(info["cluster_state"] == "ok" and (linked or replicated))
