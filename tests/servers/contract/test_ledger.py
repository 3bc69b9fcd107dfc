"""The ledger's migrations, constraints and errors on a real PostgreSQL."""

import asyncio
from contextlib import suppress
from importlib.resources import files

import asyncpg
import pytest

from dev.stack.servers import PostgresServer
from flashsale import ledger, schema
from flashsale.errors import LedgerUnavailable, OtherEngine, RedisMoved, UnmetRequirement
from tests.support.eventually import until
from tests.support.ledgers import connected, migrate_to, waits

Pool = asyncpg.Pool

LATEST = len(list((files("flashsale") / "migrations").iterdir()))
_SALE = """
INSERT INTO sales (sale_id, item_id, allocated, revision, capacity)
VALUES ('default/a', 'a', 1, 1, 3)
"""
_ROWS = """
INSERT INTO reservations (sale_id, reservation_id, user_id, quantity, state, version, request_key,
                          occurred_at)
VALUES ('default/a', gen_random_uuid(), 'ann', 1, 'accepted', 1, 'key', '2026-11-27T12:00Z'),
       ('default/a', gen_random_uuid(), 'bob', 2, 'released', 2, null, '2026-11-27T12:01Z'),
       ('default/a', gen_random_uuid(), 'cid', 4, 'refused', 1, null, '2026-11-27T12:02Z');
UPDATE sales SET accepted = 3, released = 2
"""
_FORMER_WRITE = """
INSERT INTO reservations (sale_id, reservation_id, user_id, quantity, state, version, request_key,
                          occurred_at)
VALUES ('default/a', gen_random_uuid(), 'ann', 1, 'accepted', 1, null, now())
ON CONFLICT DO NOTHING
"""
_SLOW_UPDATES = """
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql
AS 'BEGIN PERFORM pg_sleep(2); RETURN NULL; END';
CREATE TRIGGER slow AFTER UPDATE ON sales FOR EACH STATEMENT EXECUTE FUNCTION wait()
"""
_FORMER_READ = """
SELECT state, version, quantity, (extract(epoch FROM occurred_at) * 1000)::bigint, user_id
FROM reservations WHERE state <> 'refused'
"""


async def test_concurrent_migrations_run_once(pool: Pool) -> None:
    versions = await asyncio.gather(*(schema.migrate(pool) for _ in range(8)))
    assert set(versions) == {LATEST}
    assert await pool.fetchval("SELECT count(*) FROM flashsale_migrations") == LATEST


async def test_processes_can_migrate_an_empty_database_at_the_same_time(
    postgres_server: PostgresServer, pool: Pool
) -> None:
    name = await pool.fetchval("SELECT current_database() || '_empty'")
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f'CREATE DATABASE "{name}"')
    url = f"{postgres_server.url.rpartition('/')[0]}/{name}"
    pools = await asyncio.gather(*(ledger.connect(url) for _ in range(5)))
    assert set(await asyncio.gather(*(schema.migrate(each) for each in pools))) == {LATEST}
    assert await ledger.sales(pools[0]) == []
    await asyncio.gather(*(each.close() for each in pools))
    await admin.execute(f'DROP DATABASE "{name}"')
    await admin.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("accepted", 11),
        ("released", 1),
        ("held", 1),
        ("held", -1),
        ("accepted", -1),
        ("allocated", -1),
        ("revision", 0),
    ],
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


@pytest.mark.parametrize(
    "option", ["statement_timeout=soon", "lock_timeout=-5", "search_path=%22", "options=-c%20x"]
)
async def test_an_option_that_the_server_refuses_is_reported_in_one_line(
    database_url: str, option: str
) -> None:
    pool = await ledger.connect(f"{database_url}?{option}")
    with pytest.raises(UnmetRequirement, match=r"^the ledger refused an option [^\n]*$"):
        await ledger.sales(pool)
    await pool.close()


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
    assert await schema.migrate(pool) == LATEST
    with pytest.raises(LedgerUnavailable, match="read-only"):
        async with ledger.translated():
            await pool.execute("DELETE FROM sales")


