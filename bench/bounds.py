"""Compares the API with and without its bounds on clients.

`python -m bench.bounds` measures only this, and prints the result.
"""

import argparse
import shutil
import sys
from datetime import UTC, datetime

import msgspec

from bench import figures, machine
from bench.requests import QUICK, WHOLE, Scale, show
from bench.results import Bounds
from bench.rig import Api, Rig
from dev.paths import LOCAL
from dev.progress import ending_quietly


def compare(rig: Rig, scale: Scale, api: Api, run: str) -> Bounds:
    """Measure the API with and without its bounds on clients, in many short rounds in turn.

    The first of a pair alternates too, so that a slower machine does not favour one.
    """
    unbounded, items = rig.unbounded(), rig.sales()
    found = Bounds(run, {}, {})
    ways = [(api, found.shipped, "with bounds"), (unbounded, found.unbounded, "without bounds")]
    for each, _, _ in ways:
        rig.round([each], items, scale.warm_up_seconds)
    for number in range(2 * scale.rounds):
        for answer, keys in (("accepted", False), ("accepted, with keys", True)):
            for each, rounds, name in ways if number % 2 else reversed(ways):
                done = rig.round([each], items, scale.seconds / 2, keys=keys)
                rounds.setdefault(answer, []).append(done)
                show(f"{answer}, {name}", number, done)
    unbounded.stop()
    return found


def main() -> None:
    """Run this part of the benchmark alone."""
    parser = argparse.ArgumentParser(prog="python -m bench.bounds", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run two short rounds")
    scale = QUICK if parser.parse_args().quick else WHOLE
    folder, python = LOCAL / "bench", machine.python()
    shutil.rmtree(folder, ignore_errors=True)
    commit = machine.describe(python)["commit"]
    run = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {commit}"
    with Rig(folder, python) as rig:
        rig.consumer(rig.cores.rest).stop()  # creates the topic and the ledger
        found = compare(rig, scale, rig.api(), run)
    shutil.rmtree(folder)
    print(msgspec.json.encode(found).decode())
    print(figures.bounds(found))


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
