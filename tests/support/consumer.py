"""The consumer's surroundings as its tests make them and look at them."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import TypeAlias
from uuid import uuid4

import asyncpg
import httpx
import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from dev.stack.process import free_port
from dev.stack.servers import PostgresServer
from flashsale import events, ledger
from flashsale.errors import LedgerUnavailable
from flashsale.events import Event
from flashsale.ledger import SaleRow
from flashsale.settings import KafkaSettings
from flashsale_consumer import topics
from flashsale_consumer.metrics import Metrics
from flashsale_consumer.settings import Settings
from flashsale_consumer.worker import Worker

DEADLINE_SECONDS = 60.0
NOON = datetime(2026, 11, 27, 12, tzinfo=UTC)
# A valid RFC 3339 time that is in the year 0 in UTC.
BEYOND_POSTGRESQL = datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


_FIRST = Event(
    schema=1,
    reservation_id="00000000-0000-7000-8000-000000000000",
    sale_id="default/phones",
    item_id="phone",
    user_id="user",
    quantity=1,
    state="accepted",
    version=1,
    occurred_at=NOON,
    allocated=1_000_000,
    capacity=1_000_000,
    revision=1,
)


def accepted(number: int = 0, **changes: object) -> Event:
    """The event of an accepted reservation; `number` orders those of one test."""
    own: dict[str, object] = {
        "reservation_id": str(uuid4()),
        "occurred_at": NOON + timedelta(milliseconds=number),
    }
    return msgspec.structs.replace(_FIRST, **own | changes)


async def until(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    """Waits until it holds; what is away for a while does not hold."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        with suppress(httpx.TransportError, OSError, LedgerUnavailable):
            if await holds():
                return
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_SECONDS:.0f} s"
        await asyncio.sleep(0.05)


@dataclass
class Book:
    """The ledger as a test looks at it."""

    url: str
    pool: Pool

    async def sale(self, sale_id: str = "default/phones") -> SaleRow:
        row = await ledger.sale(self.pool, sale_id)
        assert row is not None
        return row

    async def rows(self, sale_id: str = "default/phones") -> dict[str, tuple[str, int, int]]:
        """State, version and quantity by reservation id."""
        async with ledger.translated():
            found = await self.pool.fetch("SELECT * FROM reservations WHERE sale_id = $1", sale_id)
        return {
            str(row["reservation_id"]): (row["state"], row["version"], row["quantity"])
            for row in found
        }

    async def has(self, *sought: Event) -> bool:
        """Whether the reservations are there, each counted once."""
        for sale_id in {event.sale_id for event in sought}:
            rows = await self.rows(sale_id)
            if not {event.reservation_id for event in sought if event.sale_id == sale_id} <= set(
                rows
            ):
                return False
            counted = [row for row in rows.values() if row[0] != "refused"]
            assert (await self.sale(sale_id)).accepted == sum(row[2] for row in counted)
        return True


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Book]:
    pool = await ledger.connect(url)
    try:
        yield Book(url, pool)
    finally:
        pool.terminate()
        # The transports are closed by the loop, after this.
        await asyncio.sleep(0)


@asynccontextmanager
async def database(server: PostgresServer) -> AsyncIterator[str]:
    """The URL of an empty database, dropped afterwards."""
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


