"""The ledger's connections, and typed reads. The consumer and the operator contain the writes.

Every function raises `LedgerUnavailable` if PostgreSQL cannot serve the call.
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final, Literal, Self, TypeAlias, cast

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from flashsale import cancellation
from flashsale.addresses import database_url
from flashsale.errors import LedgerUnavailable, OtherEngine, RedisMoved, UnmetRequirement

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"
COMMAND_TIMEOUT_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 30.0
"""How long a transaction may wait for its process. The longest such wait is for dead letters."""
SUM_SECONDS: Final = 300.0
"""For a query over all reservations. PostgreSQL sums up ten million in 10 to 20 seconds."""
# Not an option of the connection, because PgBouncer refuses it.
_END_IDLE: Final = "SET LOCAL idle_in_transaction_session_timeout = '{:.3f}s'"
# An administrator's limit is for short statements. A rebuild that reads all reservations of a large
# sale would never end, and neither would a migration of a large ledger. Only newer servers have
# transaction_timeout.
END_LIMITS: Final = """
SELECT set_config(name, '0', true) FROM pg_settings
WHERE name IN ('statement_timeout', 'transaction_timeout')
"""
_ASYNCHRONOUS: Final = (
    "PostgreSQL has synchronous_commit off, but needs on: behind PgBouncer, run ALTER ROLE ... SET "
    "synchronous_commit = on for this user"
)
_MOVED: Final = (
    ": stop every API pod that may still use the former address, and then run "
    "`flashsalectl adopt-redis`"
)
_EMPTY: Final = (
    ", which has no keys of an engine. If both are one server, such as over a port-forward, it has "
    "lost its keys: run the command in the operator's pod"
)
_ENGINE: Final = "SELECT id::text, name, redis_address FROM engine"
_CLAIM_ENGINE: Final = """
UPDATE engine SET name = coalesce(name, $1), redis_address = coalesce(redis_address, $2)
RETURNING id::text, name, redis_address
"""


@dataclass(frozen=True, slots=True)
class SaleRow:
    """A row of `sales`. Counts are units.

    `resource_uid` is the uid of the FlashSale that declared the sale. `lost` counts units that
    Redis had accepted and that rebuilds could not find. `held` are the units of open holds.
    `rebuilt_revision` is the revision of the last rebuild, or 0.
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
    rebuilt_revision: int = 0

    @classmethod
    def of(cls, record: asyncpg.Record) -> Self:
        """Raises `LedgerUnavailable` if a newer version of the table lacks a column."""
        try:
            return cls(**{name: record[name] for name in SALE_COLUMNS})
        except KeyError as error:
            raise LedgerUnavailable(f"the ledger's table sales has no column {error}") from error

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
    as a `statement_timeout` of the address. Raises `LedgerUnavailable` for a wrong file of TLS.
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
    except OSError as error:
        # asyncpg reads the files of TLS again, and its error has no name of a file.
        try:
            database_url(arguments[0])
        except ValueError as why:
            raise LedgerUnavailable(f"the ledger is unavailable: {why}") from error
        raise
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
            await connection.execute(END_LIMITS)
        yield connection


@asynccontextmanager
async def translated(writes: "Pool | None" = None) -> AsyncIterator[None]:
    """Raises `LedgerUnavailable` in place of asyncpg's errors for an outage or a refusal.

    If a server of the pool `writes` is read-only, the pool connects again. After a failover, the
    address leads to another server, and the connections to the former one can stay open.

    Errors in the data itself pass through. The server reports them with SQLSTATE classes 22 and
    23. asyncpg reports them before it sends anything, as an InterfaceError that is a ValueError.

    A cancelled transaction rolls back first, and that fails if the server stands still.
    """
    try:
        with cancellation.kept():
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


async def stored_offsets(ledger: "Pool | Connection", topic: str) -> dict[int, int]:
    """Returns the next offset of each partition with recorded events."""
    async with translated():
        records = await ledger.fetch(
            "SELECT partition, next_offset FROM kafka_offsets WHERE topic = $1", topic
        )
    return {record["partition"]: record["next_offset"] for record in records}


async def engine_id(
    pool: Pool, name: str, redis_address: str | None = None, *, claim: bool = True
) -> str:
    """Returns the id of the ledger's engine.

    The ledger remembers the first name and the first address of Redis (host:port/db) that a
    process brings, unless `claim` is false. Then an address is that of a Redis without an engine.
    Raises `OtherEngine` if the ledger belongs to an engine of another name, and `RedisMoved` if its
    sales were seeded in another Redis.
    """
    async with translated():
        found = await pool.fetchrow(_ENGINE)
    if (
        claim
        and found is not None
        and (found["name"] is None or (redis_address and found["redis_address"] is None))
    ):
        async with transaction(pool) as connection:
            found = await connection.fetchrow(_CLAIM_ENGINE, name, redis_address)
    if found is None:
        raise LedgerUnavailable("the ledger has no row in its table engine: restore the database")
    require_name(found["name"] or name, name)
    if redis_address and found["redis_address"] not in (None, redis_address):
        raise RedisMoved(
            f"the sales are in the Redis at {found['redis_address']}, but FLASHSALE_REDIS_URL "
            f"names {redis_address}{_MOVED if claim else _EMPTY}"
        )
    return str(found["id"])


def require_name(found: str, name: str) -> None:
    """Raises `OtherEngine` if the ledger's engine has another name than this one."""
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
