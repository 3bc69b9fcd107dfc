"""Time, processes that can be killed or suspended, and what only an onlooker knows."""

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from tests.model.rules import Rules

Steps: TypeAlias = Generator[float, None, None]
"""What a process does: each value is how long it waits, in seconds, before it goes on."""

Change: TypeAlias = tuple[str, int]
"""A change of a reservation: its id, and the version that it made (1 accepted, 2 released)."""

RISK = 0.08
"""How often a fault hits where `World.risk` says."""


class Away(Exception):
    """A server did not answer. What it was asked to do may have been done."""


class Violation(AssertionError):
    """A run broke what the protocol promises."""


@dataclass(slots=True)
class Onlooker:
    """What nobody in the system can see, and the verdict needs.

    `promised`: the changes that a buyer was told of, with the units. `lost`: those that Redis had
    and went back from. `orphaned`: those whose pod was killed or cut off before Kafka had them.
    """

    promised: dict[Change, int] = field(default_factory=dict)
    lost: set[Change] = field(default_factory=set)
    orphaned: set[Change] = field(default_factory=set)
    highest_stock: int = 0
    counts: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def excused(self, change: Change) -> bool:
        """Whether the protocol allows it to be lost: Redis and the pod lost it together."""
        return change in self.lost and change in self.orphaned


class World:
    """A clock, one random source, and what happens next."""

    def __init__(self, seed: int, rules: Rules, *, tracing: bool = False) -> None:
        self.random = random.Random(seed)
        self.chance = self.random.random
        self.rules = rules
        self.now = 0.0
        self.onlooker = Onlooker()
        self.strike: Callable[[Process | None], Steps] | None = None
        """A fault that hits a process, or any, at a moment that matters: see `risk`."""
        self.trace: list[str] | None = [] if tracing else None
        self._ids = 0
        self._agenda: list[tuple[float, int, Process, int, Steps]] = []
        self._nature = Process(self, "nature")

    def new_id(self) -> int:
        """A number that was not given before: run ids and the like."""
        self._ids += 1
        return self._ids

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.chance()

    def tell(self, who: str, what: str, *details: object) -> None:
        """Writes a line of the trace."""
        if self.trace is not None:
            text = " ".join(str(detail) for detail in details)
            self.trace.append(f"{self.now:7.2f}  {who:<10} {what} {text}".rstrip())

    def schedule(self, delay: float, process: "Process", steps: Steps) -> None:
        entry = (self.now + delay, self.new_id(), process, process.generation, steps)
        heapq.heappush(self._agenda, entry)

    def later(self, delay: float, steps: Steps) -> None:
        """What happens by itself: faults, servers that come back, the buyers."""
        self.schedule(delay, self._nature, steps)

    def risk(self, process: "Process | None" = None, chance: float = RISK) -> None:
        """Marks a moment between two steps at which a fault should not be rare."""
        if self.strike is not None and self.chance() < chance:
            self.later(0.0, self.strike(process))

    def run(self, until: float, done: Callable[[], bool] | None = None) -> bool:
        """Lets time pass; ends early, and returns True, when `done` says so (asked each second)."""
        asked = self.now
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, process, generation, steps = heapq.heappop(self._agenda)
            process.step(generation, steps)
            if done is not None and self.now >= asked + 1:
                asked = self.now
                if done():
                    return True
        self.now = max(self.now, until)
        return False


class Process:
    """Something that can be killed (what it knew is gone) or suspended (time passes it by)."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.generation = 0
        self.suspended = False
        self._frozen: list[Steps] = []

    def spawn(self, steps: Steps, delay: float = 0.0) -> None:
        self.world.schedule(delay, self, steps)

    def step(self, generation: int, steps: Steps) -> None:
        """Goes on with `steps`, unless the process that began them was killed."""
        if generation != self.generation:
            return
        if self.suspended:
            self._frozen.append(steps)
            return
        for delay in steps:
            self.world.schedule(delay, self, steps)
            return

    def crash(self, seconds: float) -> None:
        """Kills the process; a new one begins with nothing after a while."""
        self.world.tell(self.name, "is killed, back in", f"{seconds:.1f} s")
        self.generation += 1
        self.suspended, self._frozen = False, []
        self.forget()
        self.spawn(self._begin(), seconds)

    def suspend(self, seconds: float) -> None:
        """Stops the process as it is: its memory and its connections stay."""
        if self.suspended:
            return
        self.world.tell(self.name, "is suspended for", f"{seconds:.1f} s")
        self.suspended = True
        self.world.later(seconds, self._resumption(self.generation))

    def resume(self) -> None:
        if self.suspended:
            self.world.tell(self.name, "goes on")
            self.suspended = False
            frozen, self._frozen = self._frozen, []
            for steps in frozen:
                self.spawn(steps)

    def begin(self) -> None:
        """Starts what the process does."""

    def forget(self) -> None:
        """Empties its memory."""

    def _begin(self) -> Steps:
        self.begin()
        yield from ()

    def _resumption(self, generation: int) -> Steps:
        if generation == self.generation:
            self.resume()
        yield from ()


def changes_of(events: Iterable["Event"]) -> set[Change]:
    """The changes that events tell of: what was released had been accepted."""
    changes = {(event.reservation_id, event.version) for event in events}
    return changes | {(reservation_id, 1) for reservation_id, _ in changes}


@dataclass(frozen=True, slots=True)
class Event:
    """events.py: a reservation's whole state and a snapshot of its sale."""

    reservation_id: str
    user: str
    quantity: int
    version: int
    occurred: float
    capacity: int
    revision: int
