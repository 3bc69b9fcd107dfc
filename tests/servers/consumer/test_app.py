"""The consumer process: settings, HTTP, signals and exit codes."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from flashsale import schema
from flashsale.monitoring import serving
from flashsale.sockets import bound
from flashsale_consumer.app import handlers
from flashsale_consumer.metrics import Metrics
from flashsale_consumer.settings import Settings
from flashsale_consumer.worker import Worker
from tests.support.consumer import Process, run
from tests.support.ledgers import opened

KAFKA = {"FLASHSALE_KAFKA_BOOTSTRAP": "127.0.0.1:1"}
DATABASE = {"FLASHSALE_DATABASE_URL": "postgresql://user:secret@127.0.0.1:1/flashsale"}


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        (DATABASE, "FLASHSALE_KAFKA_BOOTSTRAP"),
        (KAFKA, "FLASHSALE_DATABASE_URL"),
        (KAFKA | {"FLASHSALE_DATABASE_URL": "mysql://user:secret@db/x"}, "FLASHSALE_DATABASE_URL"),
        (DATABASE | {"FLASHSALE_KAFKA_BOOTSTRAP": "kafka"}, "FLASHSALE_KAFKA_BOOTSTRAP"),
        (KAFKA | DATABASE | {"FLASHSALE_LISTEN": "8081"}, "FLASHSALE_LISTEN"),
    ],
)
def test_a_wrong_setting_ends_the_process_with_one_line(
    environment: dict[str, str], variable: str
) -> None:
    code, output = run(**environment)
    assert code == 2
    (line,) = output.splitlines()
    assert line.startswith(variable)
    assert "secret" not in line


def test_help_lists_all_variables() -> None:
    code, output = run("--help")
    assert code == 0
    for variable in Settings.__struct_fields__:
        assert f"FLASHSALE_{variable.upper()}" in output


def test_an_unknown_argument_is_refused() -> None:
    code, output = run("--sideways", **KAFKA, **DATABASE)
    assert code == 2
    assert "--sideways" in output


@asynccontextmanager
async def served(worker: Worker) -> AsyncIterator[httpx.AsyncClient]:
    (listener,) = bound("LISTEN", "127.0.0.1:0")
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with serving([listener], handlers(worker)), httpx.AsyncClient(base_url=url) as client:
        yield client


@pytest.fixture
def worker() -> Worker:
    return Worker(
        Settings(
            kafka_bootstrap=KAFKA["FLASHSALE_KAFKA_BOOTSTRAP"],
            database_url=DATABASE["FLASHSALE_DATABASE_URL"],
        ),
        Metrics(),
    )


async def test_the_process_is_alive_before_it_is_ready(worker: Worker) -> None:
    async with served(worker) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
        worker.joined = True
        assert (await client.get("/readyz")).status_code == 200


async def test_metrics_are_prometheus_text(worker: Worker) -> None:
    async with served(worker) as client:
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    for result in ("recorded", "duplicate", "refused", "dead_lettered"):
        assert f'flashsale_consumer_events_total{{result="{result}"}} 0.0' in answer.text
    assert 'flashsale_consumer_end_to_end_seconds_bucket{le="+Inf"} 0.0' in answer.text
    assert 'flashsale_consumer_server_up{server="ledger"} 0.0' in answer.text


def test_ages_of_a_batch_are_counted_in_their_buckets() -> None:
    metrics = Metrics()
    metrics.end_to_end.observe_all([0.001, 0.005, 0.2, 7_000])
    lines = metrics.text().decode()
    name = "flashsale_consumer_end_to_end_seconds"
    for le, count in (("0.005", 2), ("0.1", 2), ("0.25", 3), ("3600.0", 3), ("+Inf", 4)):
        assert f'{name}_bucket{{le="{le}"}} {count}.0\n' in lines
    assert f"{name}_count 4.0\n" in lines


DYING = """
import sys
from flashsale_consumer import app, worker

async def run(self):
    raise ValueError("a programming error")

worker.Worker.run = run
sys.exit(app.main())
"""


def test_a_worker_that_dies_ends_the_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DYING],
        env=os.environ | KAFKA | DATABASE | {"FLASHSALE_LISTEN": "127.0.0.1:0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "the worker died" in ended.stderr
    assert "a programming error" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_cleanly_without_any_server(
    start: Callable[..., Process], number: signal.Signals
) -> None:
    consumer = start(**KAFKA, **DATABASE)
    await consumer.until_prints("waiting for the ledger")
    assert await consumer.status("/healthz") == 200
    async with httpx.AsyncClient(base_url=consumer.url) as client:
        unready = await client.get("/readyz")
    assert unready.status_code == 503
    assert unready.text.startswith("waiting for the ledger: ")
    consumer.signal(number)
    assert await consumer.ended() == 0
    assert consumer.output.count("waiting for") == 1
    assert "Traceback" not in consumer.output
    assert "secret" not in consumer.output


async def test_repeated_and_concurrent_migrations_run_once(database_url: str) -> None:
    async with opened(database_url) as one, opened(database_url) as other:
        await asyncio.gather(*(schema.migrate(each.pool) for each in (one, other, one, other)))
        await schema.migrate(one.pool)
        versions = await one.pool.fetch("SELECT version FROM flashsale_migrations ORDER BY version")
    assert [row["version"] for row in versions] == list(range(1, len(versions) + 1))
