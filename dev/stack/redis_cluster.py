"""A Redis Cluster of plain processes on loopback."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from redis.asyncio import Redis

from dev.stack.redis import RedisServer
from flashsale_operator.ctl import redis_cluster


class RedisCluster:
    """Three primaries, each with `replicas` replicas. The servers are in this order.

    A server can be killed, paused and started again, as any other.
    """

    name: ClassVar[str] = "redis-cluster"

    def __init__(
        self,
        data: Path,
        binary: Path | None = None,
        *,
        replicas: int = 0,
        options: Sequence[str] = (),
        detached: bool = False,
    ) -> None:
        count = redis_cluster.PRIMARIES * (1 + replicas)
        self.servers = [
            RedisServer(
                data / f"redis-{number}",
                binary=binary,
                options=options,
                clustered=True,
                detached=detached,
            )
            for number in range(1, count + 1)
        ]

    @property
    def url(self) -> str:
        """The address for clients: that of the first node. Any node would do."""
        return self.servers[0].url

    def form(self) -> bool:
        """Make one cluster of the servers, which run. False if they are one already."""
        return asyncio.run(self._form())

    async def _form(self) -> bool:
        async with AsyncExitStack() as clients:
            nodes = [
                await clients.enter_async_context(Redis.from_url(server.url, decode_responses=True))
                for server in self.servers
            ]
            addresses = [("127.0.0.1", server.port, server.bus_port) for server in self.servers]
            return await redis_cluster.form(nodes, addresses)

    def __enter__(self) -> Self:
        for server in self.servers:
            server.start()
        self.form()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for server in self.servers:
            server.kill()
