"""Redis, Kafka and PostgreSQL as the protocol sees them: each call happens at one instant."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tests.model.world import Away, Event, Violation, World, changes_of

MAX_PER_USER = 2
PARTITIONS = 3
LOST_REPLIES = 0.02
"""Of the calls that were executed, those whose answer does not come."""


class Request(NamedTuple):
    """inventory.Request."""

    reservation_id: str
    user: str
    quantity: int


class Answer(NamedTuple):
    """One answer of `reserve`: with the outbox entry and the event where it accepted, with what
    is known of the reservation where it was a replay.
    """

    outcome: str
    entry: int = 0
    event: Event | None = None


class Heartbeat(NamedTuple):
    """heartbeat.py."""

    held: int
    sampled: float
    expires: float


class Rebuilding(NamedTuple):
    """The mark of a rebuild that is under way: whose, on which server, and how long it is heard."""

    claim: int
    stamp: tuple[int, int]
    until: float


NOBODY = (0, 0)
"""The stamp of a sale that no server trusts."""


@dataclass(slots=True)
class SaleHash:
    """The sale's hash. `stamp` says under which server it may be trusted."""

    stamp: tuple[int, int]
    revision: int
    state: str
    allocated: int
    accepted: int = 0
    released: int = 0
    rebuilding: Rebuilding | None = None

    def copy(self) -> "SaleHash":
        # Ten times as fast as dataclasses.replace, and a quarter of a run was spent there.
        return SaleHash(
            self.stamp,
            self.revision,
            self.state,
            self.allocated,
            self.accepted,
            self.released,
            self.rebuilding,
        )


@dataclass(slots=True)
class Keys:
    """All that Redis stores."""

    sale: SaleHash | None = None
    buyers: dict[str, int] = field(default_factory=dict)
    reservations: dict[str, Event] = field(default_factory=dict)
    outbox: dict[int, tuple[Event, float]] = field(default_factory=dict)
    heartbeats: dict[str, Heartbeat] = field(default_factory=dict)
    last_entry: int = 0

    def copy(self) -> "Keys":
        return Keys(
            None if self.sale is None else self.sale.copy(),
            self.buyers.copy(),
            self.reservations.copy(),
            self.outbox.copy(),
            self.heartbeats.copy(),
            self.last_entry,
        )


