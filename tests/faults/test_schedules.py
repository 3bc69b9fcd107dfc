"""A few of the schedules of `make faults`."""

from pathlib import Path

import pytest

from dev.cluster.binaries import Binaries
from tests.faults.__main__ import WORKERS, run
from tests.faults.schedule import ON_TOP, Kind, Redis, kinds, schedule
from tests.faults.table import PAGE, PUBLISHED, Outcome, commit, keep, kept, publish, table

# Together these seeds have every kind of fault and every kind of Redis.
SEEDS = (537, 766, 911, 983, 1117, 1190, 1241, 1412)


def test_a_seed_always_gives_the_same_schedule() -> None:
    assert all(schedule(seed) == schedule(seed) for seed in range(100))
    assert schedule(1) != schedule(2)


def test_the_seeds_of_this_file_have_every_kind_of_fault() -> None:
    chosen = [schedule(seed) for seed in SEEDS]
    assert {step.kind for made in chosen for step in made.steps} == set(Kind)
    assert {made.redis for made in chosen} == set(Redis)


def test_a_thousand_seeds_combine_every_redis_with_every_fault_identity_and_hold() -> None:
    every = [schedule(seed) for seed in range(1_000)]
    for redis in Redis:
        own = [made for made in every if made.redis is redis]
        assert {step.kind for made in own for step in made.steps} == set(kinds(redis))
        assert {(made.tokens, made.hold_seconds is None) for made in own} == {
            (tokens, held) for tokens in (True, False) for held in (True, False)
        }
    assert {kind for kind in ON_TOP if kind in kinds(Redis.ONE)} == ON_TOP


def test_parts_of_a_run_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "outcomes.jsonl"
    monkeypatch.setattr("tests.faults.table.OUTCOMES", file)
    for seed in (0, 1, 5):
        outcome = Outcome.of(schedule(seed, Redis.ONE))
        outcome.result.promised, outcome.result.acknowledged = 1_000, 30
        outcome.result.outcomes = {"202": 1_000}
        if seed == 5:
            outcome.failure = "JOURNAL:\nBROKEN: a promise was broken\n  File of a machine"
        keep(outcome)
    assert kept(file)[-1].failure == "a promise was broken"
    text = table(kept(file))
    assert "| all | 3 | 1 | 2,000 | 60 | 0 | 0 | 0 | 0 s |" in text
    assert f"| {commit()} | 3 | 0 and 5 | 0.00 |" in text
    assert "`make faults N=1 FIRST=5 REDIS=one`" in text
    assert "failed at commit" not in table(kept(file)[:2])
    page, published = tmp_path / "page.md", tmp_path / "faults.jsonl"
    page.write_text("before\n<!-- schedules -->\nold\n<!-- end -->\nafter\n", "utf-8")
    monkeypatch.setattr("tests.faults.table.PAGE", page)
    monkeypatch.setattr("tests.faults.table.PUBLISHED", published)
    for _ in range(2):
        publish()
        written = page.read_text("utf-8")
        assert written == f"before\n<!-- schedules -->\n{text}\n<!-- end -->\nafter\n"
    assert kept(file) == []


def test_the_page_has_the_sum_of_the_published_outcomes() -> None:
    assert table(kept(PUBLISHED)) in PAGE.read_text("utf-8")


@pytest.mark.slow
def test_every_promise_is_kept_under_every_kind_of_fault(
    kubernetes: Binaries,  # noqa: ARG001 - builds the programs first
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.faults.table.OUTCOMES", tmp_path / "outcomes.jsonl")
    folders = [tmp_path / f"world-{worker}" for worker in range(WORKERS)]
    outcomes: list[Outcome] = []
    run(list(map(schedule, SEEDS)), folders, outcomes, keep_going=True)
    assert sorted(outcome.seed for outcome in outcomes) == list(SEEDS)
    assert [outcome.failure for outcome in outcomes if outcome.failure] == []
