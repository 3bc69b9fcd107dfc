"""Real servers for the whole session, each started when the first test asks for it."""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis

from dev.cluster.binaries import Binaries, NoGoError, binaries, require_go
from dev.cluster.control_plane import ControlPlane
from dev.services import Addresses
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from flashsale import inventory, ledger
from flashsale.inventory import Inventory


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    with KafkaServer(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("postgres"), durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def addresses(
    redis_server: RedisServer, kafka_server: KafkaServer, postgres_server: PostgresServer
) -> Addresses:
    return Addresses(redis_server.url, kafka_server.bootstrap, postgres_server.url)


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = inventory.connect(redis_server.url)
    yield client
    await client.aclose()


@pytest.fixture
def stock(redis: Redis) -> Inventory:
    return Inventory(redis)


@pytest.fixture
def new_item() -> Callable[[], str]:
    """Names items that no other test has, so that tests may share a server."""
    return lambda: f"item-{uuid.uuid4()}"


@pytest.fixture
def item(new_item: Callable[[], str]) -> str:
    return new_item()


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty database of the test's own."""
    name = f"ledger_{uuid.uuid4().hex}"

    async def execute(statement: str) -> None:
        connection = await asyncpg.connect(postgres_server.url)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(execute(f'CREATE DATABASE "{name}"'))
    yield f"{postgres_server.url.rpartition('/')[0]}/{name}"
    asyncio.run(execute(f'DROP DATABASE "{name}" WITH (FORCE)'))


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator["asyncpg.Pool[asyncpg.Record]"]:
    """A migrated ledger of the test's own."""
    own = await ledger.connect(database_url)
    await ledger.migrate(own)
    yield own
    await own.close()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves `e2e` to who names it, as `make e2e` does: it takes minutes, root and Debian."""
    named = any("e2e" in argument for argument in config.invocation_params.args)
    return True if collection_path.name == "e2e" and not named else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without Go, leaves out what needs it; fails it in CI.

    Said here and not in the fixture, it is one line in pytest's summary and not one a test.
    """
    if "kubernetes" not in getattr(item, "fixturenames", ()):
        return
    try:
        require_go()
    except NoGoError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(f"left out, what needs a real Kubernetes API: {error}")


@pytest.fixture(scope="session")
def kubernetes(request: pytest.FixtureRequest) -> Binaries:
    """The programs, built first if need be."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():  # it takes minutes: its progress is to be seen
        return binaries()


@pytest.fixture(scope="session")
def control_plane(
    kubernetes: Binaries,  # noqa: ARG001 - built before the minute that a start may take
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("kubernetes")) as plane:
        yield plane