class Redis:
    """The scripts of src/flashsale/lua, and a server that can lose what it has written."""

    def __init__(self, world: World, *, always: bool) -> None:
        self.world = world
        self.always = always
        """appendfsync always: a crash loses nothing. Else what was written in the last second."""
        self.up = True
        self.keys = Keys()
        self.run_id = world.new_id()
        self.replication_id = world.new_id()
        self._copies: list[tuple[float, Keys]] = [(0.0, Keys())]

    # The server.

    @property
    def stamp(self) -> tuple[int, int]:
        """What a sale must have been written under."""
        by_replication = self.world.rules.fence_on_replication_id
        return (self.run_id, self.replication_id if by_replication else 0)

    def reached(self) -> None:
        """Raises `Away` before anything was done."""
        if not self.up:
            raise Away

    def replied(self, *, stamp: tuple[int, int] | None = None) -> None:
        """Raises `Away` after it was done, when the answer is lost."""
        if not self.up or self.world.chance() < LOST_REPLIES:
            raise Away
        if stamp is not None and stamp != self.stamp and self.world.chance() < 0.5:
            raise Away

    def become(self, keys: Keys, *, restarted: bool = True) -> None:
        """Goes back to another state, as another run of the server or as the same one."""
        gone = changes_of(self.keys.reservations.values())
        gone -= changes_of(keys.reservations.values())
        self.world.onlooker.lost |= gone
        self.world.tell("redis", "loses", *sorted(gone))
        self.keys = keys.copy()
        self.replication_id = self.world.new_id()
        if restarted:
            self.run_id = self.world.new_id()
        self._copies.append((self.world.now, self.keys.copy()))

    def copy_of(self, seconds: float) -> Keys:
        """The state at some moment of the last seconds."""
        since = self.world.now - seconds
        young = [keys for at, keys in self._copies if at >= since]
        # The one before them was the state when that time began.
        choice = self._copies[-len(young) - 1 :] or self._copies
        return choice[int(self.world.chance() * len(choice))][1]

    def _wrote(self) -> None:
        sale = self.keys.sale
        if sale is not None and sale.accepted - sale.released > sale.allocated:
            raise Violation(f"Redis: {sale} has more in buyers' hands than allocated")
        self._copies.append((self.world.now, self.keys.copy()))

    # What every script does first: sale.lua.

    def fenced(self) -> bool:
        sale = self.keys.sale
        return self.world.rules.fence and sale is not None and sale.stamp != self.stamp

    # The API's scripts.

    def reserve(self, batch: Sequence[Request]) -> list[Answer]:
        """reserve.lua."""
        sale, keys = self.keys.sale, self.keys
        if sale is None or self.fenced():
            return [Answer("unknown" if sale is None else "fenced")] * len(batch)
        answers = []
        for reservation_id, user, quantity in batch:
            known = keys.reservations.get(reservation_id)
            held = keys.buyers.get(user, 0)
            available = sale.allocated - sale.accepted + sale.released
            if known is not None:
                same = known.quantity == quantity
                answers.append(Answer("replayed", 0, known) if same else Answer("key_reused"))
            elif sale.state != "open":
                answers.append(Answer("ended"))
            elif held + quantity > MAX_PER_USER:
                answers.append(Answer("limit_reached"))
            elif quantity > available:
                answers.append(Answer("sold_out"))
            else:
                entry, event = self._accept(sale, reservation_id, user, quantity)
                answers.append(Answer("accepted", entry, event))
        if any(answer.outcome == "accepted" for answer in answers):
            self._wrote()
        return answers

    def _accept(
        self, sale: SaleHash, reservation_id: str, user: str, quantity: int
    ) -> tuple[int, Event]:
        capacity = sale.allocated + sale.released
        event = Event(reservation_id, user, quantity, 1, self.world.now, capacity, sale.revision)
        entry = self._add(event)
        self.keys.reservations[reservation_id] = event
        self.keys.buyers[user] = self.keys.buyers.get(user, 0) + quantity
        sale.accepted += quantity
        return entry, event

    def release(self, reservation_id: str) -> Answer:
        """Gives a reservation back (DESIGN.md; no script yet)."""
        sale, keys = self.keys.sale, self.keys
        known = keys.reservations.get(reservation_id)
        if sale is None or known is None or self.fenced():
            return Answer("unknown")
        if known.version > 1:
            return Answer("replayed", 0, known)
        event = replace(
            known,
            version=2,
            occurred=self.world.now,
            capacity=sale.allocated + sale.released,
            revision=sale.revision,
        )
        entry = self._add(event)
        keys.reservations[reservation_id] = event
        if not self.world.rules.release_when_acknowledged:
            self._give_back(sale, event)
        self._wrote()
        return Answer("accepted", entry, event)

    def settle(self, acknowledged: Iterable[tuple[int, Event]]) -> None:
        """settle.lua."""
        rules, keys = self.world.rules, self.keys
        wrote = False
        for entry, event in acknowledged:
            there = keys.outbox.get(entry)
            mine = there is not None and (
                there[0].reservation_id == event.reservation_id
                and (there[0].version == event.version or not rules.settle_matches_version)
            )
            if there is not None and not mine:
                self.world.risk(chance=0.5)
            if there is None or (rules.settle_matches and not mine):
                continue
            del keys.outbox[entry]
            wrote = True
            if there[0].version > 1 and rules.release_when_acknowledged and keys.sale is not None:
                self._give_back(keys.sale, there[0])
        if wrote:
            self._wrote()

    def _add(self, event: Event) -> int:
        self.keys.last_entry += 1
        self.keys.outbox[self.keys.last_entry] = (event, self.world.now)
        return self.keys.last_entry

    def _give_back(self, sale: SaleHash, event: Event) -> None:
        sale.released += event.quantity
        self.keys.buyers[event.user] -= event.quantity

    # The operator's scripts.

    def apply(self, row: "Row", *, seed: bool) -> str:
        """apply.lua: a sale that was fenced is rebuilt."""
        sale = self.keys.sale
        if sale is None:
            if not seed:
                return "missing"
            self.keys.sale = SaleHash(self.stamp, row.revision, row.state, row.allocated)
            self._wrote()
            return "seeded"
        if row.revision < sale.revision:
            return "stale"
        if self.fenced():
            return "fenced"
        sale.revision, sale.state = row.revision, row.state
        sale.allocated = max(row.allocated, sale.accepted - sale.released)
        self._wrote()
        return "changed"

    def close(self, revision: int) -> None:
        """close.lua."""
        sale = self.keys.sale
        if sale is not None and revision >= sale.revision:
            sale.revision, sale.state = revision, "closed"
            self._wrote()

    def mark_rebuild(self, claim: int, seconds: float) -> bool:
        """Fences the sale for one rebuild, and again while that goes on.

        Where the keys are gone this is the fence; an unfinished sale is not unknown.
        """
        sale, now = self.keys.sale, self.world.now
        if sale is None:
            sale = self.keys.sale = SaleHash(NOBODY, 0, "closed", 0)
        elif self.world.rules.rebuild_guarded:
            trusted = not (self.fenced() or sale.stamp == NOBODY)
            if trusted or (self.rebuilding(sale) and claim != _claim(sale)):
                return False
        sale.stamp, sale.rebuilding = NOBODY, Rebuilding(claim, self.stamp, now + seconds)
        self._wrote()
        return True

    def rebuilding(self, sale: SaleHash) -> bool:
        """Whether somebody rebuilds the sale, as far as can be seen."""
        mark = sale.rebuilding
        return mark is not None and mark.stamp == self.stamp and mark.until > self.world.now

    def fill_rebuild(self, claim: int, reservations: Mapping[str, Event]) -> bool:
        """Writes what the ledger has recorded."""
        if self._of_another(claim) or self.keys.outbox:
            return False
        self.keys.reservations = dict(reservations)
        self.keys.buyers = held_by(reservations.values())
        self._wrote()
        return True

    def finish_rebuild(self, claim: int, row: "Row") -> bool:
        """Opens the sale, as the last step."""
        if self._of_another(claim):
            return False
        allocated = max(row.allocated, row.accepted - row.released)
        self.keys.sale = SaleHash(
            self.stamp, row.revision, row.state, allocated, row.accepted, row.released
        )
        self._wrote()
        return True

    def _of_another(self, claim: int) -> bool:
        """Whether the sale is not, or no longer, fenced for this rebuild, on this server."""
        sale = self.keys.sale
        if sale is None or not self.world.rules.rebuild_guarded:
            return sale is None
        mark = sale.rebuilding
        return mark is None or (mark.claim, mark.stamp) != (claim, self.stamp)


