"""Measures the effect of outages of PostgreSQL and of Kafka on buyers."""

import asyncio
import time
from typing import Final

import asyncpg

from bench.requests import OPEN_CONNECTIONS, Scale
from bench.results import Outages, Phase
from bench.rig import Api, Rig, Sample
from dev.crowd import percentile
from dev.stack.process import Server

ITEMS: Final = 8
"""Concurrent sales. At this rate, a single sale would fill its outbox of 100,000 entries before
Kafka is back, and then answer 503.
"""

RECORDED_SECONDS: Final = 120.0
"""How long the rows may take after the last request."""


def outages(rig: Rig, scale: Scale, api: Api, rate: float) -> Outages:
    """Stop PostgreSQL and then Kafka for a while, at a constant arrival rate with a consumer."""
    items = rig.sales(ITEMS)
    consumer = rig.consumer(rig.cores.rest)
    calm, away = scale.calm_seconds, scale.outage_seconds
    # Kafka takes a few seconds to start.
    total = 3 * calm + 2 * away + 10
    crowd = rig.crowd(
        [api],
        items,
        total,
        connections=OPEN_CONNECTIONS,
        rate=rate,
        samples=rig.data / "samples",
    )
    marks = []
    time.sleep(1 + calm)
    for name, server in (("PostgreSQL", rig.postgres), ("Kafka", rig.kafka)):
        marks.append((f"{name} away", *_away(rig, server, away)))
        print(f"    {name} was away for {marks[-1][2] - marks[-1][1]:.0f} s", flush=True)
        time.sleep(calm)
    tally = crowd.tally()
    print(f"    {tally.requests:,} requests: {tally.statuses}. Waiting for the ledger", flush=True)
    accepted = tally.statuses.get("202", 0)
    deadline = time.monotonic() + RECORDED_SECONDS
    while (recorded := asyncio.run(_recorded(rig, items))) < accepted:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    consumer.stop()
    return _found(crowd.samples(), marks, rate, accepted - recorded)


def _away(rig: Rig, server: Server, seconds: float) -> tuple[float, float]:
    """Stop the server for some seconds. Returns the times of the stop and of its next answer."""
    begun = time.perf_counter()
    server.stop()
    time.sleep(max(0.0, begun + seconds - time.perf_counter()))
    rig.again(server)
    return begun, time.perf_counter()


def _found(
    samples: list[Sample], marks: list[tuple[str, float, float]], rate: float, unrecorded: int
) -> Outages:
    begun, end = samples[0].due, samples[-1].due
    (_, first, first_end), (_, second, second_end) = marks
    spans = [
        ("before", begun, first),
        ("PostgreSQL away", first, first_end),
        ("between", first_end, second),
        ("Kafka away", second, second_end),
        ("after", second_end, end),
    ]
    each_second = []
    for second_number in range(int(end - begun)):
        within = _within(samples, begun + second_number, begun + second_number + 1)
        each_second.append(percentile((one.seconds for one in within), 95) * 1000)
    return Outages(
        rate=rate,
        items=ITEMS,
        phases=phases(samples, spans),
        each_second=each_second,
        spans=[(name, since - begun, until - begun) for name, since, until in marks],
        unrecorded=unrecorded,
    )


def phases(samples: list[Sample], spans: list[tuple[str, float, float]]) -> list[Phase]:
    """Divide a run into spans of (name, begin, end), and print a line per span."""
    return [_phase(name, _within(samples, since, until)) for name, since, until in spans]


def _within(samples: list[Sample], since: float, until: float) -> list[Sample]:
    return [one for one in samples if since <= one.due < until]


def _phase(name: str, samples: list[Sample]) -> Phase:
    took = [one.seconds for one in samples]
    phase = Phase(
        name=name,
        requests=len(samples),
        p50=percentile(took, 50) * 1000,
        p95=percentile(took, 95) * 1000,
        p99=percentile(took, 99) * 1000,
        failed=sum(one.status != 202 for one in samples),
    )
    print(
        f"    {name:16} P50 {phase.p50:.1f}  P95 {phase.p95:.1f}  P99 {phase.p99:.1f} ms, "
        f"{phase.failed} of {phase.requests:,} not accepted",
        flush=True,
    )
    return phase


async def _recorded(rig: Rig, items: list[str]) -> int:
    connection = await asyncpg.connect(rig.postgres.url)
    try:
        rows: int = await connection.fetchval(
            "SELECT count(*) FROM reservations WHERE sale_id = ANY($1)",
            [f"default/{item}" for item in items],
        )
    finally:
        await connection.close()
    return rows
