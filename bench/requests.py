"""Measures the cost of a request: closed loop, open loop, more processes and more sales."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bench.results import OpenRound, Round
from bench.rig import Api, Rig

PERCENTS = (30, 50, 70, 90)
OPEN_CONNECTIONS = 400


@dataclass(frozen=True, slots=True)
class Scale:
    """The size of a run. Seconds are per round."""

    rounds: int
    seconds: float
    warm_up_seconds: float
    together_seconds: float
    calm_seconds: float
    outage_seconds: float
    away_seconds: float
    holds: int
    stocks: tuple[int, ...]


WHOLE = Scale(5, 4.0, 3.0, 20.0, 10.0, 20.0, 25.0, 100_000, (100, 100_000, 5_000_000))
QUICK = Scale(1, 1.0, 0.5, 3.0, 2.0, 2.0, 3.0, 5_000, (100, 20_000))


def closed_loop(rig: Rig, scale: Scale, api: Api) -> dict[str, list[Round]]:
    """Measure every kind of answer. The kinds alternate, so that all have the same conditions."""
    baseline = rig.baseline()
    open_sale, sold_out = rig.sales(), rig.sales(stock=1)
    ways: dict[str, Callable[[float], Round]] = {
        "accepted": partial(rig.round, [api], open_sale),
        "accepted, with keys": partial(rig.round, [api], open_sale, keys=True),
        "sold out": partial(rig.round, [api], sold_out),
        "sold out, with keys": partial(rig.round, [api], sold_out, keys=True),
        "baseline": partial(rig.round, [baseline], open_sale),
    }
    found = in_turn(ways, scale)
    baseline.stop()
    return found


def open_loop(rig: Rig, scale: Scale, api: Api, capacity: float) -> list[OpenRound]:
    """Measure at constant arrival rates below `capacity`, which is in requests per second."""
    items = rig.sales()
    found = []
    for number in range(scale.rounds):
        for percent in PERCENTS:
            rate = capacity * percent / 100
            done = rig.round([api], items, scale.seconds, connections=OPEN_CONNECTIONS, rate=rate)
            show(f"{percent} % of capacity", number, done)
            found.append(OpenRound(percent, rate, done))
    return found


def processes(rig: Rig, scale: Scale, api: Api) -> dict[str, list[Round]]:
    """Measure with a second API process, on the core of everything else."""
    another = rig.api("another", cores=rig.cores.rest)
    items = rig.sales()
    found = in_turn(
        {
            "1 process": partial(rig.round, [api], items),
            "2 processes": partial(rig.round, [api, another], items),
        },
        scale,
    )
    another.stop()
    return found


def in_turn(ways: dict[str, Callable[[float], Round]], scale: Scale) -> dict[str, list[Round]]:
    """Measure each way in each round, after a warm-up. So all have the same conditions."""
    for run in ways.values():
        run(scale.warm_up_seconds)
    found: dict[str, list[Round]] = {name: [] for name in ways}
    for number in range(scale.rounds):
        for name, run in ways.items():
            found[name].append(run(scale.seconds))
            show(name, number, found[name][-1])
    return found


def show(name: str, number: int, done: Round) -> None:
    """Print the result of a round."""
    tally = done.tally
    statuses = " ".join(f"{count:,} x {status}" for status, count in tally.statuses.items())
    print(
        f"    round {number + 1}  {name:33} {tally.rps:7,.0f}/s  P95 {tally.p95:6.1f} ms  "
        f"API {done.cpu['API']:.2f} CPU s per 10,000  {statuses}",
        flush=True,
    )
