"""Measures buyers while a backlog is worked off: after an outage, in a rebuild, in an expiry.

`python -m bench.backlogs` measures only this, in about six minutes. With names as arguments it
measures only these backlogs. `--write` puts the figures into docs/performance.md.
"""

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
from redis.asyncio import Redis

from bench import figures, machine, page
from bench.holds import HOLD_SECONDS, expire, hold
from bench.recording import Progress, publish
from bench.requests import OPEN_CONNECTIONS, QUICK, WHOLE, Scale
from bench.results import Backlog, Backlogs, Findings
from bench.rig import Api, Rig
from dev.crowd import percentile
from dev.paths import LOCAL, ROOT
from dev.progress import ending_quietly
from dev.stack.process import Server
from flashsale import ledger
from flashsale.errors import LedgerUnavailable
from flashsale.keys import ItemKeys
from flashsale.ledger import Pool
from flashsale.redis_client import connect

ITEMS: Final = 8
"""Sales of the buyers. At half of the capacity, a single sale would fill its outbox of 100,000
entries in the outage, and then answer 503.
"""
RECORDED_SECONDS: Final = 300.0
LOOK_SECONDS: Final = 0.5
KAFKA, POSTGRES, REBUILD, EXPIRY = "Kafka", "PostgreSQL", "rebuild", "expiry"

Left = Callable[["Redis", Pool], Awaitable[int]]


@contextmanager
def looking(rig: Rig, left: Left) -> Iterator[list[tuple[float, int]]]:
    """Look at a backlog from time to time, in a thread, until the end of the context.

    The list gets the time (`time.perf_counter`) and the size of the backlog.
    """
    found: list[tuple[float, int]] = []
    ended = threading.Event()

    async def look() -> None:
        client, pool = connect(rig.redis.url), await ledger.connect(rig.postgres.url)
        while not ended.is_set():
            with suppress(LedgerUnavailable):
                size = await left(client, pool)
                found.append((time.perf_counter(), size))
            await asyncio.sleep(LOOK_SECONDS)
        await client.aclose()
        await pool.close()

    thread = threading.Thread(target=lambda: asyncio.run(look()))
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


