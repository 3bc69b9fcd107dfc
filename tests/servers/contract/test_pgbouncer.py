"""The ledger behind PgBouncer in transaction mode. Needs PostgreSQL and Debian's PgBouncer."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from dev.stack.errors import StackError
from dev.stack.servers import PostgresServer
from flashsale import ledger, schema
from flashsale.errors import UnmetRequirement
from tests.support.pgbouncer import PgBouncer, program

pytestmark = pytest.mark.slow  # the first run downloads Debian's packages


@pytest.fixture
def pooler(tmp_path: Path, postgres_server: PostgresServer) -> Iterator[PgBouncer]:
    try:
        program()
    except StackError as error:
        pytest.skip(str(error))
    with PgBouncer(tmp_path / "pgbouncer", postgres_server.url) as server:
        yield server


@pytest.fixture
def pooled(pooler: PgBouncer, database_url: str) -> str:
    return pooler.url(database_url.rpartition("/")[2])


async def test_two_processes_share_a_ledger_behind_a_pooler(pooled: str) -> None:
    pools = [await ledger.connect(pooled, max_connections=8) for _ in range(2)]
    for pool in pools:
        await schema.migrate(pool)
    own = await ledger.engine_id(pools[0], "shop", "redis:6379/0")

    async def work(pool: ledger.Pool) -> None:
        for _ in range(20):
            assert await ledger.engine_id(pool, "shop", "redis:6379/0") == own
            assert await ledger.sales(pool) == []
            assert await ledger.stored_offsets(pool, "topic") == {}
            async with pool.acquire() as connection, connection.transaction():
                assert [r[0] async for r in connection.cursor("SELECT generate_series(1, 9)")] == [
                    *range(1, 10)
                ]

    await asyncio.gather(*(work(pool) for pool in pools for _ in range(8)))
    await asyncio.gather(*(pool.close() for pool in pools))


async def test_an_asynchronous_commit_behind_a_pooler_is_refused(
    pooled: str, database_url: str
) -> None:
    admin = await asyncpg.connect(database_url)
    name = database_url.rpartition("/")[2]
    await admin.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    await admin.close()
    pool = await ledger.connect(pooled)
    with pytest.raises(UnmetRequirement, match="synchronous_commit off, but needs on"):
        await schema.migrate(pool)
    await pool.close()
    consumer = await ledger.connect(pooled, synchronous=False)
    await schema.migrate(consumer)
    await consumer.close()
