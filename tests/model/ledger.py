"""PostgreSQL in the model. Each call is one transaction at one instant."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.model.kafka import PARTITIONS
from tests.model.world import Event, Unreachable, World


@dataclass(slots=True)
class Row:
    """A row of `sales`.

    `claimed` is the revision of the rebuild that began last. `rebuilt` is the revision of the
    rebuild that last read the ledger.
    """

    revision: int
    allocated: int
    state: str = "open"
    capacity: int = 0
    accepted: int = 0
    released: int = 0
    claimed: int = 0
    rebuilt: int = 0

    def copy(self) -> "Row":
        return Row(
            self.revision,
            self.allocated,
            self.state,
            self.capacity,
            self.accepted,
            self.released,
            self.claimed,
            self.rebuilt,
        )


class Rewound(Exception):
    """The ledger has lower offsets than the consumer."""


@dataclass(slots=True)
class Tables:
    """The data in PostgreSQL. `refused` has events that were not recorded but reported."""

    row: Row | None = None
    reservations: dict[str, Event] = field(default_factory=dict)
    refused: dict[str, Event] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=lambda: [0] * PARTITIONS)

    def copy(self) -> "Tables":
        return Tables(
            None if self.row is None else self.row.copy(),
            self.reservations.copy(),
            self.refused.copy(),
            self.offsets.copy(),
        )


class Ledger:
    """The transactions of consumer and operator, on a server that can become an older copy."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = True
        self.tables = Tables()
        self._copies: list[Tables] = []

    def reached(self) -> None:
        if not self.up:
            raise Unreachable

    def rewind(self, *, oldest: bool = False) -> None:
        """Becomes an older copy, as in a failover to a standby that lagged.

        The copy has every commit of the operators, because these are assumed to be on the standby
        (see docs/reliability.md).
        """
        if self._copies:
            keep = 0 if oldest else int(self.world.chance() * len(self._copies))
            self.tables = self._copies[keep].copy()
            del self._copies[keep + 1 :]

    def write_row(self, stock: int, state: str, above: int) -> tuple[Row, bool]:
        """Writes the manifest to the row, and returns the row and whether it was inserted."""
        row = self.tables.row
        if row is None:
            self.tables.row = Row(above + 1, stock, state, stock)
            self._committed(durable=True)
            return self.tables.row.copy(), True
        if (row.allocated, row.state) != (stock, state) or row.revision < above:
            row.allocated, row.state = stock, state
            row.revision = max(row.revision, above) + 1
            row.capacity = max(row.capacity, stock + row.released)
            self._committed(durable=self.world.rules.operator_commits_kept)
        return row.copy(), False

    def claim(self, above: int) -> int:
        """Takes the next revision for a rebuild. The ledger serves the latest rebuild only."""
        row = self.tables.row
        if row is None:
            return 0
        row.revision = row.claimed = max(row.revision, above) + 1
        self._committed(durable=True)
        return row.claimed

    def accepted(self) -> int:
        return 0 if self.tables.row is None else self.tables.row.accepted

    def recorded(self, ends: Sequence[int]) -> bool:
        """Whether every event before these offsets is recorded."""
        return all(offset >= end for offset, end in zip(self.tables.offsets, ends, strict=True))

    def read_for_rebuild(
        self, claim: int, ends: Sequence[int]
    ) -> tuple[Row, dict[str, Event]] | None:
        """Reads the whole sale and writes `rebuilt`, in one transaction.

        Returns None if another rebuild has claimed the sale since, or if the ledger was rewound.
        """
        row = self.tables.row
        if row is None:
            return None
        if self.world.rules.rebuild_guarded and (row.claimed != claim or not self.recorded(ends)):
            return None
        row.rebuilt = claim
        self._committed(durable=True)
        return row.copy(), self.tables.reservations.copy()

    def record(
        self,
        positions: Mapping[int, int],
        next_offsets: Mapping[int, int],
        events: Iterable[Event],
    ) -> None:
        """Records a batch. Raises `Rewound`."""
        offsets = self.tables.offsets
        if self.world.rules.rewound_ledger_noticed and any(
            offsets[partition] < position for partition, position in positions.items()
        ):
            raise Rewound
        batch: dict[str, Event] = {}
        for event in events:
            known = batch.get(event.reservation_id)
            if known is None or event.version > known.version:
                batch[event.reservation_id] = event
            if self.world.rules.capacity_in_events:
                row = self._row_for(event)
                row.capacity = max(row.capacity, event.capacity)
        for event in sorted(batch.values(), key=lambda event: event.occurred):
            self._record(self._row_for(event), event)
        for partition, offset in next_offsets.items():
            offsets[partition] = max(offsets[partition], offset)
        self._committed()

    def _row_for(self, event: Event) -> Row:
        if self.tables.row is None:
            self.tables.row = Row(event.revision, event.capacity, "open", event.capacity)
        return self.tables.row

    def _record(self, row: Row, event: Event) -> None:
        tables = self.tables
        known = tables.reservations.get(event.reservation_id)
        if known is not None and event.version <= known.version:
            return
        if event.reservation_id in tables.refused and not self.world.rules.refused_may_return:
            return
        late = self.world.rules.cut_off_events_refused and event.revision < row.rebuilt
        added = 0 if known is not None else event.quantity
        if late or row.accepted + added > row.capacity:
            tables.refused.setdefault(event.reservation_id, event)
            self.world.log("ledger", "refuses", event)
            return
        tables.reservations[event.reservation_id] = event
        row.accepted += added
        if event.version > 1:
            row.released += event.quantity
            if not self.world.rules.capacity_in_events:
                row.capacity = max(row.capacity, row.allocated + row.released)

    def _committed(self, *, durable: bool = False) -> None:
        if durable:
            self._copies.clear()
        self._copies.append(self.tables.copy())
