"""Consumers in the model, as sequences of steps."""

from collections.abc import Iterable

from tests.model.ledger import Rewound
from tests.model.pods import Servers
from tests.model.records import Event
from tests.model.world import Process, Steps, Unreachable, World


class Consumer(Process):
    """flashsale_consumer: worker.py records events, and announcer.py announces what is recorded.

    The announcing reads the events again, behind the recording. It starts at the announced offsets.
    """

    BATCH = 6
    CHECK_SECONDS = 5.0

    def __init__(self, world: World, name: str, servers: Servers) -> None:
        super().__init__(world, name)
        self.servers = servers
        self.assigned: frozenset[int] = frozenset()
        self.forget()

    def begin(self) -> None:
        self.spawn(self._record())
        self.spawn(self._announce())

    def forget(self) -> None:
        self.positions: dict[int, int] = {}
        self.announced: dict[int, int] = {}

    def assign(self, partitions: Iterable[int]) -> None:
        """Assigns partitions, as a rebalance does. A transaction in progress continues."""
        self.assigned = frozenset(partitions)
        self.forget()

    def _record(self) -> Steps:
        world, ledger, kafka = self.world, self.servers.ledger, self.servers.kafka
        checked = world.now
        while True:
            yield world.between(0.3, 0.7)
            try:
                kafka.reached()
                ledger.reached()
                if not self.positions:
                    self._seek()
                    checked = world.now
                positions = self.positions
                batch: list[Event] = []
                offsets_after = dict(positions)
                for number in sorted(positions):
                    at = positions[number]
                    page = kafka.partitions[number][at : at + self.BATCH]
                    batch += page
                    offsets_after[number] = at + len(page)
                if not batch:
                    ledger.announced(positions, self.announced)
                    if world.now - checked > self.CHECK_SECONDS:
                        self.forget()
                    continue
                announced = self.announced
                yield world.between(0.01, 0.2)
                ledger.reached()
                ledger.record(positions, offsets_after, batch, announced)
                world.risk(self)
                positions.update(offsets_after)
                checked = world.now
            except (Unreachable, Rewound):
                self.forget()

    def _announce(self) -> Steps:
        world, ledger, kafka = self.world, self.servers.ledger, self.servers.kafka
        while True:
            yield world.between(0.3, 0.7)
            try:
                announced = self.announced
                offsets_after = dict(announced)
                batch: list[Event] = []
                for number in sorted(announced):
                    at, end = announced[number], self.positions[number]
                    page = kafka.partitions[number][at : min(at + self.BATCH, end)]
                    batch += page
                    offsets_after[number] = at + len(page)
                if not batch:
                    continue
                kafka.reached()
                ledger.reached()
                news = ledger.news({event.reservation_id for event in batch})
                world.risk(self)
                yield world.between(0.005, 0.3)
                kafka.reached()
                kafka.announce(news)
                announced.update(offsets_after)
            except Unreachable:
                continue

    def _seek(self) -> None:
        """Continues at the ledger's offsets."""
        tables = self.servers.ledger.tables
        kept = self.world.rules.announced_is_kept
        announced = tables.announced if kept else tables.offsets
        self.positions = {number: tables.offsets[number] for number in self.assigned}
        self.announced = {number: announced[number] for number in self.assigned}
