"""`make demo`: 2,400 buyers, 100 phones, real servers, checked to the last unit."""

import asyncio
import os
import shutil
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import asyncpg
import redis
import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition

from dev.crowd import Entry, Journal, attempts, percentile, stampede
from dev.local import API_PORT, LOCAL, apply_sample, start_stack
from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.servers import Server
from flashsale import events
from flashsale.keys import ItemKeys

USERS: Final = 2_400
CONNECTIONS: Final = 100
ITEM: Final = "iphone_15"
SALE: Final = "default/iphone-15"
QUIET_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ledger says of what the crowd was promised; units and reservations."""

    sold: int
    allocated: int
    oversold: int
    lost: int
    duplicates: int

    @property
    def holds(self) -> bool:
        """Whether every promise was kept, and everything was sold."""
        return self.sold == self.allocated and not (self.oversold or self.lost or self.duplicates)

    def __str__(self) -> str:
        return (
            f"sold {self.sold} of {self.allocated}, oversold {self.oversold}, "
            f"lost {self.lost}, duplicates {self.duplicates}"
        )


def demo() -> int:
    """Runs the demonstration on fresh servers; the exit code is 0 only if every promise held."""
    data = LOCAL / "demo"
    shutil.rmtree(data, ignore_errors=True)
    print("Starting real servers (Kafka is downloaded once) …", flush=True)
    with ExitStack() as running:

        def started(server: Server) -> None:
            running.callback(server.stop)

        addresses = start_stack(data, os.environ, started)
        for service in (
            ConsumerServer(data / "consumer", addresses),
            ApiServer(data / "api", addresses),
        ):
            running.enter_context(service)
            print(f"  {service.name:9} on {service.url}", flush=True)
        apply_sample(addresses)
        wanted = attempts(ITEM, USERS, seed=15)
        print(f"{len(wanted):,} requests by {USERS:,} users …", flush=True)
        begun = time.perf_counter()
        journal = uvloop.run(stampede([service.url], wanted, connections=CONNECTIONS, tries=5))
        seconds = time.perf_counter() - begun
        print("Waiting until the ledger is quiet …", flush=True)
        asyncio.run(_quiet(addresses))
        verdict, recorded = asyncio.run(_check(addresses, journal))
    _report(journal, seconds, recorded)
    failed = [entry for entry in journal.entries if entry.status == 0 or entry.status >= 500]
    print(f"\n{verdict}")
    if failed:
        print(f"{len(failed)} requests failed, first: {failed[0]}")
    shutil.rmtree(data, ignore_errors=True)
    print(f"""
Keep it running with `make up`, then try:

  curl -X POST localhost:{API_PORT}/reserve -H "Content-Type: application/json" \\
    -d '{{"userId":"user1","itemId":"{ITEM}","quantity":1}}'""")
    return 0 if verdict.holds and not failed else 1


async def _quiet(addresses: Addresses) -> None:
    """Waits until the outbox is empty and the ledger has read all of the topic."""
    client = redis.Redis.from_url(addresses.redis_url)
    ledger = await asyncpg.connect(addresses.database_url)
    kafka = AIOKafkaConsumer(bootstrap_servers=addresses.kafka_bootstrap)
    await kafka.start()
    try:
        async with asyncio.timeout(QUIET_SECONDS):
            while True:
                waiting = client.xlen(ItemKeys.of(ITEM).outbox)
                partitions = [
                    TopicPartition(events.TOPIC, number)
                    for number in kafka.partitions_for_topic(events.TOPIC) or ()
                ]
                ends = await kafka.end_offsets(partitions)
                rows = await ledger.fetch("SELECT partition, next_offset FROM kafka_offsets")
                stored = {row["partition"]: row["next_offset"] for row in rows}
                if not waiting and all(
                    stored.get(partition.partition, 0) >= end for partition, end in ends.items()
                ):
                    return
                await asyncio.sleep(0.1)
    finally:
        await kafka.stop()
        await ledger.close()
        client.close()


async def _check(addresses: Addresses, journal: Journal) -> tuple[Verdict, dict[str, float]]:
    """The verdict, and when each reservation was recorded (Unix seconds)."""
    ledger = await asyncpg.connect(addresses.database_url)
    try:
        allocated = await ledger.fetchval("SELECT allocated FROM sales WHERE sale_id = $1", SALE)
        rows = await ledger.fetch(
            "SELECT reservation_id::text AS id, user_id, quantity, recorded_at FROM reservations "
            "WHERE sale_id = $1 AND state = 'accepted'",
            SALE,
        )
    finally:
        await ledger.close()
    promised = journal.accepted()
    recorded = {row["id"]: row["recorded_at"].timestamp() for row in rows}
    sold = sum(row["quantity"] for row in rows)
    by_user = Counter(row["user_id"] for row in rows)
    twice = sum(count - 1 for count in by_user.values()) + len(journal.broken_keys())
    return (
        Verdict(
            sold=sold,
            allocated=allocated,
            oversold=max(0, sold - allocated),
            lost=len(promised.keys() - recorded.keys()),
            duplicates=twice,
        ),
        recorded,
    )


def _report(journal: Journal, seconds: float, recorded: dict[str, float]) -> None:
    entries = journal.entries
    print(
        f"\n{len(entries):,} requests in {seconds:.1f} s: {len(entries) / seconds:,.0f} RPS "
        f"over {CONNECTIONS} connections"
    )
    for (status, outcome), count in sorted(journal.outcomes().items()):
        print(f"  {status} {outcome:24} {count:>7,}")
    accepted: list[Entry] = list(journal.accepted().values())
    rejected = [entry.seconds for entry in entries if 400 <= entry.status < 500]
    _percentiles("accepted", [entry.seconds for entry in accepted])
    _percentiles("rejected", rejected)
    to_row = [
        recorded[identity] - entry.received_at
        for identity, entry in journal.accepted().items()
        if identity in recorded
    ]
    _percentiles("202 to row", to_row)


def _percentiles(what: str, values: list[float]) -> None:
    numbers = "  ".join(f"P{p} {percentile(values, p) * 1000:6.1f} ms" for p in (50, 95, 99))
    print(f"{what:12} {numbers}")
