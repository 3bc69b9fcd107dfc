"""A Redis primary with a replica and a Sentinel, behind one address.

The address is a proxy that follows Sentinel, like a Service that selects the primary.
"""

import asyncio
import contextlib
import shutil
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, cast

import redis.asyncio
from redis.exceptions import ReadOnlyError, RedisError

from dev.stack.process import Server
from dev.stack.redis import RedisServer, default_binary
from tests.support import redis_users
from tests.support.proxy import Proxy

DOWN_AFTER_MS: Final = 1_500
"""How long a primary must be silent before Sentinel promotes the replica."""
MASTER: Final = "sale"
FSYNC_SECONDS: Final = 1.0
"""The part of an `everysec` file that a power cut loses here. Real losses are rarely smaller."""
DEADLINE_SECONDS: Final = 60.0


class SentinelServer(Server):
    """The Redis binary as a Sentinel. A single one decides alone."""

    name: ClassVar[str] = "sentinel"

    def __init__(self, data: Path, primary: RedisServer) -> None:
        super().__init__(data)
        self._primary = primary

    @property
    def _config(self) -> Path:
        return self.data / "sentinel.conf"

    def _prepare(self) -> None:
        lines = (
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self.data}",
            f"sentinel monitor {MASTER} 127.0.0.1 {self._primary.port} 1",
            f"sentinel down-after-milliseconds {MASTER} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {MASTER} 4000",
        )
        if not self._config.exists():  # Sentinel keeps its state in this file
            self._config.write_text("".join(f"{line}\n" for line in lines))

    def _command(self) -> list[str]:
        return [str(default_binary()), str(self._config), "--sentinel"]

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "LC_ALL": "C"}

    def _ready(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")


class RedisPair:
    """Two servers. Each fault affects the server that is the primary at that moment."""

    def __init__(self, folder: Path) -> None:
        self.servers: tuple[RedisServer, ...] = (
            RedisServer(folder / "redis-1", options=redis_users.options()),
            RedisServer(folder / "redis-2", options=redis_users.options()),
        )
        self.sentinel = SentinelServer(folder / "sentinel", self.servers[0])
        self.proxy = Proxy()
        self._folder = folder
        self._serving = True
        """Whether the tasks go on. A client can swallow the cancellation of one."""
        self._following = self.servers[0]
        self._sizes: deque[tuple[float, dict[Path, int]]] = deque(maxlen=200)

    @property
    def url(self) -> str:
        """The address for the operator."""
        return redis_users.url_of(self.servers[0], redis_users.OPERATOR, self.proxy.port)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["RedisPair"]:
        """Run both servers, the Sentinel and the proxy."""
        first, second = self.servers
        await asyncio.to_thread(first.start)
        second.options += ("--replicaof", "127.0.0.1", str(first.port))
        await asyncio.to_thread(second.start)
        await asyncio.to_thread(self.sentinel.start)
        self.proxy.target_port = first.port
        tasks: list[asyncio.Task[None]] = []
        try:
            async with self.proxy.serve():
                tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._measure())]
                await self.await_health()
                yield self
        finally:
            self._serving = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for server in (self.sentinel, *self.servers):
                await asyncio.to_thread(server.kill)

    async def set_durability(self, *, always: bool) -> None:
        """Set `appendfsync` of both servers, now and for later starts."""
        for server in self.servers:
            server.appendfsync = "always" if always else "everysec"
            await ask(server.port, "CONFIG", "SET", "appendfsync", server.appendfsync)

    async def await_health(self) -> None:
        """Wait until one server is the primary and the other its synchronised replica."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            with contextlib.suppress(RedisError, OSError):
                primary = await self._primary()
                info = await ask(primary.port, "INFO", "replication")
                replica = info.get("slave0", {}).get("state")
                if info["role"] == "master" and replica == "online" and self._following is primary:
                    return
            assert time.monotonic() < deadline, "Redis has no primary with a synchronised replica"
            await asyncio.sleep(0.05)

    async def follow(self, item: str) -> None:
        """Let the following faults affect the server of an item. Here it is always the primary."""

    # The faults. Each ends with both servers running.

    async def cut(self, times: int) -> None:
        """Break the connection before the reply of the next calls."""
        self.proxy.cut_replies(b"EVALSHA", times)

    async def kill(self, seconds: float) -> None:
        """Kill the primary for some seconds. Sentinel may promote the replica meanwhile."""
        server = self._following
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(seconds)
        await self._start(server)

    async def restart(self, seconds: float) -> None:
        server = self._following
        await asyncio.to_thread(server.stop)
        await asyncio.sleep(seconds)
        await self._start(server)

    async def freeze(self, seconds: float) -> None:
        server = self._following
        await asyncio.to_thread(server.pause)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(server.resume)

    async def lose_power(self) -> None:
        """Kill the primary, and cut off the data that was written but not flushed to disk."""
        server = self._following
        await asyncio.to_thread(server.kill)
        since = time.monotonic() - FSYNC_SECONDS
        before = [sizes for at, sizes in self._sizes if at <= since]
        if server.appendfsync != "always" and before:
            for path, size in before[-1].items():
                if path.parent.parent == server.data and path.exists():
                    with path.open("r+b") as file:
                        file.truncate(min(size, path.stat().st_size))
        await self._start(server)

    async def flush(self) -> None:
        """Empty the primary. A server that was just replaced is read-only."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(ReadOnlyError):
                await ask(self._following.port, "FLUSHALL")
                return
            await asyncio.sleep(0.1)
        raise AssertionError("Redis has no primary")

    async def restore_older_copy(self, seconds: float) -> None:
        """Copy the primary's files, and replace the files with the copy some time later."""
        server, copy = self._following, self._folder / "older-copy"
        files = server.data / "appendonlydir"
        await asyncio.to_thread(shutil.copytree, files, copy)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(server.stop)
        shutil.rmtree(files)
        shutil.move(copy, files)
        await self._start(server)

    async def fail_over(self, seconds: float) -> None:
        """Promote a replica that lags behind. One that was never in sync would not be elected."""
        await self.await_health()
        await self.leave_behind(min(seconds, 1.0))
        await self.promote()

    async def leave_behind(self, seconds: float) -> None:
        """Disconnect the replica, and let the primary continue for some seconds."""
        # An election for an earlier fault can end between the two steps.
        primary, replica = self._following, self._replica
        await asyncio.to_thread(replica.pause)
        await ask(primary.port, "CLIENT", "KILL", "TYPE", "replica")
        await asyncio.sleep(seconds)

    async def promote(self) -> None:
        """Kill the primary until Sentinel has promoted its replica."""
        old, new = self._following, self._replica
        await asyncio.to_thread(old.kill)
        await asyncio.to_thread(new.resume)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self._following is old:
            assert time.monotonic() < deadline, "Sentinel does not promote the replica"
            await asyncio.sleep(0.05)
        await self._start(old)

    @property
    def _replica(self) -> RedisServer:
        return next(server for server in self.servers if server is not self._following)

    async def _start(self, server: RedisServer) -> None:
        primary = await self._primary()
        follow = () if primary is server else ("--replicaof", "127.0.0.1", str(primary.port))
        server.options = (*redis_users.options(), *follow)
        await asyncio.to_thread(server.start)

    async def _primary(self) -> RedisServer:
        address = await ask(self.sentinel.port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
        return next(server for server in self.servers if str(server.port) == address[1])

    async def _follow(self) -> None:
        while self._serving:
            with contextlib.suppress(RedisError, OSError):
                if (primary := await self._primary()) is not self._following:
                    self._following = primary
                    self.proxy.target_port = primary.port
                    self.proxy.cut_all()
            await asyncio.sleep(0.1)

    async def _measure(self) -> None:
        """Record the sizes of the files, for a power cut."""
        while self._serving:
            files = (self._following.data / "appendonlydir").glob("*.aof")
            self._sizes.append((time.monotonic(), {path: path.stat().st_size for path in files}))
            await asyncio.sleep(0.05)


async def ask(port: int, *command: str) -> Any:  # noqa: ANN401 - redis-py returns any type
    """Send one command to a server of this machine."""
    client = redis.asyncio.Redis(
        host="127.0.0.1", port=port, decode_responses=True, socket_timeout=5
    )
    try:
        call = cast("Callable[..., Awaitable[Any]]", client.execute_command)
        return await call(*command)
    finally:
        await client.aclose()
