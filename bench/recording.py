"""Measures the path from accepted to recorded: a consumer's rate, and the time to the row.

`python -m bench.recording` measures only how fast a consumer records and announces.
"""

import argparse
import asyncio
import shutil
import sys
import time
from itertools import pairwise
from typing import Final, Self, cast
from uuid import uuid4

import asyncpg
import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from bench import machine
from bench.machine import cpu_seconds
from bench.requests import OPEN_CONNECTIONS, WHOLE, Scale
from bench.results import Drain, Together
from bench.rig import Api, Consumer, Rig
from dev.crowd import percentile
from dev.paths import LOCAL
from dev.progress import ending_quietly
from flashsale import events, ledger
from flashsale.requirements import BATCH_BYTES
from flashsale.reservations import Record, Snapshot, State
from flashsale.settings import KafkaSettings
from flashsale_operator.sales import offsets

SHARE: Final = 0.3
"""The share of the API's capacity that is sent while API and consumer run at once. On two cores,
one core carries Redis, Kafka, PostgreSQL, the consumer and the crowd.
"""
BACKLOG: Final = 400_000
BATCH: Final = 500
"""Events of the backlog, and of one batch of it."""
ACCEPTED_MS: Final = 1_790_000_000_000
"""When the reservations of the backlog were accepted, in Unix milliseconds."""


