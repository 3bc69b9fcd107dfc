"""A running engine with one FlashSale, after a short crowd. Needs Go and Prometheus."""

import os
import uuid
from collections.abc import Iterator

import pytest

from dev.cluster.control_plane import ControlPlane
from dev.services import Addresses
from dev.stack.prometheus import NoPrometheusError, Programs, programs
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from tests.support import redis_users
from tests.support.cluster import World
from tests.support.observability import ObservedEngine
from tests.support.orders import TOKENS
from tests.support.paths import CRD
from tests.support.servers import database


@pytest.fixture(scope="session")
def prometheus_programs() -> Programs:
    """Prometheus and promtool. Tests that need them are skipped without them, and fail in CI."""
    try:
        return programs()
    except NoPrometheusError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"needs Prometheus: {error}")


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory,
    control_plane: ControlPlane,
    kafka_server: KafkaServer,
    postgres_server: PostgresServer,
) -> Iterator[ObservedEngine]:
    control_plane.kubectl("apply", "-f", str(CRD), check=True)
    control_plane.kubectl(
        "wait", "--for=condition=Established", "crd/flashsales.flashsale.dev", check=True
    )
    mark = uuid.uuid4().hex[:8]
    namespace = f"shop-{mark}"
    control_plane.kubectl("create", "namespace", namespace, check=True)
    folder = tmp_path_factory.mktemp("engine")
    options = redis_users.options()
    with (
        RedisServer(folder / "redis", options=options) as redis,
        database(postgres_server) as database_url,
    ):
        redis_url = redis_users.url_of(redis, redis_users.OPERATOR)
        world = World(
            plane=control_plane,
            namespace=namespace,
            redis=redis,
            addresses=Addresses(redis_url, kafka_server.bootstrap, database_url, namespace),
            folder=folder,
            kubeconfig=control_plane.kubeconfig,
        )
        try:
            # All modules share the topic, and the ledger reads all of it. So the item is unique.
            item = f"phone-{mark}"
            api = world.api(order_tokens=",".join(TOKENS))
            engine = ObservedEngine(world, api, world.consumer(), world.operator(), item)
            world.apply("phone", item, stock=40)
            world.until("phone", state="Selling", ready="Applied")
            engine.order("user-of-an-order")
            engine.crowd()
            world.until("phone", state="SoldOut")
            yield engine
        finally:
            world.end()
