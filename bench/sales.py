"""Measures the cost of an accepted request with 1, 100 and 1,000 sales at once.

`python -m bench.sales` measures only this, in three minutes, and prints the result.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from bench import figures, machine
from bench.requests import QUICK, WHOLE, Scale, in_turn
from bench.results import Round
from bench.rig import Api, Rig
from dev.paths import LOCAL
from dev.progress import ending_quietly

CROWD: Final = 400
"""Connections of the larger crowd. With 100 sales, each has four buyers at once instead of one."""


def sales(rig: Rig, scale: Scale, api: Api) -> tuple[dict[str, list[Round]], list[float]]:
    """Measure with many sales. Also returns the seconds that applying 1,000 sales takes."""
    apply_seconds = []
    many: list[str] = []
    for _ in range(min(3, scale.rounds)):
        begun = time.monotonic()
        many = rig.sales(1_000)
        apply_seconds.append(time.monotonic() - begun)
        print(f"    1,000 sales applied in {apply_seconds[-1]:.1f} s", flush=True)
    ways: dict[str, Callable[[float], Round]] = {
        _label(count): partial(rig.round, [api], many[:count]) for count in (1, 100, 1_000)
    }
    for count in (1, 100):
        label = f"{_label(count)}, {CROWD} connections"
        ways[label] = partial(rig.round, [api], many[:count], connections=CROWD)
    return in_turn(ways, scale), apply_seconds


def _label(count: int) -> str:
    return f"{count:,} sale{'s' if count > 1 else ''}"


def main() -> None:
    """Run this part of the benchmark alone."""
    parser = argparse.ArgumentParser(prog="python -m bench.sales", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run short rounds")
    scale = QUICK if parser.parse_args().quick else WHOLE
    folder, python = LOCAL / "bench", machine.python()
    shutil.rmtree(folder, ignore_errors=True)
    with Rig(folder, python) as rig:
        rig.consumer(rig.cores.rest).stop()  # creates the topic and the ledger
        found, _ = sales(rig, scale, rig.api())
    shutil.rmtree(folder)
    print(figures.of_rounds(found))


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