def _claim(sale: SaleHash) -> int:
    return 0 if sale.rebuilding is None else sale.rebuilding.claim


class Kafka:
    """The topic: partitions that keep what they acknowledged."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = True
        self.delay = 0.2 if world.chance() < 0.6 else 4.0
        """Seconds until a batch is there, at most."""
        self.partitions: list[list[Event]] = [[] for _ in range(PARTITIONS)]
        self._turn = 0

    def reached(self) -> None:
        if not self.up:
            raise Away

    def append(self, batch: Iterable[Event]) -> None:
        """A batch goes to one partition: order means nothing."""
        self._turn += 1
        self.partitions[self._turn % PARTITIONS] += batch

    def ends(self) -> list[int]:
        self.reached()
        return [len(partition) for partition in self.partitions]


@dataclass(slots=True)
class Row:
    """A row of `sales`. `claimed` and `rebuilt` are the revisions of the rebuild that was begun
    last, and of the one that was read for last.
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
    """recording.LedgerRewound."""


@dataclass(slots=True)
class Tables:
    """All that PostgreSQL stores. `refused`: changes that were not recorded, and are reported."""

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
    """recording.py's transaction and reconciler.py's, and a server that can be an older copy."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = True
        self.tables = Tables()
        self._copies: list[Tables] = []

    def reached(self) -> None:
        if not self.up:
            raise Away

    def rewind(self) -> None:
        """Becomes an older copy: a failover to a standby that lagged.

        Not one from before the last rebuild, or from before the sale was declared: those two
        commits are taken to be on the standby too (see docs/reliability.md).
        """
        if self._copies:
            keep = int(self.world.chance() * len(self._copies))
            self.tables = self._copies[keep].copy()
            del self._copies[keep + 1 :]

    def write_row(self, stock: int, state: str, above: int) -> tuple[Row, bool]:
        """reconciler._WRITE and _CLOSE; returns the row, and whether it was inserted."""
        row = self.tables.row
        if row is None:
            self.tables.row = Row(above + 1, stock, state, stock)
            self._committed(durable=True)
            return self.tables.row.copy(), True
        if (row.allocated, row.state) != (stock, state) or row.revision < above:
            row.allocated, row.state = stock, state
            row.revision = max(row.revision, above) + 1
            row.capacity = max(row.capacity, stock + row.released)
            self._committed()
        return row.copy(), False

    def claim(self, above: int) -> int:
        """Takes the next revision for a rebuild: of two, the ledger hears the later one."""
        row = self.tables.row
        if row is None:
            return 0
        row.revision = row.claimed = max(row.revision, above) + 1
        self._committed(durable=True)
        return row.claimed

    def recorded(self, ends: Sequence[int]) -> bool:
        """Whether everything before these offsets is recorded."""
        return all(offset >= end for offset, end in zip(self.tables.offsets, ends, strict=True))

    def read_for_rebuild(
        self, claim: int, ends: Sequence[int]
    ) -> tuple[Row, dict[str, Event]] | None:
        """Reads the sale whole, and marks that what comes later was not in it: one transaction.

        None if another rebuild has claimed the sale since, or if the ledger has less than it had.
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
        """recording.record."""
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
            self.world.tell("ledger", "refuses", event)
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


def held_by(reservations: Iterable[Event]) -> dict[str, int]:
    """Units in each buyer's hands."""
    held: dict[str, int] = {}
    for event in reservations:
        units = event.quantity if event.version == 1 else 0
        held[event.user] = held.get(event.user, 0) + units
    return held