async def test_a_pool_leaves_a_read_only_server_that_the_address_no_longer_names(
    pool: Pool,
) -> None:
    """After a failover, the address can lead to the former primary for a while."""
    name = await pool.fetchval("SELECT current_database()")
    await pool.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    await pool.expire_connections()
    with pytest.raises(LedgerUnavailable, match="read-only"):
        await ledger.engine_id(pool, "shop")
    async with pool.acquire() as admin, admin.transaction(readonly=False):
        # A session keeps the settings it started with, as one to the former primary would.
        await admin.execute("SET TRANSACTION READ WRITE")
        await admin.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
    with suppress(LedgerUnavailable):
        await ledger.engine_id(pool, "shop")
    assert await ledger.engine_id(pool, "shop")


async def test_commits_of_an_operator_wait_for_the_standby_whatever_the_databases_default(
    pool: Pool, database_url: str
) -> None:
    """A standby without a restock would let a rebuild take its revision again."""
    name = await pool.fetchval("SELECT current_database()")
    await pool.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    operators = await ledger.connect(database_url)
    consumers = await ledger.connect(database_url, synchronous=False)
    for own, expected in ((operators, "on"), (consumers, "off")):
        assert await own.fetchval("SHOW synchronous_commit") == expected
        await own.close()


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
    await migrate_to(own, 3)
    await own.execute(_SALE)
    assert await schema.migrate(own) == LATEST
    assert await schema.migrate(own) == LATEST
    with pytest.raises(OtherEngine, match="set FLASHSALE_ENGINE=flashsale"):
        await ledger.engine_id(own, "shop")
    assert await ledger.engine_id(own, "flashsale")
    await own.close()


@pytest.mark.parametrize(("version", "name"), [(3, "flashsale"), (LATEST - 1, "brand")])
async def test_the_ledger_of_an_engine_of_another_name_is_not_migrated(
    database_url: str, version: int, name: str
) -> None:
    """Its own processes may be of that version, and a mistake must not stop them."""
    own = await ledger.connect(database_url)
    await migrate_to(own, version)
    await own.execute(_SALE)
    if version > 3:
        await own.execute("UPDATE engine SET name = $1", name)
    with pytest.raises(OtherEngine, match=f"belongs to the engine {name}, but .* is shop"):
        await schema.migrate(own, "shop")
    assert await own.fetchval("SELECT to_regclass('flashsale_migrations') IS NULL")
    assert await schema.migrate(own, name) == LATEST
    await own.close()


async def test_the_reservations_of_the_previous_version_are_migrated(database_url: str) -> None:
    own = await ledger.connect(database_url)
    await migrate_to(own, 4)
    await own.execute(_SALE)
    await own.execute(_ROWS)
    before = {row["user_id"]: row for row in await own.fetch("SELECT * FROM reservations")}
    await schema.migrate(own)
    after = {row["user_id"]: row for row in await own.fetch("SELECT * FROM reservations")}
    assert {user: (row["state"], row["version"]) for user, row in after.items()} == {
        "ann": ("confirmed", 1),
        "bob": ("cancelled", 2),
        "cid": ("refused", 1),
    }
    for user, row in after.items():
        for name in ("sale_id", "reservation_id", "quantity", "request_key", "recorded_at"):
            assert row[name] == before[user][name]
        assert row["accepted_at"] == before[user]["occurred_at"]
        assert row["confirmed_at"] == (None if user == "cid" else row["accepted_at"])
        assert [row[name] for name in ("expires_at", "order_ref", "former_state")] == [None] * 3
    [sale] = await ledger.sales(own)
    assert (sale.accepted, sale.released, sale.held, sale.hold_seconds) == (3, 2, 0, None)
    with pytest.raises(asyncpg.CheckViolationError):
        await own.execute("UPDATE reservations SET state = 'accepted'")
    await own.execute("UPDATE reservations SET version = $1", 2**53)
    await own.close()


@pytest.mark.parametrize("statement", [_FORMER_WRITE, _FORMER_READ], ids=["consumer", "operator"])
async def test_processes_of_the_previous_version_wait_for_a_migrated_ledger(
    pool: Pool, statement: str
) -> None:
    """An outage is retried. A consumer would send rejected data to the dead letters."""
    with pytest.raises(LedgerUnavailable, match="occurred_at"):
        async with ledger.translated():
            await pool.execute(statement)


