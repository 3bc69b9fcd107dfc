"""The ledger's migrations, constraints and errors on a real PostgreSQL."""

import asyncio
from importlib.resources import files

import asyncpg
import pytest

from dev.stack.servers import PostgresServer
from flashsale import ledger
from flashsale.errors import LedgerUnavailable, OtherEngine, RedisMoved

Pool = asyncpg.Pool

LATEST = len(list((files("flashsale") / "migrations").iterdir()))


async def test_concurrent_migrations_run_once(pool: Pool) -> None:
    versions = await asyncio.gather(*(ledger.migrate(pool) for _ in range(8)))
    assert set(versions) == {LATEST}
    assert await pool.fetchval("SELECT count(*) FROM schema_migrations") == LATEST


async def test_processes_can_migrate_an_empty_database_at_the_same_time(
    postgres_server: PostgresServer, pool: Pool
) -> None:
    name = await pool.fetchval("SELECT current_database() || '_empty'")
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f'CREATE DATABASE "{name}"')
    url = f"{postgres_server.url.rpartition('/')[0]}/{name}"
    pools = await asyncio.gather(*(ledger.connect(url) for _ in range(5)))
    assert set(await asyncio.gather(*(ledger.migrate(each) for each in pools))) == {LATEST}
    assert await ledger.sales(pools[0]) == []
    await asyncio.gather(*(each.close() for each in pools))
    await admin.execute(f'DROP DATABASE "{name}"')
    await admin.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [("accepted", 11), ("released", 1), ("accepted", -1), ("allocated", -1), ("revision", 0)],
)
async def test_constraints_refuse_impossible_counts(pool: Pool, column: str, value: int) -> None:
    await pool.execute(
        "INSERT INTO sales (sale_id, item_id, allocated, revision, capacity) "
        "VALUES ('default/a', 'a', 10, 1, 10)"
    )
    with pytest.raises(asyncpg.CheckViolationError):
        await pool.execute(f"UPDATE sales SET {column} = $1", value)


async def test_an_unreachable_server_is_reported_without_the_password(pool: Pool) -> None:
    del pool
    unreachable = await ledger.connect("postgresql://u:secret@127.0.0.1:1/db")
    with pytest.raises(LedgerUnavailable, match="the ledger is unavailable") as refused:
        await ledger.sales(unreachable)
    assert "secret" not in str(refused.value)
    await unreachable.close()


async def test_a_ledger_that_is_not_migrated_is_unavailable(
    postgres_server: PostgresServer,
) -> None:
    maintenance = f"{postgres_server.url.rpartition('/')[0]}/postgres"
    empty = await ledger.connect(maintenance)
    with pytest.raises(LedgerUnavailable, match="sales"):
        await ledger.sales(empty)
    await empty.close()


async def test_a_read_only_ledger_that_is_up_to_date_counts_as_migrated(pool: Pool) -> None:
    name = await pool.fetchval("SELECT current_database()")
    await pool.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    await pool.expire_connections()
    assert await ledger.migrate(pool) == LATEST
    with pytest.raises(LedgerUnavailable, match="read-only"):
        async with ledger.translated():
            await pool.execute("DELETE FROM sales")


async def test_bad_data_is_not_reported_as_an_outage(pool: Pool) -> None:
    for value in ("nul\x00", 5):
        with pytest.raises((asyncpg.DataError, ValueError)):
            async with ledger.translated():
                await pool.fetch("SELECT * FROM sales WHERE sale_id = $1", value)


async def test_a_ledger_keeps_its_engines_name_and_id(pool: Pool) -> None:
    own = await ledger.engine_id(pool, "shop")
    assert await ledger.engine_id(pool, "shop") == own
    with pytest.raises(OtherEngine, match=r"belongs to the engine shop, but .* is brand"):
        await ledger.engine_id(pool, "brand")


async def test_a_ledger_of_the_previous_version_has_the_default_name(database_url: str) -> None:
    own = await ledger.connect(database_url)
    for script in sorted((files("flashsale") / "migrations").iterdir(), key=lambda each: each.name):
        if script.name < "0004":
            await own.execute(script.read_text("utf-8"))
    await own.execute(
        "CREATE TABLE schema_migrations (version integer PRIMARY KEY, "
        "applied_at timestamptz NOT NULL DEFAULT now()); "
        "INSERT INTO schema_migrations SELECT generate_series(1, 3); "
        "INSERT INTO sales (sale_id, item_id, allocated, revision, capacity) "
        "VALUES ('default/a', 'a', 1, 1, 1)"
    )
    await ledger.migrate(own)
    with pytest.raises(OtherEngine, match="set FLASHSALE_ENGINE=flashsale"):
        await ledger.engine_id(own, "shop")
    assert await ledger.engine_id(own, "flashsale")
    await own.close()


async def test_a_ledger_remembers_the_address_of_redis_until_another_is_adopted(pool: Pool) -> None:
    await ledger.engine_id(pool, "shop", "one:6379/0")
    with pytest.raises(RedisMoved, match=r"in the Redis at one:6379/0, but .* two:6379/0"):
        await ledger.engine_id(pool, "shop", "two:6379/0")
    assert await ledger.adopt_redis(pool, "two:6379/0") == "one:6379/0"
    await ledger.engine_id(pool, "shop", "two:6379/0")
    with pytest.raises(RedisMoved):
        await ledger.engine_id(pool, "shop", "one:6379/0")
