"""Redis in the model: its scripts, durability and clocks. Each call happens at one instant."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

from tests.model.ledger import Row
from tests.model.world import Event, Unreachable, Violation, World, changes_of

MAX_PER_USER = 2
CLOCKS_APART = 60.0
"""Difference between the clocks of two servers, in seconds."""
LOST_REPLIES = 0.02
"""Share of the executed calls whose reply is lost."""


class Request(NamedTuple):
    """`reservations.Request`."""

    reservation_id: str
    user: str
    quantity: int


class Answer(NamedTuple):
    """An answer of `reserve`. An acceptance has the outbox entry and the event.

    A replay has the event of the known reservation.
    """

    outcome: str
    entry: int = 0
    event: Event | None = None


Stamp: TypeAlias = tuple[int, int]
"""A run of the server: its run id and its replication id."""


class Heartbeat(NamedTuple):
    """`heartbeat.Report`, with the run of the server whose clock it used."""

    held: int
    sampled: float
    stamp: Stamp


class Rebuilding(NamedTuple):
    """The mark of a rebuild in progress: its claim and the end of its lease."""

    claim: int
    until: float


UNTRUSTED: Stamp = (0, 0)
"""The stamp of a sale that is trusted under no server."""


@dataclass(slots=True)
class SaleHash:
    """The sale's hash. It is trusted only under the server that has the same `stamp`."""

    stamp: Stamp
    revision: int
    state: str
    allocated: int
    accepted: int = 0
    released: int = 0
    rebuilding: Rebuilding | None = None

    def copy(self) -> "SaleHash":
        # Ten times as fast as dataclasses.replace, which took a quarter of a run's time.
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
    """The data in Redis."""

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
    """The scripts of src/flashsale/lua, on a server that can lose writes."""

    def __init__(self, world: World, *, always: bool) -> None:
        self.world = world
        self.always = always
        """Whether appendfsync is `always`. Otherwise a crash can lose the last second of writes."""
        self.up = True
        self.keys = Keys()
        self.run_id = world.new_id()
        self.replication_id = 0
        self._copies: list[tuple[float, Keys]] = [(0.0, Keys())]

    # The server.

    @property
    def clock(self) -> float:
        """The server's clock in seconds. Each server's is set differently."""
        return self.world.now + (self.run_id % 3 - 1) * CLOCKS_APART

    @property
    def stamp(self) -> Stamp:
        """The server's run. A sale is trusted only if it was written under the same run."""
        by_replication = self.world.rules.fence_on_replication_id
        return (self.run_id, self.replication_id if by_replication else 0)

    def reached(self) -> None:
        """Raises `Unreachable` if a call cannot arrive. Nothing was executed."""
        if not self.up:
            raise Unreachable

    def replied(self, *, stamp: Stamp | None = None) -> None:
        """Raises `Unreachable` if the reply of an executed call is lost."""
        if not self.up or self.world.chance() < LOST_REPLIES:
            raise Unreachable
        if stamp is not None and stamp != self.stamp and self.world.chance() < 0.5:
            raise Unreachable

    def become(self, keys: Keys, *, restarted: bool = True, demoted: bool = True) -> None:
        """Takes an earlier state. The process restarts, was a replica meanwhile, or neither."""
        lost = changes_of(self.keys.reservations.values())
        lost -= changes_of(keys.reservations.values())
        self.world.oracle.lost |= lost
        self.world.log("redis", "loses", *sorted(lost))
        self.keys = keys.copy()
        if restarted or demoted:
            self.replication_id = self.world.new_id()
        if restarted:
            self.run_id = self.world.new_id()
        self._copies.append((self.world.now, self.keys.copy()))

    def forget_replication(self) -> None:
        """Forgets the replication id, as a server without replicas does after some time."""
        self.replication_id = 0

    def copy_of(self, seconds: float) -> Keys:
        """Returns the state at a random moment of the last seconds."""
        since = self.world.now - seconds
        recent = [keys for at, keys in self._copies if at >= since]
        # The copy before them is the state at the beginning of that time.
        choice = self._copies[-len(recent) - 1 :] or self._copies
        return choice[int(self.world.chance() * len(choice))][1]

    def _wrote(self) -> None:
        sale = self.keys.sale
        if sale is not None and sale.accepted - sale.released > sale.allocated:
            raise Violation(f"Redis: buyers of {sale} hold more units than are allocated")
        self._copies.append((self.world.now, self.keys.copy()))

    # sale.lua, which is part of every script.

    def fenced(self) -> bool:
        sale = self.keys.sale
        return self.world.rules.fence and sale is not None and sale.stamp != self.stamp

    def read_sale(self) -> SaleHash | None:
        """Returns the sale. If it was written under another run, the fence is latched."""
        sale, rules = self.keys.sale, self.world.rules
        if sale is not None and self.fenced() and rules.fence_latched and sale.stamp != UNTRUSTED:
            sale.stamp = UNTRUSTED
            self._wrote()
        return sale

    # The API's scripts.

    def reserve(self, batch: Sequence[Request]) -> list[Answer]:
        """reserve.lua."""
        sale, keys = self.read_sale(), self.keys
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
        """Releases a reservation. Only the model has this call."""
        sale, keys = self.read_sale(), self.keys
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
            found = keys.outbox.get(entry)
            matches = found is not None and (
                found[0].reservation_id == event.reservation_id
                and (found[0].version == event.version or not rules.settle_matches_version)
            )
            if found is not None and not matches:
                self.world.risk(chance=0.5)
            if found is None or (rules.settle_matches and not matches):
                continue
            del keys.outbox[entry]
            wrote = True
            if found[0].version > 1 and rules.release_when_acknowledged and keys.sale is not None:
                self._give_back(keys.sale, found[0])
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

    def apply(self, row: Row, *, seed: bool) -> str:
        """apply.lua."""
        sale = self.read_sale()
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
        sale = self.read_sale()
        if sale is not None and revision >= sale.revision:
            sale.revision, sale.state = revision, "closed"
            self._wrote()

    def republish(self) -> list[Event]:
        """page.lua and republish.py: all records as events with the sale's current numbers."""
        sale = self.read_sale()
        if sale is None or (self.fenced() and self.world.rules.fenced_not_republished):
            return []
        capacity = sale.allocated + sale.released
        return [
            replace(event, capacity=capacity, revision=sale.revision)
            for event in self.keys.reservations.values()
        ]

    def mark_rebuild(
        self, claim: int, seconds: float, *, recorded: int = 0, again: bool = False
    ) -> bool:
        """fence.lua: marks the sale for a rebuild, or renews the mark of that rebuild.

        If the keys are missing, the first call creates a fenced sale, so that buyers do not get
        `unknown`. `recorded` is the ledger's accepted units.
        """
        rules, sale, now = self.world.rules, self.read_sale(), self.world.now
        if again and rules.lost_mark_ends_rebuild and (sale is None or _claim(sale) != claim):
            return False
        if sale is None:
            sale = self.keys.sale = SaleHash(UNTRUSTED, 0, "closed", 0)
        elif rules.rebuild_guarded:
            complete = sale.accepted >= recorded or not rules.ledger_knows_more
            trusted = not (self.fenced() or sale.stamp == UNTRUSTED) and complete
            if trusted or (self.rebuilding(sale) and claim != _claim(sale)):
                return False
        sale.stamp, sale.rebuilding = UNTRUSTED, Rebuilding(claim, now + seconds)
        self._wrote()
        return True

    def rebuilding(self, sale: SaleHash) -> bool:
        """Whether a rebuild has a mark on the sale that has not expired."""
        mark = sale.rebuilding
        return mark is not None and mark.until > self.world.now

    def fill_rebuild(self, claim: int, reservations: Mapping[str, Event]) -> bool:
        """restore.lua: writes the ledger's reservations."""
        if self._of_another(claim) or self.keys.outbox:
            return False
        self.keys.reservations = dict(reservations)
        self.keys.buyers = held_by(reservations.values())
        self._wrote()
        return True

    def finish_rebuild(self, claim: int, row: Row, stamp: Stamp, reservations: int) -> bool:
        """trust.lua: opens the sale, as the last step of a rebuild that began under `stamp`."""
        if self._of_another(claim):
            return False
        complete = stamp == self.stamp and len(self.keys.reservations) == reservations
        if self.world.rules.rebuild_guarded and not complete:
            return False
        allocated = max(row.allocated, row.accepted - row.released)
        self.keys.sale = SaleHash(
            self.stamp, row.revision, row.state, allocated, row.accepted, row.released
        )
        self._wrote()
        return True

    def _of_another(self, claim: int) -> bool:
        """Whether the sale is not fenced, or not any more, for this rebuild."""
        sale = self.keys.sale
        if sale is None or not self.world.rules.rebuild_guarded:
            return sale is None
        return _claim(sale) != claim


def _claim(sale: SaleHash) -> int:
    return 0 if sale.rebuilding is None else sale.rebuilding.claim


def held_by(reservations: Iterable[Event]) -> dict[str, int]:
    """Returns the units that each buyer holds."""
    held: dict[str, int] = {}
    for event in reservations:
        units = event.quantity if event.version == 1 else 0
        held[event.user] = held.get(event.user, 0) + units
    return held
