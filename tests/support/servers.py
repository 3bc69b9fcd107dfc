"""Fixtures for real servers. Each server starts when the first test of a session asks for it."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import asyncpg
import pytest
from redis.asyncio import Redis

from dev.cluster.binaries import Binaries, binaries
from dev.cluster.control_plane import ControlPlane
from dev.services import Addresses
from dev.stack.servers import KafkaServer, PostgresServer, RedisCluster, RedisServer
from flashsale import ledger, redis_client, schema
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from tests.support import recorded, redis_users


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server with the engine's users, because a test may restart it."""
    options = redis_users.options()
    with RedisServer(tmp_path_factory.mktemp("redis"), options=options) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three primaries without replicas."""
    with RedisCluster(tmp_path_factory.mktemp("redis-cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """At its end, every message of the session is compared with docs/asyncapi.yaml."""
    with KafkaServer(tmp_path_factory.mktemp("kafka")) as server:
        yield server
        asyncio.run(recorded.check_all(server.bootstrap))


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("postgres"), durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def addresses(
    redis_server: RedisServer, kafka_server: KafkaServer, postgres_server: PostgresServer
) -> Addresses:
    """An engine of the session. Tests with a ledger of their own need another engine name."""
    redis_url = redis_users.url_of(redis_server, redis_users.OPERATOR)
    return Addresses(redis_url, kafka_server.bootstrap, postgres_server.url, engine="session")


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_client.connect(redis_server.url)
    yield client
    await client.aclose()


@pytest.fixture
def inventory(redis: Redis) -> Inventory:
    return Inventory(redis)


@pytest.fixture
def outbox(redis: Redis) -> Outbox:
    return Outbox(redis)


@pytest.fixture
def new_item() -> Callable[[], str]:
    """A function that makes item ids that no other test uses, so that tests can share a server."""
    return lambda: f"item-{uuid.uuid4()}"


@pytest.fixture
def item(new_item: Callable[[], str]) -> str:
    return new_item()


@contextmanager
def database(server: PostgresServer) -> Iterator[str]:
    """The address of an empty database, which is dropped afterwards."""
    name = f"ledger_{uuid.uuid4().hex}"

    async def execute(statement: str) -> None:
        connection = await asyncpg.connect(server.url)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(execute(f'CREATE DATABASE "{name}"'))
    yield f"{server.url.rpartition('/')[0]}/{name}"
    asyncio.run(execute(f'DROP DATABASE "{name}" WITH (FORCE)'))


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The address of an empty database that only this test uses."""
    with database(postgres_server) as url:
        yield url


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator["asyncpg.Pool[asyncpg.Record]"]:
    """A migrated ledger that only this test uses."""
    own = await ledger.connect(database_url)
    await schema.migrate(own)
    yield own
    await own.close()


@pytest.fixture(scope="session")
def kubernetes(request: pytest.FixtureRequest) -> Binaries:
    """The programs of a Kubernetes control plane. A missing one is built, which takes minutes."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():  # shows the progress of the build
        return binaries()


@pytest.fixture(scope="session")
def control_plane(
    kubernetes: Binaries,  # noqa: ARG001 - built before the minute that a start may take
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("kubernetes")) as plane:
        yield plane
