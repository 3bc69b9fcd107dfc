"""One Redis server without a replica, behind one address."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from redis.exceptions import RedisError

from dev.stack.redis import RedisServer
from tests.faults.redis_pair import DEADLINE_SECONDS, RedisPair, ask


class RedisAlone(RedisPair):
    """The server. Nothing replaces it while it is away."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.servers = self.servers[:1]

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["RedisAlone"]:
        [server] = self.servers
        await asyncio.to_thread(server.start)
        self.proxy.target_port = server.port
        measuring = asyncio.create_task(self._measure())
        try:
            async with self.proxy.serve():
                yield self
        finally:
            measuring.cancel()
            await asyncio.gather(measuring, return_exceptions=True)
            await asyncio.to_thread(server.kill)

    async def await_health(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            with contextlib.suppress(RedisError, OSError):
                await ask(self._following.port, "PING")
                return
            assert time.monotonic() < deadline, "Redis does not answer"
            await asyncio.sleep(0.05)

    async def _primary(self) -> RedisServer:
        return self._following
