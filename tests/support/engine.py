"""The whole engine: two API processes and two consumers on real servers."""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from tests.support.manifests import flash_sale


async def flashsalectl(
    addresses: Addresses, *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run flashsalectl as a user would, with the servers in `addresses`."""

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("flashsalectl"), *arguments],
            input=stdin,
            env={**os.environ, **addresses.environment()},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return await asyncio.to_thread(run)


def manifest(item: str, **spec: object) -> str:
    """Make the manifest of the item's sale, `default/<item>`."""
    return json.dumps(flash_sale(item, item, namespace=None, **spec))


@dataclass(frozen=True, slots=True)
class Engine:
    """All processes of an engine. A test may stop, kill or pause any of them."""

    redis: RedisServer
    kafka: KafkaServer
    postgres: PostgresServer
    apis: tuple[ApiServer, ApiServer]
    consumers: tuple[ConsumerServer, ConsumerServer]
    addresses: Addresses
    folder: Path

    @property
    def urls(self) -> list[str]:
        return [api.url for api in self.apis]

    def start(self) -> None:
        """Start the processes that do not run."""
        servers = (self.redis, self.kafka, self.postgres, *self.consumers, *self.apis)
        for server in servers:
            server.start()

    async def ctl(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return await flashsalectl(self.addresses, *arguments, stdin=stdin)

    async def apply(
        self, item: str, *, below_held: bool = False, **spec: object
    ) -> subprocess.CompletedProcess[str]:
        """Apply a manifest and expect success.

        `below_held` also accepts `StockBelowHeld`: a stock that is less than buyers hold.
        """
        done = await self.ctl("apply", "-f", "-", stdin=manifest(item, **spec))
        output = done.stdout + done.stderr
        assert done.returncode == 0 or (below_held and "StockBelowHeld" in output), output
        return done
