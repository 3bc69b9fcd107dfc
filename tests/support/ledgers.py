"""Ledgers of tests, and connections to their databases."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import TypeAlias
from uuid import uuid4

import asyncpg

from dev.stack.servers import PostgresServer
from flashsale import ledger
from flashsale.errors import LedgerUnavailable
from flashsale.events import Event
from flashsale.ledger import Pool, SaleRow
from tests.support.eventually import until

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@dataclass
class Ledger:
    """A ledger, as a test reads it."""

    url: str
    pool: Pool

    async def sale(self, sale_id: str = "default/phones") -> SaleRow:
        row = await ledger.sale(self.pool, sale_id)
        assert row is not None
        return row

    async def rows(self, sale_id: str = "default/phones") -> dict[str, tuple[str, int, int]]:
        """Return state, version and quantity by reservation id."""
        async with ledger.translated():
            found = await self.pool.fetch("SELECT * FROM reservations WHERE sale_id = $1", sale_id)
        return {
            str(row["reservation_id"]): (row["state"], row["version"], row["quantity"])
            for row in found
        }

    async def has(self, *sought: Event) -> bool:
        """Whether the ledger has a row for each event. Also checks that each is counted once."""
        for sale_id in {event.sale_id for event in sought}:
            rows = await self.rows(sale_id)
            if not {event.reservation_id for event in sought if event.sale_id == sale_id} <= set(
                rows
            ):
                return False
            counted = [row for row in rows.values() if row[0] != "refused"]
            assert (await self.sale(sale_id)).accepted == sum(row[2] for row in counted)
        return True

    async def voided(self, sale_id: str = "default/phones") -> int:
        """Return the number of the sale's void changes."""
        count: int = await self.pool.fetchval(
            "SELECT voided FROM sales WHERE sale_id = $1", sale_id
        )
        return count

    async def until_has(self, *sought: Event) -> None:
        """Wait until the ledger has the events, even if PostgreSQL is down meanwhile."""
        await until(
            lambda: self.has(*sought),
            f"{len(sought)} events are recorded",
            ignoring=(LedgerUnavailable, OSError),
        )

    async def engine_id(self) -> str:
        return str(await self.pool.fetchval("SELECT id FROM engine"))

    async def until_rows(self, least: int) -> None:
        async def look() -> bool:
            return len(await self.rows()) >= least

        await until(look, f"{least} rows are recorded")


async def migrate_to(pool: Pool, version: int) -> None:
    """Run the migrations of a former version in an empty database."""
    scripts = sorted((files("flashsale") / "migrations").iterdir(), key=lambda each: each.name)
    async with pool.acquire() as connection:
        for script in scripts:
            if int(script.name[:4]) <= version:
                await connection.execute(script.read_text("utf-8"))
        await connection.execute(
            "CREATE TABLE schema_migrations (version integer PRIMARY KEY, "
            "applied_at timestamptz NOT NULL DEFAULT now())"
        )
        await connection.execute(
            "INSERT INTO schema_migrations SELECT generate_series(1, $1::int)", version
        )


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Ledger]:
    pool = await ledger.connect(url)
    try:
        yield Ledger(url, pool)
    finally:
        pool.terminate()
        # The loop closes the transports in its next iteration.
        await asyncio.sleep(0)


@asynccontextmanager
async def database(server: PostgresServer) -> AsyncIterator[str]:
    """The URL of an empty database, which is dropped afterwards."""
    name = f"test_{uuid4().hex}"
    async with connected(server.url) as connection:
        await connection.execute(f"CREATE DATABASE {name}")
    yield f"{server.url.rpartition('/')[0]}/{name}"
    async with connected(server.url) as connection:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def waits(connection: "Connection | ledger.Connection", least: int = 1) -> bool:
    """Whether other sessions wait for a lock of this connection, at least this many."""
    waiting: int = await connection.fetchval(
        "SELECT count(*) FROM pg_locks"
        " WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
    )
    return waiting >= least
