"""Real PostgreSQL and Kafka; for each test a database, topics and a consumer group of its own."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from dev.stack.servers import KafkaServer, PostgresServer
from flashsale import events, ledger
from flashsale_consumer.worker import GROUP_ID
from tests.support.consumer import Book, Log, Process, database, opened


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("postgres"), durable=False) as server:
        yield server


@pytest.fixture
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server that a test may stop."""
    with PostgresServer(tmp_path_factory.mktemp("own-postgres"), durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    with KafkaServer(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@pytest.fixture
async def database_url(postgres: PostgresServer) -> AsyncIterator[str]:
    async with database(postgres) as url:
        yield url


@pytest.fixture
async def book(database_url: str) -> AsyncIterator[Book]:
    """An empty ledger."""
    async with opened(database_url) as book:
        await ledger.migrate(book.pool)
        yield book


@pytest.fixture
async def log(kafka: KafkaServer) -> Log:
    log = Log(kafka.bootstrap)
    await log.create()
    return log


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts consumer processes, which are killed afterwards."""
    processes: list[Process] = []

    def start(**environment: str) -> Process:
        processes.append(Process(tmp_path / f"consumer-{len(processes)}.log", **environment))
        return processes[-1]

    yield start
    for process in processes:
        process._process.kill()
        process._process.wait()


@pytest.fixture
async def default_log(kafka: KafkaServer) -> Log:
    """The topics and the group that a process uses, the topics as new."""
    log = Log(kafka.bootstrap, events.TOPIC, events.DEAD_LETTER_TOPIC, GROUP_ID)
    await log.create()
    await log.delete(log.topic)
    await log.delete(log.dead_letter_topic)
    await log.create()
    return log
