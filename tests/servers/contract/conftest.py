"""Runs these tests on each available Redis: Valkey, Redis 8, and one on the PATH.

Tests without `redis_server` also run on a cluster of each.
"""

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from dev.stack.packages import redis_binaries
from dev.stack.servers import RedisCluster, RedisServer
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from tests.support import redis_users
from tests.support.redis_clusters import Deployment, routed, servers_of
from tests.support.redis_users import API, OPERATOR, url_of

CLUSTER = "-cluster"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "deployment" in metafunc.fixturenames:
        binaries = sorted(redis_binaries())
        kinds: list[object] = [*binaries]
        if "redis_server" not in metafunc.fixturenames:
            # The quick tests have one cluster.
            first, *others = (f"{name}{CLUSTER}" for name in reversed(binaries))
            kinds += [first, *(pytest.param(each, marks=pytest.mark.slow) for each in others)]
        metafunc.parametrize("deployment", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp(request.param)
    binary = redis_binaries()[request.param.removesuffix(CLUSTER)]
    clustered = request.param.endswith(CLUSTER)
    kind = RedisCluster if clustered else RedisServer
    with kind(folder, binary=binary, options=redis_users.options(clustered=clustered)) as started:
        yield started


@pytest.fixture(scope="session")
def redis_server(deployment: Deployment) -> RedisServer:
    assert isinstance(deployment, RedisServer)
    return deployment


@pytest.fixture
async def redis(deployment: Deployment) -> AsyncIterator[Redis]:
    async with routed(deployment) as client:
        yield client


@pytest.fixture
async def inventory(deployment: Deployment) -> AsyncIterator[Inventory]:
    """The inventory with the rights of the operator, who calls all scripts."""
    client = redis_client.connect(url_of(servers_of(deployment)[0], OPERATOR))
    yield Inventory(client)
    await client.aclose()


@pytest.fixture
async def outbox(deployment: Deployment) -> AsyncIterator[Outbox]:
    """The outbox with the rights of the API."""
    client = redis_client.connect(url_of(servers_of(deployment)[0], API))
    yield Outbox(client)
    await client.aclose()
