"""`python -m tests.faults`: run many schedules of faults against the real engine."""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Final

from dev.progress import ending_quietly
from dev.stack.errors import StackError
from tests.faults.schedule import Redis, Schedule, schedule
from tests.faults.table import OUTCOMES, Outcome, keep, table
from tests.faults.worker import Worker
from tests.support.paths import ROOT

WORKERS: Final = 3
"""Schedules side by side. They mostly wait, so three are quicker than two even on two cores."""
STUCK_SECONDS: Final = 600.0
"""Even a failing schedule takes less than this, with the start of its servers."""


def main() -> int:
    """Return 0 if every schedule kept every promise."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Run seeded schedules of faults against real Redis (one server, with Sentinel, "
        "or a cluster), Kafka, PostgreSQL, kube-apiserver, two APIs, two consumers and an "
        "operator. Meanwhile a crowd buys, and its journal is checked afterwards. Several "
        "schedules run side by side, each on servers of its own. A failed schedule is printed "
        "with its journal. Its seed runs it again. "
        f"{OUTCOMES.relative_to(ROOT)} keeps the outcomes of all runs, and `python -m "
        "tests.faults.table` prints their sum.",
    )
    parser.add_argument("-n", type=int, default=20, help="the number of schedules (default: 20)")
    parser.add_argument(
        "--first", type=int, default=0, help="the seed of the first schedule (default: 0)"
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="continue after a failed schedule"
    )
    parser.add_argument(
        "--redis",
        type=Redis,
        choices=list(Redis),
        help="the kind of Redis of every schedule (default: each seed selects one)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=WORKERS,
        help=f"the number of schedules side by side (default: {WORKERS})",
    )
    options = parser.parse_args()
    for name in ("n", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"{'-' if name == 'n' else '--'}{name}: must be at least 1")
    seeds = range(options.first, options.first + options.n)
    waiting = [schedule(seed, options.redis) for seed in seeds]
    # As Ctrl-C does, `kill` ends the servers too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes: list[Outcome] = []
    try:
        run(
            waiting,
            [OUTCOMES.parent / f"world-{worker + 1}" for worker in range(options.workers)],
            outcomes,
            keep_going=options.keep_going,
        )
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        print(f"\n{table(outcomes)}")
    return 1 if any(outcome.failure for outcome in outcomes) else 0


def run(
    waiting: Sequence[Schedule],
    folders: Sequence[Path],
    outcomes: list[Outcome],
    *,
    keep_going: bool,
) -> None:
    """Run the schedules, and add their outcomes to the list and to the file.

    A worker for each folder runs them side by side. Unless `keep_going`, no schedule starts after
    a failure. Raises StackError if a server does not start.
    """
    left, began = list(waiting), time.monotonic()
    with ExitStack() as stack:
        busy: dict[Connection, Worker] = {}

        def proceed(worker: Worker) -> None:
            if left and (keep_going or not any(outcome.failure for outcome in outcomes)):
                worker.run(_next(left, worker, [other.redis for other in busy.values()]))
                busy[worker.connection] = worker

        for folder in folders[: len(waiting)]:
            worker = Worker(folder)
            stack.callback(worker.end)
            proceed(worker)
        while busy:
            if not (ended := wait(list(busy), STUCK_SECONDS)):
                raise StackError(f"no schedule ended within {STUCK_SECONDS:.0f} s")
            for ready in ended:
                assert isinstance(ready, Connection)
                worker = busy.pop(ready)
                outcome = _received(worker)
                outcomes.append(outcome)
                keep(outcome)
                _print(outcome, len(outcomes), len(waiting), time.monotonic() - began)
                proceed(worker)


def _next(left: list[Schedule], worker: Worker, others: list[Redis | None]) -> Schedule:
    """Take the schedule that needs the fewest new servers of a worker.

    A worker that needs another kind of Redis takes the one with the most schedules per worker.
    `others` are the kinds of the busy workers.
    """
    counts = {
        redis: sum(made.redis is redis for made in left) / (1 + others.count(redis))
        for redis in Redis
    }
    made = min(
        left,
        key=lambda made: (
            made.redis is not worker.redis,
            -counts[made.redis],
            made.tokens is not worker.tokens,
            made.seed,
        ),
    )
    left.remove(made)
    return made


def _received(worker: Worker) -> Outcome:
    try:
        outcome = worker.connection.recv()
    except EOFError:
        raise StackError("a worker ended without an outcome; see its error above") from None
    if isinstance(outcome, StackError):
        raise outcome
    assert isinstance(outcome, Outcome)
    return outcome


def _print(outcome: Outcome, done: int, count: int, passed: float) -> None:
    left = passed / done * (count - done)
    head = f"[{done}/{count}, {_minutes(passed)}, {_minutes(left)} left] seed {outcome.seed}"
    verdict = "FAILED" if outcome.failure else f"passed: {outcome.result}"
    print(f"{head}, {outcome.name}, {outcome.seconds:.0f} s, {verdict}", flush=True)
    if outcome.failure:
        print(outcome.failure, flush=True)


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
