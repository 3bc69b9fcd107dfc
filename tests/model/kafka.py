"""Kafka in the model: the topic of events, and the topic of recorded reservations."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tests.model.records import PARTITIONS, Event
from tests.model.world import Steps, Unreachable, Violation, World

LOST_ACKNOWLEDGEMENTS: Final = 0.05
SLOW_BATCHES: Final = 0.03
SLOW_BATCHES_IF_AIMED: Final = 0.15
"""Share of the batches that a lagging follower keeps back for several seconds."""


@dataclass(slots=True)
class Receipt:
    """The answer to a batch, which arrives after `seconds`."""

    seconds: float
    acknowledged: bool = False


@dataclass(frozen=True, slots=True)
class News:
    """A message of the topic `recorded`: the ledger's state of a reservation, and its verdict."""

    reservation_id: str
    version: int
    state: str
    verdict: str


class Kafka:
    """The topics. Their partitions keep every event that they have acknowledged."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = True
        self.delay = 0.2 if world.chance() < 0.6 else 4.0
        """Longest usual time until a batch arrives, in seconds."""
        self.partitions: list[list[Event]] = [[] for _ in range(PARTITIONS)]
        self.received: dict[str, News] = {}
        """The newest message of each reservation, as a receiver keeps it."""
        self.announced: dict[tuple[str, int], News] = {}
        self._turn = 0

    def reached(self) -> None:
        if not self.up:
            raise Unreachable

    def send(self, batch: list[Event]) -> Receipt:
        """Sends a batch, which arrives even if its sender dies meanwhile."""
        world = self.world
        slow = SLOW_BATCHES_IF_AIMED if world.aimed else SLOW_BATCHES
        low, high = (4.0, 11.0) if world.chance() < slow else (0.01, self.delay)
        arrival = world.between(low, high)
        receipt = Receipt(arrival + world.between(0.005, 0.1))

        def arrives() -> Steps:
            if self.up:
                self.append(batch)
                receipt.acknowledged = world.chance() >= LOST_ACKNOWLEDGEMENTS
            yield from ()

        world.later(arrival, arrives())
        return receipt

    def append(self, batch: Iterable[Event]) -> None:
        """Appends a batch to the next partition, because the order of events does not matter."""
        self._turn += 1
        self.partitions[self._turn % PARTITIONS] += batch

    def ends(self) -> list[int]:
        self.reached()
        return [len(partition) for partition in self.partitions]

    def announce(self, batch: Iterable[News]) -> None:
        """Publishes recorded reservations. The receiver keeps the highest version of each.

        Raises `Violation` if one version has two contents, because then the receiver cannot tell
        which one is true.
        """
        for news in batch:
            first = self.announced.setdefault((news.reservation_id, news.version), news)
            if first != news:
                raise Violation(f"{news} and {first} have the same version")
            known = self.received.get(news.reservation_id)
            if known is None or news.version > known.version:
                self.received[news.reservation_id] = news
