"""Two Redis servers, one the replica of the other, with a Sentinel, behind one address.

The address is a proxy that follows Sentinel, as a Service that selects the primary does.
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
from redis.exceptions import RedisError

from dev.stack.process import Server
from dev.stack.redis import RedisServer, default_binary
from tests.support.proxy import Proxy

DOWN_AFTER_MS: Final = 1_500
"""How long a primary is silent before Sentinel looks for another."""
MASTER: Final = "sale"
FSYNC_SECONDS: Final = 1.0
"""What a machine that loses power loses of an `everysec` file, at the least often seen."""
DEADLINE_SECONDS: Final = 60.0


class SentinelServer(Server):
    """The server's own binary as a Sentinel: one of them decides alone."""

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
        if not self._config.exists():  # it writes down what it learns
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
    """What happens to the primary happens to whichever is it at that moment."""

    def __init__(self, folder: Path) -> None:
        self.servers = RedisServer(folder / "redis-1"), RedisServer(folder / "redis-2")
        self.sentinel = SentinelServer(folder / "sentinel", self.servers[0])
        self.door = Proxy()
        self._folder = folder
        self._following = self.servers[0]
        self._sizes: deque[tuple[float, dict[Path, int]]] = deque(maxlen=200)

    @property
    def url(self) -> str:
        """Where the engine finds it."""
        return f"redis://127.0.0.1:{self.door.port}/0"

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["RedisPair"]:
        """Runs all of it."""
        first, second = self.servers
        await asyncio.to_thread(first.start)
        second.options = ("--replicaof", "127.0.0.1", str(first.port))
        await asyncio.to_thread(second.start)
        await asyncio.to_thread(self.sentinel.start)
        self.door.target_port = first.port
        tasks: list[asyncio.Task[None]] = []
        try:
            async with self.door.serve():
                tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._measure())]
                await self.whole()
                yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for server in (self.sentinel, *self.servers):
                await asyncio.to_thread(server.kill)

    async def set_durability(self, *, always: bool) -> None:
        """`appendfsync` of both, also after they start again."""
        for server in self.servers:
            server.appendfsync = "always" if always else "everysec"
            await _ask(server.port, "CONFIG", "SET", "appendfsync", server.appendfsync)

    async def whole(self) -> None:
        """Returns when one is the primary and the other its replica, up to date."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            with contextlib.suppress(RedisError, OSError):
                primary = await self._primary()
                info = await _ask(primary.port, "INFO", "replication")
                replica = info.get("slave0", {}).get("state")
                if info["role"] == "master" and replica == "online" and self._following is primary:
                    return
            assert time.monotonic() < deadline, "Redis has no primary with a replica"
            await asyncio.sleep(0.05)

    # Faults. Each ends with both servers running.

    async def kill(self, seconds: float) -> None:
        """Kills the primary; for longer than Sentinel waits, another is made."""
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
        """Kills the primary and takes away what was written and not flushed to disk."""
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
        await _ask(self._following.port, "FLUSHALL")

    async def restore_older_copy(self, seconds: float) -> None:
        """Copies the primary's files and puts the copy in their place some time later."""
        server, copy = self._following, self._folder / "older-copy"
        files = server.data / "appendonlydir"
        await asyncio.to_thread(shutil.copytree, files, copy)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(server.stop)
        shutil.rmtree(files)
        shutil.move(copy, files)
        await self._start(server)

    async def fail_over(self, seconds: float) -> None:
        """Makes a replica the primary that has heard nothing for some time."""
        await self.leave_behind(min(seconds, 1.0))
        await self.promote()

    async def leave_behind(self, seconds: float) -> None:
        """Cuts the replica off and lets the primary go on for a while."""
        await asyncio.to_thread(self._replica.pause)
        await _ask(self._following.port, "CLIENT", "KILL", "TYPE", "replica")
        await asyncio.sleep(seconds)

    async def promote(self) -> None:
        """Kills the primary for so long that Sentinel makes its replica the primary."""
        old, new = self._following, self._replica
        await asyncio.to_thread(old.kill)
        await asyncio.to_thread(new.resume)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self._following is old:
            assert time.monotonic() < deadline, "Sentinel promotes nobody"
            await asyncio.sleep(0.05)
        await self._start(old)

    @property
    def _replica(self) -> RedisServer:
        return next(server for server in self.servers if server is not self._following)

    async def _start(self, server: RedisServer) -> None:
        primary = await self._primary()
        server.options = (
            () if primary is server else ("--replicaof", "127.0.0.1", str(primary.port))
        )
        await asyncio.to_thread(server.start)

    async def _primary(self) -> RedisServer:
        address = await _ask(self.sentinel.port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
        return next(server for server in self.servers if str(server.port) == address[1])

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(RedisError, OSError):
                if (primary := await self._primary()) is not self._following:
                    self._following = primary
                    self.door.target_port = primary.port
                    self.door.cut_all()
            await asyncio.sleep(0.1)

    async def _measure(self) -> None:
        """Notes how large the files are, so that a power cut knows how large they were."""
        while True:
            files = (self._following.data / "appendonlydir").glob("*.aof")
            self._sizes.append((time.monotonic(), {path: path.stat().st_size for path in files}))
            await asyncio.sleep(0.05)


async def _ask(port: int, *command: str) -> Any:  # noqa: ANN401 - what redis-py makes of it
    client = redis.asyncio.Redis(
        host="127.0.0.1", port=port, decode_responses=True, socket_timeout=5
    )
    try:
        call = cast("Callable[..., Awaitable[Any]]", client.execute_command)
        return await call(*command)
    finally:
        await client.aclose()
