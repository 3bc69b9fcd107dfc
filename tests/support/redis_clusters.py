"""Clients of a Redis Cluster, for tests that also run on one server."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, cast

from redis.asyncio import Redis

from dev.stack.servers import RedisCluster, RedisServer
from flashsale import redis_client
from flashsale.nodes import Nodes

Deployment: TypeAlias = RedisServer | RedisCluster


def servers_of(deployment: Deployment) -> Sequence[RedisServer]:
    return deployment.servers if isinstance(deployment, RedisCluster) else [deployment]


@asynccontextmanager
async def routed(deployment: Deployment) -> AsyncIterator[Redis]:
    """Yield a client whose commands go to the server of their key, which is the first argument."""
    client: Any = redis_client.connect(deployment.url)
    router = redis_client.connect(deployment.url)
    nodes = Nodes.of_client(router)

    async def execute_command(*words: Any, **options: Any) -> Any:  # noqa: ANN401 - redis-py's
        return await nodes.call(
            str(words[1]), lambda redis: cast("Any", redis).execute_command(*words, **options)
        )

    if isinstance(deployment, RedisCluster):
        client.execute_command = execute_command
    try:
        yield client
    finally:
        await client.aclose()
        await router.aclose()
