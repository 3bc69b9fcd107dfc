"""The state of an item in the model of the Lua scripts.

Hours count from the start of a sequence, which takes much less than the shortest hold. The server's
clock is at hour 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from flashsale.reservations import FINAL, Record, State
from flashsale.sale import Predecessor

THIS_RUN = "this"
"""The run of the server."""
OTHER_RUN = "other"
"""The run of another server."""

Buyer = tuple[int, int]
"""Units and expired holds."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The arguments of `apply` and `fence`. `engine` is the caller's."""

    sale_id: str
    revision: int
    stock: int
    max_per_user: int = 1
    starts_hour: int | None = None
    ends_hour: int | None = None
    paused: bool = False
    hold_seconds: int = 0
    max_expired_holds: int = 3
    may_seed: bool = False
    replaces: Predecessor | None = None
    engine: str = ""

    @property
    def state(self) -> str:
        return "paused" if self.paused else "open"

    @property
    def declared(self) -> tuple[int, int]:
        return self.stock, self.revision


@dataclass(slots=True)
class Hash:
    """The sale's hash. `run` is `THIS_RUN`, `OTHER_RUN`, or a word that is no server's run."""

    manifest: Manifest
    state: str
    allocated: int
    stock: tuple[int, int] | None
    """The stock and revision of the last manifest that this version applied, if one did."""
    accepted: int = 0
    released: int = 0
    held: int = 0
    rebuilt: int = 0
    last_hour: int = 0
    run: str = THIS_RUN
    leased: bool | None = None
    """Whether the lease of the rebuild lasts. None if the hash has no lease."""

    @classmethod
    def of(cls, manifest: Manifest) -> "Hash":
        """Returns the hash of a sale that has sold nothing."""
        return cls(manifest, manifest.state, manifest.stock, manifest.declared)

    def foreign(self, engine: str) -> bool:
        return bool(engine and self.manifest.engine) and engine != self.manifest.engine

    @property
    def finished(self) -> bool:
        ends = self.manifest.ends_hour
        return self.state in {"closed", "ended"} or (ends is not None and self.last_hour >= ends)

    @property
    def available(self) -> int:
        return self.allocated - self.accepted + self.released

    def next_version(self, version: int = 0) -> int:
        return max(version, 1000 * self.rebuilt) + 1


@dataclass(slots=True)
class Item:
    """The five keys of an item. A missing key is None, except that empty holds are no key."""

    sale: Hash | None = None
    buyers: dict[str, Buyer] | None = None
    reservations: dict[str, Record] | None = None
    outbox: dict[str, tuple[str, Record]] | None = None
    """Reservations (id, record) by entry id. An empty outbox is a key too."""
    holds: dict[str, int] = field(default_factory=dict)
    """The moment in ms at which each held reservation is due."""
    outbox_limit: int = 6
    ledger: dict[str, Record] = field(default_factory=dict)
    """All reservations of the sale `recorded_sale`, as in a complete ledger."""
    recorded_sale: str = ""
    forgotten: bool = False
    """Whether `settle` deleted releases of an untrusted sale, which only a rebuild can count."""

    @property
    def others(self) -> int:
        return sum(part is not None for part in (self.buyers, self.reservations, self.outbox))

    @property
    def torn(self) -> bool:
        sale = self.sale
        return sale is not None and (
            (sale.accepted > 0 and self.others < 3) or (sale.held > 0 and not self.holds)
        )

    @property
    def fenced(self) -> bool:
        return self.sale is not None and (self.sale.run != THIS_RUN or self.torn)

    @property
    def whole(self) -> bool:
        """Whether the keys have all parts of the sale, even if they are not trusted."""
        rebuilding = self.sale is not None and self.sale.run.startswith("rebuild:")
        return not (self.torn or rebuilding or self.forgotten)

    def useless(self, engine: str) -> bool:
        """Whether no call of the engine can make the sale accept anything again."""
        return self.sale is None or self.sale.state == "ended" or self.sale.foreign(engine)

    def read(self) -> Hash | None:
        """Reads the sale, as most scripts do first. Under another run it latches the fence."""
        if self.sale is not None and self.sale.run == OTHER_RUN:
            self.sale.run = "fenced"
        return self.sale

    def recorded(self, accepted: int, released: int) -> bool:
        """Whether a ledger with these counts has the whole sale."""
        sale = self.sale
        return (
            sale is not None
            and not self.outbox
            and not self.holds
            and (sale.held, sale.accepted, sale.released) == (0, accepted, released)
        )

    def replaceable(self, replaces: Predecessor | None) -> bool:
        sale = self.sale
        return (
            sale is not None
            and replaces is not None
            and replaces.sale_id == sale.manifest.sale_id
            and sale.finished
            and self.recorded(replaces.accepted, replaces.released)
        )

    def store(self, reservation_id: str, record: Record) -> None:
        """Stores a change. The caller adds it to the outbox, because the server makes its id."""
        self.reservations = (self.reservations or {}) | {reservation_id: record}
        self.ledger[reservation_id] = record
        if record.state is State.HELD:
            self.holds[reservation_id] = due_ms(record)
        else:
            self.holds.pop(reservation_id, None)

    def clear(self) -> None:
        """Deletes all keys."""
        self.sale = self.buyers = self.reservations = self.outbox = None
        self.holds = {}


def due_ms(record: Record) -> int:
    """Returns when a hold can be expired."""
    expires_ms = record.expires_ms or 0
    return expires_ms + min((expires_ms - record.accepted_ms) // 10, 30_000)


def units(records: Iterable[Record], *states: State) -> int:
    return sum(record.quantity for record in records if record.state in states)


def buyers_of(records: Iterable[Record]) -> dict[str, Buyer]:
    """Returns the buyers of reservations whose releases are all settled."""
    buyers: dict[str, Buyer] = {}
    for record in records:
        taken, expired = buyers.get(record.user_id, (0, 0))
        buyers[record.user_id] = (
            taken + (record.quantity if record.state not in FINAL else 0),
            expired + (record.state is State.EXPIRED),
        )
    return buyers