@dataclass
class Log:
    """The topics as a test writes and reads them."""

    bootstrap: str
    topic: str = field(default_factory=lambda: f"reservations.{uuid4()}")
    dead_letter_topic: str = field(default_factory=lambda: f"reservations.dlq.{uuid4()}")
    group_id: str = field(default_factory=lambda: f"ledger.{uuid4()}")

    async def create(self, *, largest_dead_letter: int | None = None) -> None:
        """Creates them as the consumer does, or the second one for small records only (bytes)."""
        if largest_dead_letter is not None:
            async with self._admin() as admin:
                limit = {"max.message.bytes": str(largest_dead_letter)}
                await admin.create_topics(
                    [NewTopic(self.dead_letter_topic, 1, 1, topic_configs=limit)]
                )
        await topics.create(
            KafkaSettings(kafka_bootstrap=self.bootstrap), self.topic, self.dead_letter_topic
        )

    async def delete(self, topic: str) -> None:
        async with self._admin() as admin:
            await admin.delete_topics([topic])

            async def gone() -> bool:
                return topic not in await admin.list_topics()

            await until(gone, f"{topic} is gone")

    async def write(self, *written: Event | bytes | None, partition: int | None = None) -> None:
        """Produces events, and raw values, in this order where they share a partition."""
        producer = AIOKafkaProducer(
            bootstrap_servers=self.bootstrap, acks="all", max_request_size=4_000_000
        )
        await producer.start()
        try:
            for value in written:
                if isinstance(value, Event):
                    await producer.send(
                        self.topic,
                        events.encode(value),
                        value.reservation_id.encode(),
                        partition,
                        headers=events.headers(""),
                    )
                else:
                    await producer.send(
                        self.topic, value, b"a key", partition, headers=[("schema", b"1")]
                    )
            await producer.flush()
        finally:
            await producer.stop()

    async def is_committed(self, offset: int) -> bool:
        """Whether the group has committed this many events to Kafka."""
        async with self._admin() as admin:
            committed = await admin.list_consumer_group_offsets(self.group_id)
        return sum(int(place.offset) for place in committed.values()) >= offset

    async def dead_letters(self, count: int) -> Sequence[ConsumerRecord]:
        """The first `count` dead letters."""
        consumer = AIOKafkaConsumer(
            self.dead_letter_topic,
            bootstrap_servers=self.bootstrap,
            auto_offset_reset="earliest",
            group_id=None,
        )
        await consumer.start()
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                return [await consumer.getone() for _ in range(count)]
        finally:
            await consumer.stop()

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()


class Running:
    """A worker in this process."""

    def __init__(self, url: str, log: Log) -> None:
        self.metrics = Metrics()
        self.worker = Worker(
            Settings(kafka_bootstrap=log.bootstrap, database_url=url),
            self.metrics,
            topic=log.topic,
            dead_letter_topic=log.dead_letter_topic,
            group_id=log.group_id,
        )

    def events(self, result: str) -> float:
        """How many events it counted as that."""
        sample = f'flashsale_consumer_events_total{{result="{result}"}}'
        (line,) = (
            line for line in self.metrics.text().decode().splitlines() if line.startswith(sample)
        )
        return float(line.split()[-1])

    def partitions(self) -> int:
        """How many partitions it reads."""
        return self.metrics.text().decode().count("flashsale_consumer_lag{")


@asynccontextmanager
async def running(url: str, log: Log) -> AsyncIterator[Running]:
    """A worker, ended afterwards; one that died fails the test."""
    member = Running(url, log)
    task = asyncio.create_task(member.worker.run())
    try:
        yield member
        # Else the next timeout, of some versions of Python, would end it.
        assert not task.cancelling(), "what failed was not forgotten"
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Process:
    """`python -m flashsale_consumer`, with its output."""

    def __init__(self, output: Path, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._output = output
        own = {name: value for name, value in os.environ.items() if "FLASHSALE" not in name}
        own |= {"FLASHSALE_LISTEN": f"127.0.0.1:{self.port}", **environment}
        with output.open("wb") as file:
            self._process = Popen(
                [sys.executable, "-m", "flashsale_consumer"], env=own, stdout=file, stderr=STDOUT
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    async def status(self, path: str) -> int:
        async with httpx.AsyncClient(base_url=self.url, timeout=5) as client:
            return (await client.get(path)).status_code

    async def serves(self, path: str) -> bool:
        assert self._process.poll() is None, self.output
        return await self.status(path) == 200

    async def prints(self, text: str, times: int = 1) -> bool:
        return self.output.count(text) >= times

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Its exit code."""

        async def gone() -> bool:
            return self._process.poll() is not None

        await until(gone, "the process ended")
        return self._process.wait()


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """Runs `python -m flashsale_consumer` to its end: its exit code and what it printed."""
    own = {name: value for name, value in os.environ.items() if "FLASHSALE" not in name}
    ended = subprocess.run(
        [sys.executable, "-m", "flashsale_consumer", *arguments],
        env=own | environment,
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    return ended.returncode, ended.stdout
