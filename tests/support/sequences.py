"""Random sequences of steps, which the rules of a state machine make."""

from collections.abc import Collection
from typing import Final

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

TOGETHER: Final = 10
"""Sequences of one run of Hypothesis. After ten, it mostly repeats parts of former ones."""


def run_sequences(
    machine: type[RuleBasedStateMachine],
    count: int,
    steps: int,
    *,
    first: int = 0,
    phases: Collection[Phase] = (Phase.generate, Phase.shrink),
) -> None:
    """Run sequences of at most `steps` steps until one fails. Another `first` gives other ones."""
    each_run = settings(
        max_examples=TOGETHER,
        stateful_step_count=steps,
        phases=phases,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    for run in range(first, first + count // TOGETHER):
        run_state_machine_as_test(seed(run)(machine), settings=each_run)
