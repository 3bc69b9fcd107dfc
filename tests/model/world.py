"""Simulated time, processes that can be killed or suspended, and the oracle of the verdict."""

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeAlias

from tests.model.rules import Rules

Steps: TypeAlias = Generator[float, None, None]
"""The steps of a process. Each yielded value is a wait in seconds before the next step."""

RISK = 0.08
"""Probability that a fault strikes at a call of `World.risk`."""


class Unreachable(Exception):
    """A server did not reply. It may have executed the call."""


class Violation(AssertionError):
    """A run broke a promise of the protocol."""


@dataclass(slots=True)
class Oracle:
    """Knowledge that no process has, and that the verdict needs.

    - `promised` has the units of each reservation that a buyer was answered 202 for.
    - `lost` has the reservations that Redis accepted and lost.
    - `orphaned` has the reservations whose pod was killed or disconnected before Kafka had them.
    - `confirmed` has the order of each reservation whose confirmation was answered 200.
    - `cancelled` has the time of the first 200 for a cancellation of each reservation.
    - `named` has the order references of all cancellations that were asked for.
    - `asked` counts the requests for each reservation.
    - `denied` has the reservations that a buyer was finally refused.
    """

    promised: dict[str, int] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    orphaned: set[str] = field(default_factory=set)
    confirmed: dict[str, str] = field(default_factory=dict)
    cancelled: dict[str, float] = field(default_factory=dict)
    named: set[tuple[str, str]] = field(default_factory=set)
    asked: Counter[str] = field(default_factory=Counter)
    denied: set[str] = field(default_factory=set)
    highest_stock: int = 0
    counts: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def excused(self, reservation_id: str) -> bool:
        """Whether the protocol allows the loss of a reservation: Redis and the pod both lost it."""
        return reservation_id in self.lost and reservation_id in self.orphaned


class World:
    """The clock, the only source of randomness, and the agenda."""

    def __init__(self, seed: int, rules: Rules, *, tracing: bool = False) -> None:
        self.random = random.Random(seed)
        self.chance = self.random.random
        self.rules = rules
        self.now = 0.0
        self.oracle = Oracle()
        self.aimed = False
        """Whether the faults of this run are aimed at changes of reservations."""
        self.strike: Callable[[Process | None], Steps] | None = None
        """Makes a fault at a critical moment, in the given process or in any. See `risk`."""
        self.trace: list[str] | None = [] if tracing else None
        self._ids = 0
        self._agenda: list[tuple[float, int, Process, int, Steps]] = []
        self._nature = Process(self, "nature")

    def new_id(self) -> int:
        """Returns a new number, for run ids and similar."""
        self._ids += 1
        return self._ids

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.chance()

    def log(self, name: str, message: str, *details: object) -> None:
        """Adds a line to the trace, if there is one."""
        if self.trace is not None:
            text = " ".join(str(detail) for detail in details)
            self.trace.append(f"{self.now:7.2f}  {name:<10} {message} {text}".rstrip())

    def schedule(self, delay: float, process: "Process", steps: Steps) -> None:
        entry = (self.now + delay, self.new_id(), process, process.generation, steps)
        heapq.heappush(self._agenda, entry)

    def later(self, delay: float, steps: Steps) -> None:
        """Schedules steps that belong to no process: faults, recoveries and buyers."""
        self.schedule(delay, self._nature, steps)

    def risk(self, process: "Process | None" = None, chance: float = RISK) -> None:
        """Marks a critical moment between two steps, at which faults are more likely."""
        if self.strike is not None and self.chance() < chance:
            self.later(0.0, self.strike(process))

    def run(self, until: float, done: Callable[[], bool] | None = None) -> bool:
        """Runs the agenda. Stops early and returns True if `done` holds, checked every second."""
        checked = self.now
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, process, generation, steps = heapq.heappop(self._agenda)
            process.step(generation, steps)
            if done is not None and self.now >= checked + 1:
                checked = self.now
                if done():
                    return True
        self.now = max(self.now, until)
        return False


class Process:
    """A process. A crash erases its memory, and a suspension keeps its memory but stops it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.generation = 0
        self.suspended = False
        self._frozen: list[Steps] = []

    def spawn(self, steps: Steps, delay: float = 0.0) -> None:
        self.world.schedule(delay, self, steps)

    def step(self, generation: int, steps: Steps) -> None:
        """Continues `steps`, unless the process was killed since they began."""
        if generation != self.generation:
            return
        if self.suspended:
            self._frozen.append(steps)
            return
        for delay in steps:
            self.world.schedule(delay, self, steps)
            return

    def crash(self, seconds: float) -> None:
        """Kills the process. It starts again with an empty memory after `seconds`."""
        self.world.log(self.name, "is killed and restarts in", f"{seconds:.1f} s")
        self.generation += 1
        self.suspended, self._frozen = False, []
        self.forget()
        self.spawn(self._begin(), seconds)

    def suspend(self, seconds: float) -> None:
        """Stops the process for `seconds`. Its memory and its connections stay."""
        if self.suspended:
            return
        self.world.log(self.name, "is suspended for", f"{seconds:.1f} s")
        self.suspended = True
        self.world.later(seconds, self._resumption(self.generation))

    def resume(self) -> None:
        if self.suspended:
            self.world.log(self.name, "resumes")
            self.suspended = False
            frozen, self._frozen = self._frozen, []
            for steps in frozen:
                self.spawn(steps)

    def begin(self) -> None:
        """Starts the steps of the process."""

    def forget(self) -> None:
        """Erases the memory of the process."""

    def _begin(self) -> Steps:
        self.begin()
        yield from ()

    def _resumption(self, generation: int) -> Steps:
        if generation == self.generation:
            self.resume()
        yield from ()
