"""The whole engine: two API processes and two consumers on real servers of the test's own."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer


@dataclass(frozen=True, slots=True)
class Engine:
    """Everything that runs; a test may stop, kill or pause any of it."""

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

    async def ctl(self, *arguments: str, manifest: str = "") -> subprocess.CompletedProcess[str]:
        """Runs flashsalectl; `manifest` is its standard input."""

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [Path(sys.executable).with_name("flashsalectl"), *arguments],
                input=manifest,
                env={**os.environ, **self.addresses.environment()},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )

        return await asyncio.to_thread(run)

    async def reapply(self, item: str, **spec: object) -> subprocess.CompletedProcess[str]:
        """Applies a manifest of the item's sale, `default/<item>`."""
        lines = "".join(f"  {name}: {value}\n" for name, value in spec.items())
        return await self.ctl(
            "apply",
            "-f",
            "-",
            manifest=(
                "apiVersion: flashsale.dev/v1alpha1\nkind: FlashSale\n"
                f"metadata:\n  name: {item}\nspec:\n  itemId: {item}\n{lines}"
            ),
        )

    async def apply(
        self, item: str, *, below_held: bool = False, **spec: object
    ) -> subprocess.CompletedProcess[str]:
        """Applies a manifest and expects success.

        `below_held`: the stock may be less than buyers hold, which is said and is no success.
        """
        done = await self.reapply(item, **spec)
        said = done.stdout + done.stderr
        assert done.returncode == 0 or (below_held and "StockBelowHeld" in said), said
        return done


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory,
    redis_server: RedisServer,
    kafka_server: KafkaServer,
    postgres_server: PostgresServer,
    addresses: Addresses,
) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    engine = Engine(
        redis=redis_server,
        kafka=kafka_server,
        postgres=postgres_server,
        apis=(ApiServer(folder / "api-1", addresses), ApiServer(folder / "api-2", addresses)),
        consumers=(
            ConsumerServer(folder / "consumer-1", addresses),
            ConsumerServer(folder / "consumer-2", addresses),
        ),
        addresses=addresses,
        folder=folder,
    )
    yield engine
    for service in (*engine.apis, *engine.consumers):
        service.kill()


@pytest.fixture(autouse=True)
def everything_runs(engine: Engine) -> None:
    """What a test before has ended is started again."""
    servers = (engine.redis, engine.kafka, engine.postgres, *engine.consumers, *engine.apis)
    for server in servers:
        server.start()
