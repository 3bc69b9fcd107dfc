"""The whole engine with a FlashSale of its own, after a short crowd."""

import asyncio
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import asyncpg
import httpx
import pytest

from dev.cluster.control_plane import ControlPlane
from dev.crowd import attempts, stampede
from dev.services import Addresses, ApiServer, ConsumerServer, OperatorServer
from dev.stack.prometheus import NoPrometheusError, Programs, programs
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from tests.support.cluster import World
from tests.support.paths import CRD


@pytest.fixture(scope="session")
def prometheus_programs() -> Programs:
    """Prometheus and promtool; without them what needs them is left out, or fails in CI."""
    try:
        return programs()
    except NoPrometheusError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"left out, what needs Prometheus: {error}")


@dataclass(frozen=True, slots=True)
class Shop:
    """An API, a consumer and an operator."""

    world: World
    api: ApiServer
    consumer: ConsumerServer
    operator: OperatorServer
    item: str

    @property
    def targets(self) -> dict[str, str]:
        """Where each component serves its metrics."""
        return {
            "api": self.api.metrics_url,
            "consumer": f"{self.consumer.url}/metrics",
            "operator": f"http://127.0.0.1:{self.operator.port}/metrics",
        }

    def exposed(self) -> dict[str, str]:
        """The metrics of each component."""
        return {name: httpx.get(url).text for name, url in self.targets.items()}

    def crowd(self, users: int = 60) -> None:
        """Ten requests a user, good and bad ones."""
        wanted = attempts(self.item, users, seed=9)
        asyncio.run(stampede([self.api.url], wanted, connections=20))


@pytest.fixture(scope="module")
def shop(
    tmp_path_factory: pytest.TempPathFactory,
    control_plane: ControlPlane,
    kubernetes: object,  # noqa: ARG001 - says why this is left out where there is no Go
    kafka_server: KafkaServer,
    postgres_server: PostgresServer,
) -> Iterator[Shop]:
    control_plane.kubectl("apply", "-f", str(CRD), check=True)
    control_plane.kubectl(
        "wait", "--for=condition=Established", "crd/flashsales.flashsale.dev", check=True
    )
    mark = uuid.uuid4().hex[:8]
    namespace = f"shop-{mark}"
    control_plane.kubectl("create", "namespace", namespace, check=True)
    folder = tmp_path_factory.mktemp("shop")
    with RedisServer(folder / "redis") as redis:
        world = World(
            plane=control_plane,
            namespace=namespace,
            redis=redis,
            addresses=Addresses(redis.url, kafka_server.bootstrap, database(postgres_server)),
            folder=folder,
            kubeconfig=control_plane.kubeconfig,
        )
        try:
            shop = Shop(world, world.api(), world.consumer(), world.operator(), f"phone-{mark}")
            # The topic is the whole session's, and the ledger reads all of it: no item twice.
            world.apply("phone", shop.item, stock=40)
            world.until("phone", state="Selling", ready="Applied")
            shop.crowd()
            world.until("phone", state="SoldOut")
            yield shop
        finally:
            world.end()


def database(server: PostgresServer) -> str:
    """The address of an empty database."""
    name = f"ledger_{uuid.uuid4().hex}"

    async def create() -> None:
        connection = await asyncpg.connect(server.url)
        await connection.execute(f'CREATE DATABASE "{name}"')
        await connection.close()

    asyncio.run(create())
    return f"{server.url.rpartition('/')[0]}/{name}"
