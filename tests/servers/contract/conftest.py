"""Runs these tests on each available Redis: Valkey, Redis 8, and one on the PATH."""

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from dev.stack.packages import redis_binaries
from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from tests.support import redis_users
from tests.support.redis_users import API, OPERATOR, url_of


@pytest.fixture(scope="session", params=sorted(redis_binaries()))
def redis_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    binary = redis_binaries()[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with RedisServer(folder, binary=binary, options=redis_users.options()) as server:
        yield server


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_client.connect(redis_server.url)
    yield client
    await client.aclose()


@pytest.fixture
async def inventory(redis_server: RedisServer) -> AsyncIterator[Inventory]:
    """The inventory with the rights of the operator, who calls all scripts."""
    client = redis_client.connect(url_of(redis_server, OPERATOR))
    yield Inventory(client)
    await client.aclose()


@pytest.fixture
async def outbox(redis_server: RedisServer) -> AsyncIterator[Outbox]:
    """The outbox with the rights of the API."""
    client = redis_client.connect(url_of(redis_server, API))
    yield Outbox(client)
    await client.aclose()
