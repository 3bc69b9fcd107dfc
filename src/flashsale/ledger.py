"""The ledger's schema and typed reads. The consumer and the operator contain the writes.

Every function raises `LedgerUnavailable` if PostgreSQL cannot serve the call.
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias, cast

import asyncpg

from flashsale.errors import LedgerUnavailable, OtherEngine, RedisMoved, UnmetRequirement
from flashsale.requirements import LedgerFacts

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"
_MIGRATION_LOCK: Final = 0x666C617368
"""Key of the advisory lock that serializes migrations: "flash" in ASCII."""
COMMAND_TIMEOUT_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 30.0
"""How long a transaction may wait for its process. The longest such wait is for dead letters."""
SUM_SECONDS: Final = 300.0
"""For a query over all reservations. PostgreSQL sums up ten million in 10 to 20 seconds."""
_MIGRATION_TIMEOUT_SECONDS: Final = 3600.0
"""A migration can rewrite a table, which takes about two seconds per million rows."""
# Not an option of the connection, because PgBouncer refuses it.
_END_IDLE: Final = "SET LOCAL idle_in_transaction_session_timeout = '{:.3f}s'"
# An administrator's limit is for short statements. A rebuild that reads all reservations of a large
# sale would never end, and neither would a migration of a large ledger. Only newer servers have
# transaction_timeout.
_END_LIMITS: Final = """
SELECT set_config(name, '0', true) FROM pg_settings
WHERE name IN ('statement_timeout', 'transaction_timeout')
"""
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
# In the order of the consumer, or a working consumer and the migration deadlock.
_LOCK_TABLES: Final = "LOCK TABLE kafka_offsets, sales, reservations IN ACCESS EXCLUSIVE MODE"
_IN_USE: Final = "the migration waits for a user of the ledger's tables, such as a backup"
_EMPTY: Final = "the database has lost the ledger's tables: restore the backup"
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
_ASYNCHRONOUS: Final = (
    "PostgreSQL has synchronous_commit off, but needs on: behind PgBouncer, run ALTER ROLE ... SET "
    "synchronous_commit = on for this user"
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
_ENGINE: Final = "SELECT id::text, name, redis_address FROM engine"
_NAME: Final = "SELECT name FROM engine"
_NAMED_SINCE: Final = 4
"""The migration that adds the table engine."""
# As that migration names it.
_FORMER_NAME: Final = """
SELECT 'flashsale' WHERE EXISTS (SELECT FROM sales) OR EXISTS (SELECT FROM kafka_offsets)
"""
_CLAIM_ENGINE: Final = """
UPDATE engine SET name = coalesce(name, $1), redis_address = coalesce(redis_address, $2)
RETURNING id::text, name, redis_address
"""


@dataclass(frozen=True, slots=True)
class SaleRow:
    """A row of `sales`. Counts are units.

    `resource_uid` is the uid of the FlashSale that declared the sale. `lost` counts units that
    Redis had accepted and that rebuilds could not find. `held` are the units of open holds.
    """

    sale_id: str
    item_id: str
    display_name: str | None
    allocated: int
    max_per_user: int
    starts_at: datetime | None
    ends_at: datetime | None
    paused: bool
    closed: bool
    revision: int
    capacity: int
    accepted: int
    released: int
    resource_uid: str | None = None
    lost: int = 0
    hold_seconds: int | None = None
    max_expired_holds: int = 3
    held: int = 0
    closed_at: datetime | None = None

    @classmethod
    def of(cls, record: asyncpg.Record) -> Self:
        return cls(**{name: record[name] for name in SALE_COLUMNS})

    def finished(self, now: datetime) -> bool:
        """Whether the sale accepts nothing more unless its manifest is applied again."""
        return self.closed or (self.ends_at is not None and self.ends_at <= now)

    def ended(self, now: datetime) -> bool:
        """Whether the sale has reached its end, which is final.

        A sale that was closed before its end can be continued, also after that time.
        """
        last = self.closed_at if self.closed else now
        return self.ends_at is not None and last is not None and self.ends_at <= last


SALE_COLUMNS: Final = tuple(field.name for field in fields(SaleRow))


async def connect(url: str, *, max_connections: int = 4, synchronous: bool = True) -> Pool:
    """Returns a pool for `url`. It connects when a connection is needed.

    With `synchronous`, commits wait for PostgreSQL's standby if there is one, whatever the
    database's default. A standby without a sale's last revision could give it a second time.

    No statement is prepared under a name, because PgBouncer in transaction mode gives each
    transaction another connection to the server.
    """
    server_settings = {"application_name": "flashsale"}
    if synchronous:
        server_settings["synchronous_commit"] = "on"
    async with translated():
        return await asyncpg.create_pool(
            url,
            min_size=0,
            max_size=max_connections,
            timeout=5,
            command_timeout=COMMAND_TIMEOUT_SECONDS,
            statement_cache_size=0,
            server_settings=server_settings,
            connect=cast("Any", _connection),
        )


async def _connection(
    *arguments: Any,  # noqa: ANN401 - asyncpg's own
    server_settings: dict[str, str],
    **options: Any,  # noqa: ANN401 - asyncpg's own
) -> "asyncpg.Connection[asyncpg.Record]":
    """Connects. PgBouncer refuses the setting synchronous_commit, so there it must be the default.

    Raises `UnmetRequirement` if it is not, and if the server refuses the value of an option, such
    as a `statement_timeout` of the address.
    """
    connection: asyncpg.Connection[asyncpg.Record]
    rest = {name: value for name, value in server_settings.items() if name != "synchronous_commit"}
    try:
        try:
            return await asyncpg.connect(*arguments, server_settings=server_settings, **options)
        except asyncpg.ProtocolViolationError as error:
            if "synchronous_commit" not in str(error):
                raise
        connection = await asyncpg.connect(*arguments, server_settings=rest, **options)
    except (asyncpg.DataError, asyncpg.PostgresSyntaxError) as error:
        why = " ".join(str(error).split())
        raise UnmetRequirement(
            f"the ledger refused an option of its address, so change it: {why}"
        ) from error
    if await connection.fetchval("SHOW synchronous_commit") in ("off", "local"):
        await connection.close()
        raise UnmetRequirement(_ASYNCHRONOUS)
    return connection


@asynccontextmanager
async def transaction(pool: Pool, *, snapshot: bool = False) -> AsyncIterator[Connection]:
    """Opens a transaction. With `snapshot` it only reads, always the same state and without limit.

    Otherwise each statement sees the commits before it, whatever the database's default. A
    statement after the wait for a lock must see the changes of the lock's last holder. Also a
    single write needs this, or PostgreSQL can refuse it after such a wait.

    PostgreSQL ends it if its process stands still or is cut off for `IDLE_SECONDS`. Otherwise its
    locks would stop all other processes, for hours if the process' machine is gone.
    """
    isolation: Literal["repeatable_read", "read_committed"] = (
        "repeatable_read" if snapshot else "read_committed"
    )
    async with (
        translated(pool),
        pool.acquire() as connection,
        connection.transaction(isolation=isolation, readonly=snapshot),
    ):
        await connection.execute(_END_IDLE.format(IDLE_SECONDS))
        if snapshot:
            await connection.execute(_END_LIMITS)
        yield connection


@asynccontextmanager
async def translated(writes: "Pool | None" = None) -> AsyncIterator[None]:
    """Raises `LedgerUnavailable` in place of asyncpg's errors for an outage or a refusal.

    If a server of the pool `writes` is read-only, the pool connects again. After a failover, the
    address leads to another server, and the connections to the former one can stay open.

    Errors in the data itself pass through. The server reports them with SQLSTATE classes 22 and
    23. asyncpg reports them before it sends anything, as an InterfaceError that is a ValueError.
    """
    try:
        yield
    except ssl.SSLError as error:  # some are also a ValueError
        raise LedgerUnavailable(f"the ledger is unavailable: {error}") from error
    except ValueError:
        raise
    except asyncpg.PostgresError as error:
        if (error.sqlstate or "")[:2] in ("22", "23"):
            raise
        if writes is not None and isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            await writes.expire_connections()
        raise LedgerUnavailable(f"the ledger refused the call: {error}") from error
    except (
        asyncpg.InterfaceError,
        # The server closed an idle connection, and asyncpg used it before it read the close.
        asyncpg.InternalClientError,
        OSError,
        TimeoutError,
    ) as error:
        reason = str(error) or "no reply in time"
        raise LedgerUnavailable(f"the ledger is unavailable: {reason}") from error


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
            _require_name(await connection.fetchval(query) or engine, engine)
        await connection.execute(_CREATE_MIGRATIONS)
        await connection.execute(_ADOPT_MIGRATIONS, done)
        await connection.execute(_LIMIT_LOCKS)
        await connection.execute(_END_LIMITS)
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


async def sale(ledger: "Pool | Connection", sale_id: str) -> SaleRow | None:
    """Returns a sale's row, or None."""
    async with translated():
        record = await ledger.fetchrow("SELECT * FROM sales WHERE sale_id = $1", sale_id)
    return None if record is None else SaleRow.of(record)


