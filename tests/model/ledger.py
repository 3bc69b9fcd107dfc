"""PostgreSQL in the model: the transactions of consumers and operators."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from tests.model.kafka import News
from tests.model.records import HELD, NOTHING, Event, Progress, Row, Tables
from tests.model.world import Unreachable, World


class Rewound(Exception):
    """The ledger has lower offsets than the consumer."""


class Ledger:
    """The server, which can become an older copy. Each transaction happens at one instant."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = True
        self.tables = Tables()
        self._copies: list[Tables] = []

    # The server.

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

    def _committed(self, *, durable: bool = False) -> None:
        if durable:
            self._copies.clear()
        self._copies.append(self.tables.copy())

    # The operators' transactions: reconciler.py and rebuild.py.

    def write_row(self, stock: int, state: str, hold: float | None, above: int) -> tuple[Row, bool]:
        """Writes the manifest to the row, and returns the row and whether it was inserted."""
        row = self.tables.row
        if row is None:
            self.tables.row = Row(above + 1, stock, state, hold, capacity=stock)
            self._committed(durable=True)
            return self.tables.row.copy(), True
        if (row.allocated, row.state, row.hold) != (stock, state, hold) or row.revision < above:
            row.allocated, row.state, row.hold = stock, state, hold
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

    def progress(self) -> Progress:
        row = self.tables.row
        if row is None:
            return NOTHING
        return Progress(row.accepted, row.accepted - row.held, row.rebuilt)

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

    # The consumers' transactions: recorder.py.

    def record(
        self,
        positions: Mapping[int, int],
        next_offsets: Mapping[int, int],
        events: Sequence[Event],
        announced: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """Records a batch, and stores the offsets. Raises `Rewound`."""
        offsets, rules = self.tables.offsets, self.world.rules
        self._lock(positions)
        self._move_announced(announced)
        if rules.capacity_in_events:
            for event in events:
                row = self._row_for(event)
                row.capacity = max(row.capacity, event.capacity)
        if rules.void_before_fold:
            events = [event for event in events if not self._drops(event)]
            events = _fold(events)
        else:
            events = [event for event in _fold(events) if not self._drops(event)]
        for event in sorted(events, key=lambda event: event.occurred):
            self._record(self._row_for(event), event)
        for partition, offset in next_offsets.items():
            offsets[partition] = max(offsets[partition], offset)
        self._committed()

    def _row_for(self, event: Event) -> Row:
        if self.tables.row is None:
            self.tables.row = Row(event.revision, event.capacity, capacity=event.capacity)
        return self.tables.row

    def _drops(self, event: Event) -> bool:
        """Drops an event that the sale's last rebuild did not see. Returns whether it did."""
        rules, row = self.world.rules, self._row_for(event)
        if event.revision >= row.rebuilt or not rules.cut_off_events_refused:
            return False
        known = self.tables.reservations.get(event.reservation_id)
        if known is None:
            self._refuse(event)
        elif event.version > known.version:
            if not rules.void_changes_dropped:
                return False
            self.world.oracle.counts["voided"] += 1
            self.world.log("ledger", "voids", event)
        return True

    def _refuse(self, event: Event) -> None:
        known = self.tables.refused.setdefault(event.reservation_id, event)
        if known is event:
            self.world.oracle.counts["refused"] += 1
            self.world.log("ledger", "refuses", event)
        elif event.version > known.version and self.world.rules.refused_versions_grow:
            self.tables.refused[event.reservation_id] = event

    def _record(self, row: Row, event: Event) -> None:
        tables, rules = self.tables, self.world.rules
        known = tables.reservations.get(event.reservation_id)
        if known is not None and event.version <= known.version:
            return
        refused = tables.refused.get(event.reservation_id)
        if refused is not None and (
            event.version < refused.version or not rules.refused_may_return
        ):
            return
        added = event.quantity if known is None else 0
        if row.accepted + added > row.capacity:
            if not (event.final and rules.ends_recorded):
                self._refuse(event)
                return
            row.capacity = row.accepted + added
        tables.reservations[event.reservation_id] = event
        tables.refused.pop(event.reservation_id, None)
        row.accepted += added
        row.held += _held(event) - _held(known)
        was_final = known is not None and known.final
        if not rules.counted_by_difference:
            was_final = known is None
        if event.final and not was_final:
            row.released += event.quantity
            if not rules.capacity_in_events:
                row.capacity = max(row.capacity, row.allocated + row.released)

    def news(self, reservation_ids: Iterable[str]) -> list[News]:
        """Returns the ledger's state of reservations, to be announced."""
        found = []
        for known in sorted(reservation_ids):
            verdict = "recorded" if known in self.tables.reservations else "refused"
            event = self.tables.reservations.get(known) or self.tables.refused.get(known)
            if event is not None:
                found.append(News(known, event.version, event.state, verdict))
        return found

    def announced(self, positions: Mapping[int, int], offsets: Mapping[int, int]) -> None:
        """Stores that everything before these offsets is announced. Raises `Rewound`."""
        if any(offset > self.tables.announced[number] for number, offset in offsets.items()):
            self._lock(positions)
            self._move_announced(offsets)
            self._committed()

    def _lock(self, positions: Mapping[int, int]) -> None:
        if self.world.rules.rewound_ledger_noticed and any(
            self.tables.offsets[number] < position for number, position in positions.items()
        ):
            raise Rewound

    def _move_announced(self, offsets: Mapping[int, int]) -> None:
        tables = self.tables
        for number, offset in offsets.items():
            at = min(offset, tables.offsets[number])
            tables.announced[number] = max(tables.announced[number], at)


def _fold(events: Iterable[Event]) -> list[Event]:
    """Keeps one event per reservation, the one with the highest version."""
    latest: dict[str, Event] = {}
    for event in events:
        known = latest.setdefault(event.reservation_id, event)
        if event.version > known.version:
            latest[event.reservation_id] = event
    return list(latest.values())


def _held(event: Event | None) -> int:
    return event.quantity if event is not None and event.state == HELD else 0
