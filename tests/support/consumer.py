"""The ledger, the topics and the consumer processes of the consumer's tests."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from uuid import uuid4

import httpx
import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord
from aiokafka.errors import KafkaError
from aiokafka.record._crecords.cutil import crc32c_cython as crc32c
from aiokafka.structs import OffsetAndMetadata

from dev.stack.ports import free_port
from flashsale import events
from flashsale.events import Event
from flashsale.requirements import PARTITIONS
from flashsale.settings import KafkaSettings
from flashsale_consumer import topics
from flashsale_consumer.metrics import Metrics
from flashsale_consumer.settings import Settings
from flashsale_consumer.worker import Worker
from flashsale_operator.sales.offsets import spans
from tests.support.eventually import until
from tests.support.topics import administering, create_topic

DEADLINE_SECONDS = 60.0
NOON = datetime(2026, 11, 27, 12, tzinfo=UTC)
# A valid RFC 3339 time that is in the year 0 in UTC.
BEYOND_POSTGRESQL = datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))

_CRC = slice(17, 21)
"""Where a batch has its checksum, which is of the bytes behind it."""


_FIRST = Event(
    schema=1,
    reservation_id="00000000-0000-7000-8000-000000000000",
    sale_id="default/phones",
    item_id="phone",
    user_id="user",
    quantity=1,
    state="confirmed",
    version=1,
    accepted_at=NOON,
    confirmed_at=NOON,
    allocated=1_000_000,
    capacity=1_000_000,
    revision=1,
)


def accepted(number: int = 0, **changes: object) -> Event:
    """Make the event of an accepted reservation. A higher `number` was accepted later."""
    at = NOON + timedelta(milliseconds=number)
    own: dict[str, object] = {
        "reservation_id": str(uuid4()),
        "accepted_at": at,
        "confirmed_at": at,
    }
    return msgspec.structs.replace(_FIRST, **own | changes)


def held(number: int = 0, **changes: object) -> Event:
    """Make the event of a hold of ten minutes. A higher `number` was accepted later."""
    ends = NOON + timedelta(minutes=10, milliseconds=number)
    own: dict[str, object] = {"state": "held", "expires_at": ends, "confirmed_at": None}
    return accepted(number, **own | changes)


def changed(event: Event, state: str, **changes: object) -> Event:
    """Make the event of the next version of a reservation. A confirmation names an order."""
    own: dict[str, object] = {"state": state, "version": event.version + 1}
    if state == "confirmed":
        own |= {"order_ref": "order-1", "confirmed_at": event.confirmed_at or event.expires_at}
    return msgspec.structs.replace(event, **own | changes)


@dataclass
class Log:
    """The topics and the consumer group of one engine."""

    bootstrap: str
    engine: str = field(default_factory=lambda: f"test-{uuid4()}")

    @property
    def topic(self) -> str:
        return events.topic(self.engine)

    @property
    def dead_letter_topic(self) -> str:
        return events.dead_letter_topic(self.engine)

    @property
    def group_id(self) -> str:
        return events.consumer_group(self.engine)

    def environment(self) -> dict[str, str]:
        """Return the variables of a process that uses these topics."""
        return {"FLASHSALE_KAFKA_BOOTSTRAP": self.bootstrap, "FLASHSALE_ENGINE": self.engine}

    async def create(self, *, largest_dead_letter: int | None = None) -> None:
        """Create the topics as the consumer does. `largest_dead_letter` is a limit in bytes."""
        if largest_dead_letter is not None:
            limit = {"max.message.bytes": str(largest_dead_letter)}
            await create_topic(self.bootstrap, self.dead_letter_topic, 1, limit)
        await topics.create(KafkaSettings(kafka_bootstrap=self.bootstrap, engine=self.engine))

    async def delete(self, topic: str) -> None:
        async with administering(self.bootstrap) as admin:
            await admin.delete_topics([topic])

            async def gone() -> bool:
                return topic not in await admin.list_topics()

            await until(gone, f"{topic} is deleted")

    async def write(
        self,
        *written: Event | bytes | None,
        partition: int | None = None,
        headers: Sequence[tuple[str, bytes | None]] = (),
    ) -> None:
        """Produce events and raw values. Within a partition their order is kept.

        `headers` are more headers of the raw values.
        """
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
                        self.topic,
                        value,
                        b"a key",
                        partition,
                        headers=[*headers, ("schema", b"1")],
                    )
            await producer.flush()
        finally:
            await producer.stop()

    async def write_in_transaction(self, *written: bytes, partition: int) -> None:
        """Produce records in a transaction. Its end is a record that no consumer is given."""
        producer = AIOKafkaProducer(bootstrap_servers=self.bootstrap, transactional_id=self.engine)
        await producer.start()
        try:
            async with producer.transaction():
                for value in written:
                    await producer.send(self.topic, value, b"a key", partition)
        finally:
            await producer.stop()

    async def write_undecodable(self, partition: int) -> None:
        """Produce a batch of three records. A header of the second has a name that is not UTF-8."""
        producer = AIOKafkaProducer(bootstrap_servers=self.bootstrap)
        await producer.start()
        try:
            batch = producer.create_batch()
            for name in ("schema", "broken", "schema"):
                batch.append(key=b"a key", value=b"bad", timestamp=None, headers=[(name, b"1")])
            batch.close()
            content = bytearray(batch._build().replace(b"broken", b"\xff" * 6))
            content[_CRC] = crc32c(content[_CRC.stop :]).to_bytes(4, "big")
            batch._build = lambda: content
            await (await producer.send_batch(batch, self.topic, partition=partition))
        finally:
            await producer.stop()

    async def ends(self) -> dict[int, int]:
        """Return the end offset of each partition of the topic."""
        kafka = KafkaSettings(kafka_bootstrap=self.bootstrap, engine=self.engine)
        return {number: span.end for number, span in (await spans(kafka)).items()}

    async def is_committed(self, offset: int) -> bool:
        """Whether the group has committed this many events to Kafka."""
        committed = await self.committed()
        return sum(int(place.offset) for place in committed.values()) >= offset

    async def committed(self) -> dict[int, OffsetAndMetadata]:
        """Return the group's committed offsets by partition."""
        async with administering(self.bootstrap) as admin:
            committed = await admin.list_consumer_group_offsets(self.group_id)
        return {place.partition: offset for place, offset in committed.items()}

    async def owner(self) -> str | None:
        """Return the engine id that the group names in Kafka."""
        first = (await self.committed()).get(0)
        return first and events.owner(first.metadata)

    async def until_owned(self) -> None:
        """Wait until the group names an engine, even if Kafka has no coordinator for it yet."""
        await until(self.owner, "the group has an owner", ignoring=(KafkaError,))

    async def dead_letters(self, count: int) -> Sequence[ConsumerRecord]:
        """Return the first `count` dead letters."""
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


