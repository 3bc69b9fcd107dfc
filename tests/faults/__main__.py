"""`python -m tests.faults`: run many schedules of faults against the real engine."""

import argparse
import asyncio
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

from dev.stack.errors import StackError
from tests.faults.check import Result
from tests.faults.run import Failed, run
from tests.faults.schedule import Kind, Schedule, schedule
from tests.faults.world import opened
from tests.support.paths import ROOT

FOLDER: Final = ROOT / ".local" / "faults"


def main() -> int:
    """Return 0 if every schedule kept every promise."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Run seeded schedules of faults against real Redis (with Sentinel), Kafka, "
        "PostgreSQL, kube-apiserver, two APIs, two consumers and an operator. Meanwhile a crowd "
        "buys, and its journal is checked afterwards. A schedule takes about half a minute. A "
        "failed schedule is printed with its journal. Its seed runs it again.",
    )
    parser.add_argument("-n", type=int, default=20, help="the number of schedules (default: 20)")
    parser.add_argument(
        "--seed", type=int, default=0, help="the seed of the first schedule (default: 0)"
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="continue after a failed schedule"
    )
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="with a Redis Cluster, and faults of one of its nodes",
    )
    options = parser.parse_args()
    if options.n < 1:
        parser.error("-n: must be at least 1")
    try:
        seeds = range(options.seed, options.seed + options.n)
        return asyncio.run(_all(seeds, options.keep_going, clustered=options.cluster))
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


@dataclass
class _Line:
    """The totals of the schedules with one kind of fault."""

    schedules: int = 0
    promised: int = 0
    lost: int = 0
    refused: int = 0
    confirmed: int = 0
    expired: int = 0
    slowest: float = 0.0


@dataclass
class _Summary:
    """The totals of all schedules, by kind of fault."""

    clustered: bool
    kinds: dict[str, _Line] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    failed: list[int] = field(default_factory=list)

    def add(self, made: Schedule, result: Result) -> None:
        for kind in {*(step.kind for step in made.steps), "all"}:
            line = self.kinds.setdefault(kind, _Line())
            line.schedules += 1
            line.promised += result.promised
            line.lost += result.lost
            line.refused += result.refused
            line.confirmed += result.confirmed
            line.expired += result.expired
            line.slowest = max(line.slowest, result.recovery_seconds)
        self.answers.update(result.outcomes)

    def print(self) -> None:
        head = (
            "fault",
            "schedules",
            "202s",
            "lost (allowed)",
            "refused",
            "confirmed",
            "expired",
            "slowest recovery",
        )
        lines = [
            f"| {kind} | {line.schedules} | {line.promised:,} | {line.lost} | {line.refused} "
            f"| {line.confirmed:,} | {line.expired:,} | {line.slowest:.0f} s |"
            for kind in (*Kind, "all")
            if (line := self.kinds.get(kind))
        ]
        print("\n".join(["", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, ""]))
        print(", ".join(f"{kind}: {count:,}" for kind, count in self.answers.most_common()))
        if self.failed:
            of = " REDIS=cluster" if self.clustered else ""
            again = " ".join(f"`make faults N=1 SEED={seed}{of}`" for seed in self.failed)
            print(f"FAILED: {again}")


async def _all(seeds: Sequence[int], keep_going: bool, *, clustered: bool) -> int:
    summary, began = _Summary(clustered), time.monotonic()
    left = list(seeds)
    try:
        while left and (keep_going or not summary.failed):
            # After a failure, the next schedules get a new world.
            async with AsyncExitStack() as stack:
                print("Starting the servers …", flush=True)
                world = await stack.enter_async_context(
                    opened(FOLDER / "world", clustered=clustered)
                )
                while left:
                    made = schedule(left.pop(0), clustered=clustered)
                    done = f"{len(seeds) - len(left)}/{len(seeds)}"
                    print(f"[{done}, {time.monotonic() - began:.0f} s] {made}", flush=True)
                    try:
                        result = await run(world, made)
                    except Failed as failed:
                        _report(made.seed, failed)
                        summary.failed.append(made.seed)
                        break
                    summary.add(made, result)
                    print(f"  passed: {result}", flush=True)
    finally:  # also after an interruption
        summary.print()
    return 1 if summary.failed else 0


def _report(seed: int, failed: Failed) -> None:
    """Print the failure, and save it with the logs of all processes."""
    kept = FOLDER / f"seed-{seed}"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "failed.txt").write_text(f"{failed}\n")
    for log in (FOLDER / "world").glob("*/*.log"):
        shutil.copy(log, kept / f"{log.parent.name}.log")
    print(f"{failed}\nSaved with the logs in {kept.relative_to(ROOT)}", flush=True)
    if failed.__cause__ is not None:
        traceback.print_exception(failed.__cause__)


if __name__ == "__main__":
    sys.exit(main())
