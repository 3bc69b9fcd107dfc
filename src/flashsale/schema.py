"""The ledger's schema: its numbered migrations, and the requirements of its database.

Functions raise `LedgerUnavailable` if PostgreSQL cannot serve the call.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

import asyncpg

from flashsale.errors import LedgerUnavailable, UnmetRequirement
from flashsale.ledger import END_LIMITS, Connection, Pool, require_name, transaction, translated
from flashsale.requirements import LedgerFacts

_MIGRATION_LOCK: Final = 0x666C617368
"""Key of the advisory lock that serializes migrations: "flash" in ASCII."""
_MIGRATION_TIMEOUT_SECONDS: Final = 3600.0
"""A migration can rewrite a table, which takes about two seconds per million rows."""
_CREATE_MIGRATIONS: Final = """
CREATE TABLE IF NOT EXISTS flashsale_migrations (
    version integer PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now()
)
"""
# A ledger of an earlier version has its numbers in schema_migrations.
_ADOPT_MIGRATIONS: Final = """
INSERT INTO flashsale_migrations SELECT generate_series(1, $1) ON CONFLICT DO NOTHING
"""
# A request for a table's lock blocks all later users of the table, so a migration soon gives up.
# The waits for the three tables together are shorter than COMMAND_TIMEOUT_SECONDS.
_LIMIT_LOCKS: Final = "SET LOCAL lock_timeout = '3s'"
# In the order of transactions that write to several tables (the consumer's recorder and the note of
# a rebuild), or they and the migration deadlock.
_LOCK_TABLES: Final = "LOCK TABLE kafka_offsets, sales, reservations IN ACCESS EXCLUSIVE MODE"
_IN_USE: Final = "the migration waits for a user of the ledger's tables, such as a backup"
_EMPTY: Final = "the database has lost the ledger's tables: restore the backup"
_EARLIER: Final = (
    "the ledger is of an earlier version: start a consumer of this version, or use the "
    "flashsalectl of that version"
)
_ADD_MIGRATION: Final = "INSERT INTO flashsale_migrations VALUES ($1)"
_VERSION: Final = "SELECT coalesce(max(version), 0) FROM flashsale_migrations"
_FORMER_VERSION: Final = "SELECT coalesce(max(version), 0) FROM schema_migrations"
_COLUMNS: Final = """
SELECT string_agg(attname || ' ' || format_type(atttypid, NULL), ', ' ORDER BY attnum)
FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped
"""
_HAS_LEDGER: Final = "SELECT to_regclass('kafka_offsets') IS NOT NULL"
_OWN_COLUMNS: Final = "version integer, applied_at timestamp with time zone"
_FOREIGN: Final = (
    "the database has a table of another application ({}): give the ledger a database of its own, "
    "or a schema of its own that is first in the user's search_path"
)
_DATABASE: Final = """
SELECT current_setting('server_version_num')::int AS version,
       pg_encoding_to_char(encoding) AS encoding,
       current_schema() AS schema,
       coalesce(has_schema_privilege(current_schema(), 'CREATE'), false) AS may_create
