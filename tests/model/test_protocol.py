"""The protocol holds in every run of the model, and fails if any of its parts is left out.

`FLASHSALE_MODEL_SEEDS=100000` makes more runs, starting at seed `FLASHSALE_MODEL_FIRST_SEED`. A
failing seed prints the trace of its run. The same seed always gives the same run. Needs no server.
"""

import os
from collections import Counter
from dataclasses import fields, replace
from itertools import chain

import pytest

from tests.model.protocol import Run, check
from tests.model.rules import Rules
from tests.model.schedules import SCHEDULES
from tests.model.world import Violation

SEEDS = int(os.environ.get("FLASHSALE_MODEL_SEEDS", "10000"))
FIRST_SEED = int(os.environ.get("FLASHSALE_MODEL_FIRST_SEED", "0"))
SHARDS = 10
SEARCH = 20_000
"""Number of seeds among which a run must fail if a part is left out."""

SEEN = {
    "cut_off_events_refused": 159,
    "fence_on_replication_id": 203,
    "late_answers_ignored": 1263,
    "rebuild_guarded": 333,
    "refused_may_return": 4307,
    "release_when_acknowledged": 265,
    "rewound_ledger_noticed": 204,
    "seed_is_fresh": 1754,
    "settle_matches": 3055,
}
"""Seeds that failed before and are tried first. If they pass, the search tries all others."""


@pytest.mark.parametrize("shard", range(SHARDS))
def test_nothing_is_oversold_or_lost_and_all_servers_agree(shard: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(FIRST_SEED + shard, FIRST_SEED + SEEDS, SHARDS):
        seen.update(check(seed, Rules()))
    if SEEDS >= 10_000:  # runs without events would prove nothing
        for count in ("accepted", "replayed", "released", "rebuilt", "excused"):
            assert seen[count] > 0, count


@pytest.mark.parametrize("part", sorted({field.name for field in fields(Rules)} - {*SCHEDULES}))
def test_the_protocol_fails_without_any_one_of_its_parts(part: str) -> None:
    rules = replace(Rules(), **{part: False})
    for seed in chain([SEEN.get(part, 0)], range(SEARCH)):
        try:
            Run(seed, rules).check()
        except Violation:
            return
    pytest.fail(f"{SEARCH} runs without {part} had no violation, so the protocol does not need it")


@pytest.mark.parametrize("part", SCHEDULES)
def test_a_schedule_fails_without_its_part_only(part: str) -> None:
    schedule = SCHEDULES[part]
    schedule(Rules())
    with pytest.raises(Violation):
        schedule(replace(Rules(), **{part: False}))


def test_the_same_seed_gives_the_same_run() -> None:
    rules = replace(Rules(), fence=False)
    traces = []
    for _ in range(2):
        run = Run(2, rules, tracing=True)
        with pytest.raises(Violation):
            run.check()
        traces.append(run.world.trace)
    assert traces[0] == traces[1]


def test_a_violation_contains_the_trace_of_its_run() -> None:
    with pytest.raises(Violation, match=r"(?s)seed 2: .*\n\n +\d+\.\d\d  \w") as violation:
        check(2, replace(Rules(), fence=False))
    assert "redis" in str(violation.value)
