"""Consumers in the model, as a sequence of steps."""

from collections.abc import Iterable

from tests.model.ledger import Rewound
from tests.model.pods import Servers
from tests.model.world import Event, Process, Steps, Unreachable, World


class Consumer(Process):
    """flashsale_consumer: worker.py."""

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

    def assign(self, partitions: Iterable[int]) -> None:
        """Assigns partitions, as a rebalance does. A transaction in progress continues."""
        self.assigned = frozenset(partitions)
        self.positions = {}

    def _run(self) -> Steps:
        world, ledger, kafka = self.world, self.servers.ledger, self.servers.kafka
        checked = world.now
        while True:
            yield world.between(0.3, 0.7)
            try:
                kafka.reached()
                ledger.reached()
                if not self.positions:  # begin at the ledger's offsets
                    offsets = ledger.tables.offsets
                    self.positions = {number: offsets[number] for number in self.assigned}
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
                    if world.now - checked > self.CHECK_SECONDS:
                        self.positions = {}
                    continue
                yield world.between(0.01, 0.2)
                ledger.reached()
                ledger.record(positions, offsets_after, batch)
                positions.update(offsets_after)
                checked = world.now
            except (Unreachable, Rewound):
                self.positions = {}
