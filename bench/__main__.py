"""`python -m bench`: measure the speed and the cost of the engine on real servers."""

import argparse
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

from bench import (
    backlogs,
    bounds,
    cluster,
    holds,
    machine,
    outages,
    page,
    recording,
    requests,
    sales,
    scripts,
)
from bench.results import Findings
from bench.rig import Rig
from dev.paths import LOCAL, ROOT
from dev.progress import ending_quietly

DOCS: Final = ROOT / "docs"


def main() -> int:
    """Run the benchmark. Missed goals do not change the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run one short round of each measurement, about two minutes in all",
    )
    parser.add_argument(
        "--write", action="store_true", help="write the figures into docs/performance.md"
    )
    parser.add_argument(
        "--background",
        metavar="TEXT",
        default="nothing",
        help="other load on the machine during the run, for the page (default: nothing)",
    )
    arguments = parser.parse_args()
    if sys.platform != "linux":
        print("the benchmark needs Linux, because it pins processes to cores", file=sys.stderr)
        return 1
    command = "python -m bench" + (" --quick" if arguments.quick else "")
    folder = LOCAL / "bench"
    shutil.rmtree(folder, ignore_errors=True)
    scale = requests.QUICK if arguments.quick else requests.WHOLE
    findings = run(scale, folder, command, arguments.background)
    shutil.rmtree(folder, ignore_errors=True)
    print("\n" + page.summary(findings))
    if arguments.write:
        page.write(findings, DOCS)
        print(f"Wrote {DOCS / 'performance.md'}, its charts and performance.json.")
    return 0


def run(scale: requests.Scale, folder: Path, command: str, background: str) -> Findings:
    """Run every measurement in turn, and print a line per round."""
    begun, when = time.monotonic(), f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    background = f"{background} (load average {machine.load_average()} before the start)"
    python = machine.python()
    described = machine.describe(python)
    for name, description in described.items():
        print(f"  {name:11} {description}")
    print("Starting Redis, Kafka and PostgreSQL …", flush=True)
    with Rig(folder, python) as rig:
        # The consumer creates the topic and the ledger.
        rig.consumer(rig.cores.rest).stop()
        api = rig.api()
        # The rounds that are compared come first. Later ones fill Redis, which then rewrites its
        # file in the background.
        _say("POST /reserve: one API process on one core, 100 connections")
        reserve = requests.closed_loop(rig, scale, api)
        run_as = f"{when}, commit {described['commit']}, {background}"
        _say("The bounds on clients: with and without them")
        bounded = bounds.compare(rig, scale, api, run_as)
        parts = rig.parts()
        capacity = median(done.tally.rps for done in reserve["accepted"])
        _say(f"Constant arrival rates (capacity {capacity:,.0f}/s)")
        open_loop = requests.open_loop(rig, scale, api, capacity)
        _say("Redis alone")
        calls = scripts.scripts(rig, scale)
        _say("From accepted to recorded")
        drains = recording.drains(rig, scale)
        together = recording.together(rig, scale, api, capacity)
        _say("Outages of PostgreSQL and of Kafka")
        half = backlogs.capacity(rig, scale, api) / 2
        away = outages.outages(rig, scale, api, half)
        _say("Backlogs after an outage, in a rebuild and in an expiry")
        worked_off = backlogs.backlogs(rig, scale, api, half, run_as)
        _say("Holds: accepted, confirmed and expired")
        held = holds.holds(rig, scale, api, capacity, run_as)
        _say("Growth of processes, sales and stock")
        processes = requests.processes(rig, scale, api)
        many, apply_seconds = sales.sales(rig, scale, api)
        memory = scripts.memory(rig, scale, api)
    _say("One node of Redis and a cluster of three")
    nodes = cluster.cluster(scale, folder, python, run_as)
    return Findings(
        command=command,
        when=when,
        minutes=(time.monotonic() - begun) / 60,
        rounds=scale.rounds,
        seconds=scale.seconds,
        warm_up_seconds=scale.warm_up_seconds,
        background=background,
        machine=described,
        reserve=reserve,
        bounds=bounded,
        parts=parts,
        open_loop=open_loop,
        scripts=calls,
        drains=drains,
        together=together,
        outages=away,
        backlogs=worked_off,
        holds=held,
        processes=processes,
        memory=memory,
        sales=many,
        apply_seconds=apply_seconds,
        cluster=nodes,
    )


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
