"""Kafka's topic in the model: partitions with duplicates and without a common order."""

from collections.abc import Iterable

from tests.model.world import Event, Unreachable, World

PARTITIONS = 3


class Kafka:
    """The topic. Its partitions keep every event that they have acknowledged."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = True
        self.delay = 0.2 if world.chance() < 0.6 else 4.0
        """Longest time until a batch arrives, in seconds."""
        self.partitions: list[list[Event]] = [[] for _ in range(PARTITIONS)]
        self._turn = 0

    def reached(self) -> None:
        if not self.up:
            raise Unreachable

    def append(self, batch: Iterable[Event]) -> None:
        """Appends a batch to the next partition, because the order of events does not matter."""
        self._turn += 1
        self.partitions[self._turn % PARTITIONS] += batch

    def ends(self) -> list[int]:
        self.reached()
        return [len(partition) for partition in self.partitions]
