"""The ledger's schema and its typed reads; who writes what is in consumer and operator.

Functions take a connection or a pool and raise `LedgerUnavailable` when PostgreSQL cannot serve.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from importlib.resources import files
from typing import TYPE_CHECKING, Final, Self, TypeAlias

import asyncpg

from flashsale.errors import LedgerUnavailable

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
_MIGRATION_LOCK: Final = (
    0x666C617368  # "flash": any constant that nothing else in the database takes
)
COMMAND_TIMEOUT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class SaleRow:
    """A row of `sales`. Counts are units; `resource_uid` is the FlashSale's that declared it.

    `lost`: what Redis had accepted and rebuilds found nowhere.
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

    @classmethod
    def of(cls, record: asyncpg.Record) -> Self:
        return cls(**{name: record[name] for name in SALE_COLUMNS})

    def finished(self, now: datetime) -> bool:
        """Whether the sale accepts nothing any more, unless it is applied again."""
        return self.closed or (self.ends_at is not None and self.ends_at <= now)


SALE_COLUMNS: Final = tuple(field.name for field in fields(SaleRow))


async def connect(url: str, *, max_connections: int = 4) -> Pool:
    """A pool of connections to `url`; connections are made when they are needed."""
    async with translated():
        return await asyncpg.create_pool(
            url,
            min_size=0,
            max_size=max_connections,
            timeout=5,
            command_timeout=COMMAND_TIMEOUT_SECONDS,
            server_settings={"application_name": "flashsale"},
        )


@asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Turns what asyncpg raises when PostgreSQL cannot serve into `LedgerUnavailable`.

    Errors of the data itself pass: those that the server finds (SQLSTATE classes 22 and 23) and
    those that asyncpg finds before it sends anything (an InterfaceError that is a ValueError).
    """
    try:
        yield
    except ValueError:
        raise
    except asyncpg.PostgresError as error:
        if (error.sqlstate or "")[:2] in ("22", "23"):
            raise
        raise LedgerUnavailable(f"the ledger refused: {error}") from error
    except (
        asyncpg.InterfaceError,
        # A connection that the server ended while it was idle, used before its end was read.
        asyncpg.InternalClientError,
        OSError,
        TimeoutError,
    ) as error:
        why = str(error) or "no answer in time"
        raise LedgerUnavailable(f"the ledger is away: {why}") from error


async def migrate(pool: Pool) -> int:
    """Runs the numbered migrations that the database lacks; returns its version.

    Safe to call from every process at once: an advisory lock lets one through at a time. A
    database that lacks nothing is only read, so that one that is read-only will do.
    """
    scripts = sorted(
        (path for path in (files("flashsale") / "migrations").iterdir() if path.name[:4].isdigit()),
        key=lambda path: path.name,
    )
    async with translated(), pool.acquire() as connection, connection.transaction():
        done = await _version(connection)
        if done >= int(scripts[-1].name[:4]):
            return done
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations ("
            "version integer PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        done = await _version(connection)
        for script in scripts:
            version = int(script.name[:4])
            if version > done:
                await connection.execute(script.read_text("utf-8"))
                await connection.execute(
                    "INSERT INTO schema_migrations (version) VALUES ($1)", version
                )
        return await _version(connection)


async def _version(connection: "PoolConnectionProxy[asyncpg.Record]") -> int:
    """The highest migration that was run; 0 for an empty database."""
    if await connection.fetchval("SELECT to_regclass('schema_migrations')") is None:
        return 0
    version: int = await connection.fetchval(
        "SELECT coalesce(max(version), 0) FROM schema_migrations"
    )
    return version


async def sale(pool: Pool, sale_id: str) -> SaleRow | None:
    """One sale's row."""
    async with translated():
        record = await pool.fetchrow("SELECT * FROM sales WHERE sale_id = $1", sale_id)
    return None if record is None else SaleRow.of(record)


async def sales(pool: Pool, item_id: str | None = None) -> list[SaleRow]:
    """The rows of all sales, or of one item's, by sale id."""
    async with translated():
        records = await pool.fetch(
            "SELECT * FROM sales WHERE $1::text IS NULL OR item_id = $1 ORDER BY sale_id", item_id
        )
    return [SaleRow.of(record) for record in records]


async def stored_offsets(pool: Pool, topic: str) -> dict[int, int]:
    """Next offset by partition, for the partitions of which something is recorded."""
    async with translated():
        records = await pool.fetch(
            "SELECT partition, next_offset FROM kafka_offsets WHERE topic = $1", topic
        )
    return {record["partition"]: record["next_offset"] for record in records}