class Measuring:
    """Measures backlogs while buyers send `rate` requests per second to an API process."""

    def __init__(self, rig: Rig, scale: Scale, api: Api, rate: float) -> None:
        self._rig, self._scale, self._api, self._rate = rig, scale, api, rate
        self._calm = scale.calm_seconds / 2
        self.kinds: dict[str, Callable[[str], Backlog]] = {
            KAFKA: lambda name: self._outage(name, rig.kafka),
            POSTGRES: lambda name: self._outage(name, rig.postgres),
            REBUILD: self._rebuild,
            EXPIRY: self._expiry,
        }

    def run(self, names: Sequence[str]) -> list[Backlog]:
        """Measure the named backlogs in turn, with a consumer."""
        consumer = self._rig.consumer(self._rig.cores.rest)
        asyncio.run(self._rewriting(percent=0))
        found = []
        for name in names:
            asyncio.run(_quiet(self._rig))
            found.append(self.kinds[name](name))
        asyncio.run(self._rewriting(percent=100))
        consumer.stop()
        return found

    async def _rewriting(self, *, percent: int) -> None:
        """Set the growth after which Redis rewrites its file, with 0 never.

        Its child would take half of Redis' share of the core. Redis has more cores elsewhere.
        """
        client = connect(self._rig.redis.url)
        await client.config_set("auto-aof-rewrite-percentage", percent)
        while (await client.info("persistence"))["aof_rewrite_in_progress"]:
            await asyncio.sleep(LOOK_SECONDS)
        await client.aclose()

    def _outage(self, name: str, server: Server) -> Backlog:
        """Stop a server for a while. The backlog are the events that are not recorded."""
        items, away = self._rig.sales(ITEMS), self._scale.away_seconds

        def work() -> float:
            time.sleep(self._calm)
            stopped = time.perf_counter()
            server.stop()
            time.sleep(max(0.0, stopped + away - time.perf_counter()))
            begun = time.perf_counter()
            self._rig.again(server)
            return begun

        async def left(client: "Redis", pool: Pool) -> int:
            return await _unrecorded(items, client, pool)

        # Events of the last second are on their way to the ledger at any time.
        return self._measured(name, items, 3 * away, work, left, gone=int(self._rate))

    def _rebuild(self, name: str) -> Backlog:
        """Rebuild a large sale that Redis has lost, next to the sales of the buyers."""
        items, count = self._rig.sales(ITEMS), 4 * self._scale.holds
        large = asyncio.run(publish(self._rig, count))
        asyncio.run(self._lose(large, count))

        def work() -> float:
            time.sleep(self._calm)
            begun = time.perf_counter()
            machine.placed(self._rig.cores.rest, lambda: self._rebuilt(large))
            return begun

        async def left(client: "Redis", _: Pool) -> int:
            return count - int(await client.hlen(ItemKeys.of(large).reservations))

        return self._measured(name, items, 10 + count / 15_000, work, left)

    def _expiry(self, name: str) -> Backlog:
        """Expire many holds of the buyers' sale at once."""
        [item] = self._rig.sales(hold_seconds=HOLD_SECONDS)
        count = self._scale.holds
        asyncio.run(hold(self._rig, item, count))

        def work() -> float:
            time.sleep(self._calm)
            begun = time.perf_counter()
            asyncio.run(expire(self._rig, item, count))
            return begun

        async def left(client: "Redis", _: Pool) -> int:
            return count - int(await client.hget(ItemKeys.of(item).sale, "released") or 0)

        return self._measured(name, [item], 5 + count / 4_000, work, left)

    def _measured(
        self,
        name: str,
        items: Sequence[str],
        seconds: float,
        work: Callable[[], float],
        left: Left,
        *,
        gone: int = 0,
    ) -> Backlog:
        """Run a crowd while `work` makes a backlog, and returns when it began to shrink.

        `seconds` is how long the crowd goes on after the calm. A backlog of the size `gone` counts
        as none.
        """
        crowd = self._rig.crowd(
            [self._api],
            items,
            self._calm + seconds,
            connections=OPEN_CONNECTIONS,
            rate=self._rate,
            samples=self._rig.data / "samples",
        )
        time.sleep(1)
        started = time.perf_counter()
        with looking(self._rig, left) as looks:
            begun = work()
            tally = crowd.tally()
        samples = crowd.samples()
        calm = [one.seconds for one in samples if one.due < started + self._calm]
        found = [(at, size) for at, size in looks if at >= begun]
        most = max(range(len(found)), key=lambda number: found[number][1])
        end = next((at for at, size in found[most:] if size <= gone), None)
        until = min(end or samples[-1].due, samples[-1].due)
        within = [one for one in samples if begun <= one.due < until]
        each_second = range(max(1, round(until - begun)))
        backlog = Backlog(
            name=name,
            rate=self._rate,
            calm=percentile(calm, 95) * 1000,
            seconds=end and end - begun,
            p95=percentile((one.seconds for one in within), 95) * 1000,
            each_second=[
                percentile((s.seconds for s in within if number <= s.due - begun < number + 1), 95)
                * 1000
                for number in each_second
            ],
            left=[
                next((size for at, size in found if at >= begun + number), found[-1][1])
                for number in each_second
            ],
            requests=len(within),
            failed=sum(one.status != 202 for one in within),
        )
        print(f"    {name}: {tally.requests:,} requests {tally.statuses}", flush=True)
        print(f"    {msgspec.json.encode(backlog).decode()}", flush=True)
        return backlog

    async def _lose(self, item: str, count: int) -> None:
        """Wait until the ledger has the item's sale, and delete its keys in Redis."""
        client, pool = connect(self._rig.redis.url), await ledger.connect(self._rig.postgres.url)
        async with asyncio.timeout(RECORDED_SECONDS):
            while await _accepted([item], pool) < count:
                await asyncio.sleep(LOOK_SECONDS)
        await client.delete(*ItemKeys.of(item).sold)
        await client.aclose()
        await pool.close()

    def _rebuilt(self, item: str) -> None:
        done = subprocess.run(
            [Path(sys.executable).with_name("flashsalectl"), "rebuild", item],
            env={**os.environ, **self._rig.addresses.environment()},
            capture_output=True,
            text=True,
            check=False,
        )
        print(f"    {done.stdout.strip().splitlines()[-1:]}", flush=True)
        if done.returncode:
            raise SystemExit(f"`flashsalectl rebuild` failed: {done.stderr}")