class Progress:
    """Counts the events that Kafka has and that the ledger has. A context manager."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    async def __aenter__(self) -> Self:
        self._pool = await ledger.connect(self._rig.postgres.url)
        self._kafka = AIOKafkaConsumer(bootstrap_servers=self._rig.kafka.bootstrap)
        await self._kafka.start()
        numbers = await offsets.spans(KafkaSettings(kafka_bootstrap=self._rig.kafka.bootstrap))
        self._partitions = [TopicPartition(events.topic(), number) for number in numbers]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._kafka.stop()
        await self._pool.close()

    async def published(self) -> int:
        """Return the number of events that Kafka has."""
        return sum((await self._kafka.end_offsets(self._partitions)).values())

    async def recorded(self) -> int:
        """Return the number of events that the ledger has."""
        return sum((await ledger.stored_offsets(self._pool, events.topic())).values())

    async def announced(self) -> int:
        """Return the number of recorded events that are announced."""
        found: int = await self._pool.fetchval(
            "SELECT coalesce(sum(announced_offset), 0)::bigint FROM kafka_offsets WHERE topic = $1",
            events.topic(),
        )
        return found


def drains(rig: Rig, scale: Scale) -> list[Drain]:
    """Let one consumer on the first core record and announce the reservations of earlier rounds.

    The first tenth of the backlog is the warm-up. The rest is divided into rounds. An event counts
    once Kafka has acknowledged its announcement.
    """
    return asyncio.run(_drains(rig, scale.rounds))


async def _drains(rig: Rig, rounds: int) -> list[Drain]:
    found = []
    async with Progress(rig) as progress:
        end, begin = await progress.published(), await progress.announced()
        first = begin + (end - begin) // 10
        marks = [first + (end - first) * number // rounds for number in range(rounds + 1)]
        starting = asyncio.create_task(asyncio.to_thread(rig.consumer, rig.cores.first))
        passed = []
        for mark in marks:
            while await progress.announced() < mark:
                await asyncio.sleep(0.01)
            spent = _cpu(rig, await starting)
            passed.append((time.monotonic(), await progress.announced(), spent))
        await asyncio.to_thread(starting.result().stop)
    for (since, before, cpu_before), (until, after, cpu_after) in pairwise(passed):
        if after == before:
            continue  # the backlog of a quick run can be as small as one batch
        done = Drain(
            events=after - before,
            seconds=until - since,
            cpu={
                name: (used - cpu_before[name]) / (after - before) * 10_000
                for name, used in cpu_after.items()
            },
        )
        found.append(done)
        print(
            f"    round {len(found)}  {done.events:,} events: {done.rate:,.0f}/s  "
            + "  ".join(f"{name} {used:.2f}" for name, used in done.cpu.items())
            + " CPU s per 10,000",
            flush=True,
        )
    return found


def _cpu(rig: Rig, consumer: Consumer) -> dict[str, float]:
    servers = {"consumer": consumer, "PostgreSQL": rig.postgres, "Kafka": rig.kafka}
    return {name: cpu_seconds(cast("int", server.pid)) for name, server in servers.items()}


def together(rig: Rig, scale: Scale, api: Api, capacity: float) -> Together:
    """Run API and consumer at once, at a constant arrival rate."""
    return asyncio.run(_together(rig, scale, api, capacity * SHARE))


async def _together(rig: Rig, scale: Scale, api: Api, rate: float) -> Together:
    [item] = await asyncio.to_thread(rig.sales)
    consumer = await asyncio.to_thread(rig.consumer, rig.cores.rest)
    journal = rig.data / "journal.json"
    lag = []
    async with Progress(rig) as progress:
        crowd = rig.crowd(
            [api],
            [item],
            scale.together_seconds,
            connections=OPEN_CONNECTIONS,
            rate=rate,
            journal=journal,
        )
        tally = asyncio.create_task(asyncio.to_thread(crowd.tally))
        while not tally.done():
            await asyncio.sleep(1)
            recorded = await progress.recorded()
            lag.append(max(0, await progress.published() - recorded))
        await asyncio.to_thread(rig.drain, [item])
        while await progress.recorded() < await progress.published():
            await asyncio.sleep(0.05)
    await asyncio.to_thread(consumer.stop)
    accepted = msgspec.json.decode(journal.read_bytes(), type=list[tuple[str, float]])
    rows = await _rows(rig, item)
    missing = [identity for identity, _ in accepted if identity not in rows]
    if missing:
        raise SystemExit(
            f"{len(missing)} accepted reservations have no row, for example {missing[0]}"
        )
    waits = [rows[identity] - at for identity, at in accepted]
    return Together(
        rate=rate,
        seconds=tally.result().seconds,
        lag=lag,
        to_row=(
            percentile(waits, 50) * 1000,
            percentile(waits, 95) * 1000,
            percentile(waits, 99) * 1000,
        ),
        recorded=len(rows),
    )


async def _rows(rig: Rig, item: str) -> dict[str, float]:
    connection = await asyncpg.connect(rig.postgres.url)
    try:
        rows = await connection.fetch(
            "SELECT reservation_id::text AS id, recorded_at FROM reservations WHERE sale_id = $1",
            f"default/{item}",
        )
    finally:
        await connection.close()
    return {row["id"]: row["recorded_at"].timestamp() for row in rows}


async def publish(rig: Rig, count: int) -> str:
    """Publish the events of new reservations, in batches as the API does. Returns their item."""
    [item] = await asyncio.to_thread(rig.sales)
    snapshot = Snapshot(f"default/{item}", count, count, 1)
    producer = AIOKafkaProducer(
        bootstrap_servers=rig.kafka.bootstrap, acks="all", max_batch_size=BATCH_BYTES
    )
    async with producer:
        partitions = sorted(await producer.partitions_for(events.topic()))
        for first in range(0, count, BATCH):
            batch = producer.create_batch()
            for number in range(first, first + BATCH):
                record = Record(State.CONFIRMED, 1, 1, ACCEPTED_MS, f"user-{number}", "")
                identity = str(uuid4())
                batch.append(
                    timestamp=None,
                    key=identity.encode(),
                    value=events.encode(events.Event.of(item, identity, record, snapshot)),
                    headers=events.headers(""),
                )
            batch.close()
            partition = partitions[first // BATCH % len(partitions)]
            await (await producer.send_batch(batch, events.topic(), partition=partition))
    return item


def main() -> None:
    """Measure how fast a consumer records and announces a backlog."""
    argparse.ArgumentParser(prog="python -m bench.recording", description=__doc__).parse_args()
    folder = LOCAL / "bench"
    shutil.rmtree(folder, ignore_errors=True)
    with Rig(folder, machine.python()) as rig:
        rig.consumer(rig.cores.rest).stop()  # creates the topics and the ledger
        asyncio.run(publish(rig, BACKLOG))
        drains(rig, WHOLE)
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
