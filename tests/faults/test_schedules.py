"""A few of the schedules of `make faults`."""

from pathlib import Path

import pytest

from dev.cluster.binaries import Binaries
from tests.faults.run import run
from tests.faults.schedule import kinds, schedule
from tests.faults.world import opened

# Together these seeds have every kind of fault.
SEEDS = (17, 205, 23, 129, 77, 254, 152)


def test_a_seed_always_gives_the_same_schedule() -> None:
    assert all(schedule(seed) == schedule(seed) for seed in range(100))
    assert schedule(1) != schedule(2)


def test_the_seeds_of_this_file_have_every_kind_of_fault() -> None:
    assert {step.kind for seed in SEEDS for step in schedule(seed).steps} == set(
        kinds(clustered=False)
    )


@pytest.mark.slow
async def test_every_promise_is_kept_under_every_kind_of_fault(
    kubernetes: Binaries,  # noqa: ARG001 - builds the programs first
    tmp_path: Path,
) -> None:
    async with opened(tmp_path / "world") as world:
        for seed in SEEDS:
            await run(world, schedule(seed))