async def _unrecorded(items: Sequence[str], client: "Redis", pool: Pool) -> int:
    """Return the number of accepted units that are in an outbox or not in the ledger."""
    pipeline = client.pipeline(transaction=False)
    for item in items:
        pipeline.hget(ItemKeys.of(item).sale, "accepted")
        pipeline.xlen(ItemKeys.of(item).outbox)
    replies = [int(reply or 0) for reply in await pipeline.execute()]
    return max(sum(replies[::2]) - await _accepted(items, pool), sum(replies[1::2]))


async def _accepted(items: Sequence[str], pool: Pool) -> int:
    async with ledger.translated():
        found: int = await pool.fetchval(
            "SELECT coalesce(sum(accepted), 0)::bigint FROM sales WHERE item_id = ANY($1)", items
        )
    return found


def backlogs(rig: Rig, scale: Scale, api: Api, rate: float, run: str) -> Backlogs:
    """Measure every kind. `run` says when, and under which other load."""
    measuring = Measuring(rig, scale, api, rate)
    return Backlogs(run=run, found=measuring.run(list(measuring.kinds)))


def capacity(rig: Rig, scale: Scale, api: Api) -> float:
    """Return the accepted requests per second of a closed loop while a consumer records them."""
    items, consumer = rig.sales(ITEMS), rig.consumer(rig.cores.rest)
    rounds = [rig.round([api], items, scale.seconds).tally.rps for _ in range(scale.rounds)]
    print(f"    recorded: {', '.join(f'{one:,.0f}' for one in rounds)}/s", flush=True)
    asyncio.run(_quiet(rig))
    consumer.stop()
    return median(rounds)


async def _quiet(rig: Rig) -> None:
    """Wait until the consumer has announced the events of earlier measurements."""
    async with Progress(rig) as progress, asyncio.timeout(RECORDED_SECONDS):
        while await progress.announced() < await progress.published():
            await asyncio.sleep(LOOK_SECONDS)


def main() -> None:
    """Measure backlogs at half of the capacity, which a closed loop measures first."""
    every = (KAFKA, POSTGRES, REBUILD, EXPIRY)
    parser = argparse.ArgumentParser(prog="python -m bench.backlogs", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(every)}")
    parser.add_argument("--quick", action="store_true", help="measure shorter outages")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md")
    parser.add_argument("--rate", type=float, help="requests per second, instead of half")
    arguments = parser.parse_args()
    names = arguments.names or every
    if unknown := set(names) - set(every):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    folder = LOCAL / "bench"
    shutil.rmtree(folder, ignore_errors=True)
    scale = QUICK if arguments.quick else WHOLE
    run = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, load average {machine.load_average()} before"
    with Rig(folder, python := machine.python()) as rig:
        rig.consumer(rig.cores.rest).stop()  # creates the topics and the ledger
        api = rig.api()
        rate = arguments.rate or capacity(rig, scale, api) / 2
        found = Measuring(rig, scale, api, rate).run(names)
    run = f"{run}, commit {machine.describe(python)['commit']}"
    shutil.rmtree(folder)
    print(figures.backlogs(Backlogs(run=run, found=found)))
    if arguments.write:
        docs = ROOT / "docs"
        known = msgspec.json.decode((docs / "performance.json").read_bytes(), type=Findings)
        replaced = msgspec.structs.replace(known, backlogs=Backlogs(run=run, found=found))
        page.write(replaced, docs)


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
