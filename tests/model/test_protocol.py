"""The protocol holds in every run of the model, and fails if any of its parts is left out.

`FLASHSALE_MODEL_SEEDS=100000` makes more runs, starting at seed `FLASHSALE_MODEL_FIRST_SEED`. A
failing seed prints the trace of its run. The same seed always gives the same run. Needs no server.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import chain

import pytest

from tests.model.protocol import Run, check
from tests.model.rules import ACKNOWLEDGED_WITHIN, CALL_DEADLINE, EXPIRY, SILENT, Rules
from tests.model.schedules import SCHEDULES
from tests.model.world import Violation

SEEDS = int(os.environ.get("FLASHSALE_MODEL_SEEDS", "3000"))
WITHOUT_FENCE = replace(Rules(), fence=False)
FIRST_SEED = int(os.environ.get("FLASHSALE_MODEL_FIRST_SEED", "0"))
SHARDS = 4
MORE_SEEDS = 17_000
SEARCH = 20_000
"""Number of seeds among which a run must fail if a part is left out."""

RANDOM = sorted({field.name for field in fields(Rules)} - {part for part, _ in SCHEDULES})
"""Parts whose need random runs show."""

EVERY_RUN_TOGETHER = (
    *("accepted", "replayed", "remembered", "rebuilt", "freed", "expired", "excused", "refused"),
    *("confirm 200", "confirm 202", "confirm expired", "confirm other_order"),
    *("cancel 200", "cancel 202", "cancel other_order"),
)
"""Events of which the runs have some. Runs without events would prove nothing."""

RARE = {
    "cut_off_events_refused": 1_138,
    "rebuild_guarded": 10_653,
    "seed_is_fresh": 11_730,
}
"""The first seeds that fail without parts that few runs need. A search for them takes a minute."""


@pytest.mark.parametrize("shard", range(SHARDS))
def test_nothing_is_oversold_or_lost_and_all_servers_agree(shard: int) -> None:
    seen = run_all(range(FIRST_SEED + shard, FIRST_SEED + SEEDS, SHARDS))
    if SEEDS >= 3_000:
        for count in EVERY_RUN_TOGETHER:
            assert seen[count] > 0, count


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_many_more_runs_agree(shard: int) -> None:
    first = FIRST_SEED + SEEDS
    seen = run_all(range(first + shard, first + MORE_SEEDS, SHARDS))
    assert seen["voided"] > 0


def run_all(seeds: range) -> Counter[str]:
    """Runs seeds with the whole protocol, and counts the events by name."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        seen.update(check(seed, Rules()))
    return seen


@pytest.mark.parametrize("part", RANDOM)
def test_the_protocol_fails_without_any_one_of_its_parts(part: str) -> None:
    first = RARE.get(part, 0)
    for seed in chain([first], range(SEARCH)):
        try:
            Run(seed, replace(Rules(), **{part: False})).check()
        except Violation:
            assert part not in RARE or seed == first, f"write {part}: {seed} into RARE"
            return
    pytest.fail(f"{SEARCH} runs without {part} had no violation, so the protocol does not need it")


@pytest.mark.parametrize(("part", "schedule"), SCHEDULES)
def test_a_schedule_fails_without_its_part_only(
    part: str, schedule: Callable[[Rules], None]
) -> None:
    schedule(Rules())
    with pytest.raises(Violation):
        schedule(replace(Rules(), **{part: False}))


def test_a_rebuild_waits_longer_than_a_confirmation() -> None:
    assert EXPIRY > CALL_DEADLINE + ACKNOWLEDGED_WITHIN


def test_a_rebuild_waits_until_no_pod_believes_a_replaced_primary() -> None:
    assert EXPIRY > SILENT + CALL_DEADLINE


@pytest.fixture(scope="module")
def broken_seed() -> int:
    """The first seed whose run breaks a promise without the fence."""
    for seed in range(100):
        try:
            check(seed, WITHOUT_FENCE)
        except Violation:
            return seed
    raise AssertionError("no seed needs the fence")


def test_the_same_seed_gives_the_same_run(broken_seed: int) -> None:
    traces = []
    for _ in range(2):
        run = Run(broken_seed, WITHOUT_FENCE, tracing=True)
        with pytest.raises(Violation):
            run.check()
        traces.append(run.world.trace)
    assert traces[0] == traces[1]


def test_a_violation_contains_the_trace_of_its_run(broken_seed: int) -> None:
    trace = rf"(?s)seed {broken_seed}: .*\n\n +\d+\.\d\d  \w"
    with pytest.raises(Violation, match=trace) as violation:
        check(broken_seed, WITHOUT_FENCE)
    assert "redis" in str(violation.value)