FROM pg_database WHERE datname = current_database()
"""
_LACKING: Final = """
SELECT privilege || ' on ' || name AS lacking
FROM unnest($1::text[]) AS name, unnest($2::text[]) AS privilege
WHERE to_regclass(name) IS NOT NULL AND NOT has_table_privilege(to_regclass(name), privilege)
ORDER BY 1
"""
_RIGHTS: Final = (
    (["engine", "kafka_offsets", "reservations", "sales"], ["SELECT", "INSERT", "UPDATE"]),
    (["kafka_offsets"], ["DELETE"]),
)
_NAME: Final = "SELECT name FROM engine"
_NAMED_SINCE: Final = 4
"""The migration that adds the table engine."""
# As that migration names it.
_FORMER_NAME: Final = """
SELECT 'flashsale' WHERE EXISTS (SELECT FROM sales) OR EXISTS (SELECT FROM kafka_offsets)
"""


async def facts(pool: Pool) -> LedgerFacts:
    """Returns the database's version, encoding and rights, to compare with `requirements.LEDGER`.

    Raises `UnmetRequirement` if a table of another application has a name of the engine's.
    """
    async with translated(), pool.acquire() as connection:
        database = await connection.fetchrow(_DATABASE)
        lacking = [
            record["lacking"]
            for names, rights in _RIGHTS
            for record in await connection.fetch(_LACKING, names, rights)
        ]
        outdated = await _version(connection) < _scripts()[-1][0]
    return LedgerFacts(**dict(database or {}), outdated=outdated, lacking=lacking)


async def migrate(pool: Pool, engine: str | None = None, *, known: bool = False) -> int:
    """Runs the numbered migrations that the database lacks, and returns its version.

    Every process can call this at the same time, because an advisory lock serializes the calls. An
    up-to-date database is only read, so it may be read-only. Raises `UnmetRequirement` if another
    application has a table with a name of the engine's.

    Raises `OtherEngine` instead of a migration if the ledger belongs to an engine of another name
    than `engine`. Its own processes may be of an earlier version, and could not use it any more.

    A process to which the ledger is `known` makes no new one in an empty database, because a person
    may be about to restore a backup there.
    """
    scripts = _scripts()
    async with transaction(pool) as connection:
        done = await _version(connection)
        if done >= scripts[-1][0]:
            return done
        if known and not done:
            raise LedgerUnavailable(_EMPTY)
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
        done = await _version(connection)
        if engine is not None and 0 < done < scripts[-1][0]:
            query = _NAME if done >= _NAMED_SINCE else _FORMER_NAME
            require_name(await connection.fetchval(query) or engine, engine)
        await connection.execute(_CREATE_MIGRATIONS)
        await connection.execute(_ADOPT_MIGRATIONS, done)
        await connection.execute(_LIMIT_LOCKS)
        await connection.execute(END_LIMITS)
        if 0 < done < scripts[-1][0]:
            try:
                await connection.execute(_LOCK_TABLES)
            except asyncpg.LockNotAvailableError as error:
                raise LedgerUnavailable(_IN_USE) from error
        for version, script in scripts:
            if version > done:
                try:
                    source = script.read_text("utf-8")
                    await connection.execute(source, timeout=_MIGRATION_TIMEOUT_SECONDS)
                except asyncpg.DuplicateTableError as error:
                    raise UnmetRequirement(_FOREIGN.format(error)) from error
                await connection.execute(_ADD_MIGRATION, version)
        return await _version(connection)


async def require_migrated(pool: Pool) -> None:
    """Raises `LedgerUnavailable` if the ledger is of an earlier version. An empty database passes.

    Raises `UnmetRequirement` if another application has the table of the migrations.
    """
    async with translated(), pool.acquire() as connection:
        if 0 < await _version(connection) < _scripts()[-1][0]:
            raise LedgerUnavailable(_EARLIER)


def _scripts() -> list[tuple[int, Traversable]]:
    paths = (files("flashsale") / "migrations").iterdir()
    return sorted((int(path.name[:4]), path) for path in paths if path.name[:4].isdigit())


async def _version(connection: Connection) -> int:
    """Returns the number of the last migration, or 0 for an empty database.

    Other applications also have a table schema_migrations, with other columns.
    """
    columns = await connection.fetchval(_COLUMNS, "flashsale_migrations")
    if columns not in (None, _OWN_COLUMNS):
        raise UnmetRequirement(_FOREIGN.format("flashsale_migrations"))
    query = _VERSION
    if columns is None:
        former = await connection.fetchval(_COLUMNS, "schema_migrations")
        if former != _OWN_COLUMNS or not await connection.fetchval(_HAS_LEDGER):
            return 0
        query = _FORMER_VERSION
    version: int = await connection.fetchval(query)
    return version