@pytest.mark.parametrize("limit", ["statement_timeout", "transaction_timeout"])
async def test_a_migration_may_take_longer_than_a_command(
    database_url: str, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(ledger, "COMMAND_TIMEOUT_SECONDS", 1.0)
    own = await ledger.connect(f"{database_url}?{limit}=1000")
    await migrate_to(own, 4)
    await own.execute(_SLOW_UPDATES)
    assert await schema.migrate(own) == LATEST
    await own.close()


async def test_a_migration_waits_for_a_working_consumer_of_the_previous_version(
    database_url: str,
) -> None:
    own = await ledger.connect(database_url)
    await migrate_to(own, 4)
    await own.execute(_SALE)
    async with connected(database_url) as consumer:
        async with consumer.transaction():
            await consumer.execute("SELECT FROM kafka_offsets FOR UPDATE")
            migration = asyncio.create_task(schema.migrate(own))
            await until(lambda: waits(consumer), "the migration waits for the consumer")
            await consumer.execute("SELECT FROM sales FOR UPDATE")
            await consumer.execute(_FORMER_WRITE)
        assert await migration == LATEST
        async with consumer.transaction():
            await consumer.execute("LOCK TABLE kafka_offsets, sales, reservations")
            assert await schema.migrate(own) == LATEST
    await own.close()


async def test_a_migration_that_waited_for_another_process_sees_its_tables(
    database_url: str,
) -> None:
    """Also if each transaction of the database sees only its beginning by default."""
    async with connected(database_url) as other:
        name = await other.fetchval("SELECT current_database()")
        await other.execute(
            f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'repeatable read'"
        )
        own = await ledger.connect(database_url)
        async with other.transaction():
            await other.execute("SELECT pg_advisory_xact_lock($1)", schema._MIGRATION_LOCK)
            migrations = [asyncio.create_task(schema.migrate(own)) for _ in range(2)]
            await until(lambda: waits(other, 2), "both migrations wait")
        assert await asyncio.gather(*migrations) == [LATEST, LATEST]
    await own.close()


@pytest.mark.slow
async def test_recording_does_not_wait_for_a_migration_that_waits_for_a_backup(
    database_url: str,
) -> None:
    own = await ledger.connect(database_url)
    await migrate_to(own, 4)
    async with connected(database_url) as backup, backup.transaction():
        await backup.execute("LOCK TABLE kafka_offsets, sales, reservations IN ACCESS SHARE MODE")
        migrations = [schema.migrate(own) for _ in range(2)]
        refused = await asyncio.gather(*migrations, return_exceptions=True)
        for each in refused:
            assert isinstance(each, LedgerUnavailable)
            assert "such as a backup" in str(each)
        await own.execute(_FORMER_WRITE)
    assert await schema.migrate(own) == LATEST
    await own.close()


@pytest.mark.parametrize(
    "columns",
    ["version bigint PRIMARY KEY, dirty boolean", "version text PRIMARY KEY"],
    ids=["golang-migrate", "rails"],
)
async def test_a_migration_table_of_another_application_is_left_alone(
    database_url: str, columns: str
) -> None:
    own = await ledger.connect(database_url)
    await own.execute(
        f"CREATE TABLE schema_migrations ({columns}); "
        "INSERT INTO schema_migrations (version) VALUES ('20240101120000')"
    )
    assert await schema.migrate(own) == LATEST
    assert await ledger.sales(own) == []
    assert await own.fetchval("SELECT count(*) FROM schema_migrations") == 1
    await own.close()


@pytest.mark.parametrize("name", ["sales", "reservations", "flashsale_migrations"])
async def test_a_table_of_another_application_is_named(database_url: str, name: str) -> None:
    own = await ledger.connect(database_url)
    await own.execute(f"CREATE TABLE {name} (id text)")
    with pytest.raises(UnmetRequirement, match=f"table of another application .*{name}"):
        await schema.migrate(own)
    await own.close()


async def test_a_ledger_remembers_the_address_of_redis_until_another_is_adopted(pool: Pool) -> None:
    await ledger.engine_id(pool, "shop", "one:6379/0")
    with pytest.raises(RedisMoved, match=r"in the Redis at one:6379/0, but .* two:6379/0"):
        await ledger.engine_id(pool, "shop", "two:6379/0")
    assert await ledger.adopt_redis(pool, "two:6379/0") == "one:6379/0"
    await ledger.engine_id(pool, "shop", "two:6379/0")
    with pytest.raises(RedisMoved):
        await ledger.engine_id(pool, "shop", "one:6379/0")
