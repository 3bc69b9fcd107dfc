"""Real PostgreSQL and Kafka. Each test has its own database, topics and consumer group."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from dev.stack.servers import KafkaServer, PostgresServer
from flashsale.schema import migrate
from tests.support.consumer import Log, Process
from tests.support.ledgers import Ledger, opened


@pytest.fixture
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server that a test may stop."""
    with PostgresServer(tmp_path_factory.mktemp("own-postgres"), durable=False) as server:
        yield server


@pytest.fixture
async def ledger(database_url: str) -> AsyncIterator[Ledger]:
    """An empty ledger."""
    async with opened(database_url) as ledger:
        await migrate(ledger.pool)
        yield ledger


@pytest.fixture
async def log(kafka_server: KafkaServer) -> Log:
    log = Log(kafka_server.bootstrap)
    await log.create()
    return log


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """A function that starts consumer processes. They are killed after the test."""
    processes: list[Process] = []

    def start(**environment: str) -> Process:
        processes.append(Process(tmp_path / f"consumer-{len(processes)}.log", **environment))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
