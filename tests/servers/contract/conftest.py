"""Runs these tests on each available Redis: Valkey, Redis 8, and one on the PATH."""

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from dev.stack.packages import redis_binaries
from dev.stack.servers import RedisServer
from flashsale import redis_client


@pytest.fixture(scope="session", params=sorted(redis_binaries()))
def redis_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    binary = redis_binaries()[request.param]
    with RedisServer(tmp_path_factory.mktemp(request.param), binary=binary) as server:
        yield server


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_client.connect(redis_server.url)
    yield client
    await client.aclose()
