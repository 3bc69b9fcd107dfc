"""Real Redis, wiped for each test, and a separate ledger per test."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace

import pytest
import redis as blocking
from redis.asyncio import Redis

from dev.stack.servers import PostgresServer, RedisServer
from flashsale import ledger, redis_client, schema
from flashsale.sale import SaleSpec
from flashsale_operator.ctl.commands import run
from tests.support import redis_users
from tests.support.ctl import NOWHERE, Ctl, Within
from tests.support.redis_users import OPERATOR, TESTER, url_of
from tests.support.servers import database
from tests.support.simulated_shop import SimulatedShop


@pytest.fixture
def spec(item: str) -> SaleSpec:
    return SaleSpec(f"default/{item}", item, 10)


@pytest.fixture
def other(spec: SaleSpec) -> SaleSpec:
    """Another sale of the same item."""
    return replace(spec, sale_id=f"{spec.sale_id}-2", stock=5)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server for these tests alone, because they wipe it and wait for heartbeats in it."""
    options = redis_users.options()
    with RedisServer(tmp_path_factory.mktemp("redis"), options=options) as server:
        yield server


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator["Redis"]:
    client = redis_client.connect(url_of(redis_server, TESTER))
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def shop(redis: "Redis", pool: ledger.Pool) -> SimulatedShop:
    return SimulatedShop(redis, pool)


@pytest.fixture
def other_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The address of the empty database of another engine."""
    with database(postgres_server) as url:
        yield url


@pytest.fixture
async def other_pool(other_database_url: str) -> AsyncIterator[ledger.Pool]:
    """The migrated ledger of another engine."""
    own = await ledger.connect(other_database_url)
    await schema.migrate(own)
    yield own
    await own.close()


@pytest.fixture
async def sold(shop: SimulatedShop, spec: SaleSpec) -> SaleSpec:
    """A sale of ten with three units sold and recorded."""
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id)
    return spec


@pytest.fixture
def within(redis_server: RedisServer, database_url: str) -> Within:
    """Return a function that runs a coroutine in a shop, from a test without an event loop."""

    async def run(does: Callable[[SimulatedShop], Awaitable[None]]) -> None:
        redis = redis_client.connect(url_of(redis_server, TESTER))
        pool = await ledger.connect(database_url)
        try:
            await schema.migrate(pool)
            await does(SimulatedShop(redis, pool))
        finally:
            await pool.close()
            await redis.aclose()

    return lambda does: asyncio.run(run(does))


@pytest.fixture
def environ(redis_server: RedisServer, database_url: str) -> dict[str, str]:
    """The variables of `flashsalectl` with a wiped Redis, a ledger, and no Kafka."""
    blocking.Redis.from_url(redis_server.url).flushall()
    return {
        "FLASHSALE_REDIS_URL": url_of(redis_server, OPERATOR),
        "FLASHSALE_DATABASE_URL": database_url,
        "FLASHSALE_KAFKA_BOOTSTRAP": NOWHERE,
    }


@pytest.fixture
def ctl(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Ctl:
    def call(*arguments: str, **changes: str) -> tuple[int, list[str], list[str]]:
        code = run(arguments, environ | changes)
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return call