async def sales(pool: Pool, item_id: str | None = None) -> list[SaleRow]:
    """Returns the rows of all sales, or of one item's sales, ordered by sale id."""
    async with translated():
        records = await pool.fetch(
            "SELECT * FROM sales WHERE $1::text IS NULL OR item_id = $1 ORDER BY sale_id", item_id
        )
    return [SaleRow.of(record) for record in records]


async def stored_offsets(pool: Pool, topic: str) -> dict[int, int]:
    """Returns the next offset of each partition with recorded events."""
    async with translated():
        records = await pool.fetch(
            "SELECT partition, next_offset FROM kafka_offsets WHERE topic = $1", topic
        )
    return {record["partition"]: record["next_offset"] for record in records}


async def engine_id(pool: Pool, name: str, redis_address: str | None = None) -> str:
    """Returns the id of the ledger's engine.

    The ledger remembers the first name and the first address of Redis (host:port/db) that a
    process brings. Raises `OtherEngine` if the ledger belongs to an engine of another name, and
    `RedisMoved` if its sales were seeded in another Redis.
    """
    async with translated():
        found = await pool.fetchrow(_ENGINE)
    if found is not None and (
        found["name"] is None or (redis_address and found["redis_address"] is None)
    ):
        async with transaction(pool) as connection:
            found = await connection.fetchrow(_CLAIM_ENGINE, name, redis_address)
    if found is None:
        raise LedgerUnavailable("the ledger has no row in its table engine: restore the database")
    _require_name(found["name"], name)
    if redis_address and found["redis_address"] != redis_address:
        raise RedisMoved(
            f"the sales are in the Redis at {found['redis_address']}, but FLASHSALE_REDIS_URL "
            f"names {redis_address}: stop every API pod that may still use the former address, and "
            "then run `flashsalectl adopt-redis`"
        )
    return str(found["id"])


def _require_name(found: str, name: str) -> None:
    if found != name:
        raise OtherEngine(
            f"the ledger belongs to the engine {found}, but FLASHSALE_ENGINE is {name}: "
            f"set FLASHSALE_ENGINE={found}, or give this engine a database of its own"
        )


async def adopt_redis(pool: Pool, address: str) -> str | None:
    """Remembers another address of Redis, and returns the former one.

    Call it only when no API pod uses the former address any more.
    """
    async with transaction(pool) as connection:
        former: str | None = await connection.fetchval(
            "SELECT redis_address FROM engine FOR UPDATE"
        )
        await connection.execute("UPDATE engine SET redis_address = $1", address)
    return former
