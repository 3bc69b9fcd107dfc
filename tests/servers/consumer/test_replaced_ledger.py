"""The ledger is replaced while a consumer works: by a backup, or by that of another engine."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from dev.stack.packages import postgres_programs
from dev.stack.servers import PostgresServer
from flashsale import ledger as contract
from flashsale import schema
from flashsale_consumer import worker
from tests.support.consumer import Log, accepted, running
from tests.support.eventually import until
from tests.support.ledgers import Ledger, connected, migrate_to, opened


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused worker looks often whether it is still refused."""
    monkeypatch.setattr(worker, "REFUSED_SECONDS", 0.2)


async def create(server: PostgresServer, name: str) -> str:
    """Create a database, and return its URL."""
    async with connected(server.url) as admin:
        await admin.execute(f'CREATE DATABASE "{name}"')
    return f"{server.url.rpartition('/')[0]}/{name}"


async def rename(server: PostgresServer, name: str, wanted: str) -> None:
    """Put a database in the place of another one, as docs/operations.md does."""
    async with connected(server.url) as admin:
        await admin.execute(f'DROP DATABASE "{wanted}" WITH (FORCE)')
        await admin.execute(f'ALTER DATABASE "{name}" RENAME TO "{wanted}"')


async def run(program: str, *arguments: str) -> None:
    await asyncio.to_thread(
        subprocess.run, [str(postgres_programs() / program), *arguments], check=True
    )


async def test_a_backup_of_the_previous_version_is_migrated_by_a_working_consumer(
    database_url: str, log: Log, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    name, dump = database_url.rpartition("/")[2], str(tmp_path / "ledger.dump")
    before, after = ([accepted(number) for number in range(100)] for _ in range(2))
    async with opened(database_url) as former:
        await migrate_to(former.pool, 5)
        await contract.engine_id(former.pool, log.engine)
    await run("pg_dump", "-Fc", "-f", dump, database_url)
    async with running(database_url, log), opened(database_url) as ledger:
        await log.write(*before)
        await ledger.until_has(*before)
        restored = await create(postgres_server, f"{name}_restored")
        await run("pg_restore", "-d", restored, dump)
        await rename(postgres_server, f"{name}_restored", name)
        await log.write(*after)
        await ledger.until_has(*before, *after)


async def test_a_working_consumer_refuses_the_ledger_of_another_engine(
    ledger: Ledger, log: Log, postgres_server: PostgresServer
) -> None:
    name, own = ledger.url.rpartition("/")[2], await ledger.engine_id()
    sold = [accepted(number, engine=own) for number in range(100)]
    async with running(ledger.url, log) as member:
        await log.write(*sold)
        await ledger.until_has(*sold)
        await log.until_owned()
        async with opened(await create(postgres_server, f"{name}_other")) as other:
            await schema.migrate(other.pool)
            foreign = await other.engine_id()
        await rename(postgres_server, f"{name}_other", name)
        await until(lambda: "consumer group" in member.worker.conflict, "the worker is refused")
        assert own in member.worker.conflict
        assert foreign in member.worker.conflict
        async with opened(ledger.url) as replaced:
            assert await replaced.rows() == {}