class Running:
    """A worker in this process."""

    def __init__(self, url: str, log: Log, group_id: str | None, partitions: int) -> None:
        self.metrics = Metrics()
        self.worker = Worker(
            Settings(
                kafka_bootstrap=log.bootstrap,
                database_url=url,
                engine=log.engine,
                kafka_partitions=partitions,
            ),
            self.metrics,
        )
        if group_id is not None:
            self.worker._group_id = group_id

    def events(self, result: str) -> float:
        """The number of events that the worker counted under `result`."""
        return self.value(f'flashsale_consumer_events_total{{result="{result}"}}')

    def value(self, sample: str) -> float:
        """The value of one sample of the worker's metrics."""
        (line,) = (
            line
            for line in self.metrics.text().decode().splitlines()
            if line.startswith(f"{sample} ")
        )
        return float(line.split()[-1])

    def total(self, metric: str) -> float:
        """The sum of the samples of a metric with labels."""
        lines = self.metrics.text().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(metric + "{"))

    def partitions(self) -> int:
        """The number of partitions that the worker reads."""
        return self.metrics.text().decode().count("flashsale_consumer_lag{")


async def until_recorded(count: int, *members: Running) -> None:
    """Wait until workers have counted `count` recorded events together. Check that it is no more.

    A worker counts after its commit, so the ledger has the events a moment earlier.
    """

    def counted() -> float:
        return sum(member.events("recorded") for member in members)

    await until(lambda: counted() >= count, lambda: f"{counted():.0f} of {count} are counted")
    assert counted() == count


@asynccontextmanager
async def running(
    url: str, log: Log, *, group_id: str | None = None, partitions: int = PARTITIONS
) -> AsyncIterator[Running]:
    """Run a worker during the body. A worker that died fails the test."""
    member = Running(url, log, group_id, partitions)
    task = asyncio.create_task(member.worker.run())
    try:
        yield member
        # Otherwise the next timeout would end the worker in some versions of Python.
        assert not task.cancelling(), "a failed batch left a cancellation on the worker's task"
    finally:
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=60)
        assert done, "the worker does not end"
        if not task.cancelled():
            task.result()


class Process:
    """`python -m flashsale_consumer` and its output."""

    def __init__(self, output: Path, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._output = output
        listen = {"FLASHSALE_LISTEN": f"127.0.0.1:{self.port}"}
        with output.open("wb") as file:
            self._process = Popen(
                [sys.executable, "-m", "flashsale_consumer"],
                env=_only(**listen | environment),
                stdout=file,
                stderr=STDOUT,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    async def status(self, path: str) -> int:
        async with httpx.AsyncClient(base_url=self.url, timeout=5) as client:
            return (await client.get(path)).status_code

    async def until_serves(self, path: str) -> None:
        async def look() -> bool:
            assert self._process.poll() is None, self.output
            return await self.status(path) == 200

        await until(look, f"{path} answers 200", ignoring=(httpx.TransportError,))

    async def until_prints(self, text: str, times: int = 1) -> None:
        await until(lambda: self.output.count(text) >= times, lambda: f"{text}: {self.output}")

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    async def ended(self) -> int:
        """Wait for the end of the process, and return its exit code."""
        await until(lambda: self._process.poll() is not None, "the process ends")
        return self._process.wait()


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run `python -m flashsale_consumer` to its end. Returns the exit code and the output."""
    ended = subprocess.run(
        [sys.executable, "-m", "flashsale_consumer", *arguments],
        env=_only(**environment),
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    return ended.returncode, ended.stdout


def _only(**settings: str) -> dict[str, str]:
    """This process' environment, with these settings and no others of the engine."""
    inherited = {name: value for name, value in os.environ.items() if "FLASHSALE" not in name}
    return inherited | settings
