"""Consumers in the model, as sequences of steps."""

from collections.abc import Iterable

from tests.model.ledger import Rewound
from tests.model.pods import Servers
from tests.model.records import Event
from tests.model.world import Process, Steps, Unreachable, World


class Consumer(Process):
    """flashsale_consumer: worker.py. Records events, and then announces what is recorded.

    The consumer starts at the announced offsets. An event that is recorded already is announced
    again.
    """

    BATCH = 6
    CHECK_SECONDS = 5.0

    def __init__(self, world: World, name: str, servers: Servers) -> None:
        super().__init__(world, name)
        self.servers = servers
        self.assigned: frozenset[int] = frozenset()
        self.forget()

    def begin(self) -> None:
        self.spawn(self._run())

    def forget(self) -> None:
        self.positions: dict[int, int] = {}
        self.announced: dict[int, int] = {}

    def assign(self, partitions: Iterable[int]) -> None:
        """Assigns partitions, as a rebalance does. A transaction in progress continues."""
        self.assigned = frozenset(partitions)
        self.forget()

    def _run(self) -> Steps:
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
                    if self.announced:
                        ledger.announced(self.announced)
                        self.announced = {}
                    if world.now - checked > self.CHECK_SECONDS:
                        self.positions = {}
                    continue
                yield world.between(0.01, 0.2)
                ledger.reached()
                ledger.record(positions, offsets_after, batch)
                news = ledger.news({event.reservation_id for event in batch})
                world.risk(self)
                positions.update(offsets_after)
                checked = world.now
                yield world.between(0.005, 0.3)
                kafka.reached()
                kafka.announce(news)
                if positions is self.positions:
                    self.announced = offsets_after
            except (Unreachable, Rewound):
                self.positions = {}

    def _seek(self) -> None:
        """Reads on from the ledger's offsets."""
        tables = self.servers.ledger.tables
        kept = self.world.rules.announced_is_kept
        offsets = tables.announced if kept else tables.offsets
        self.positions = {number: offsets[number] for number in self.assigned}
        self.announced = {}
