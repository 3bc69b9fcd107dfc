"""A model of the Lua scripts in Python: their results and the state of an item after each call.

Hours count from the start of a sequence, which takes much less than one hour. The server's clock is
at hour 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flashsale.inventory import Applied, Closed, Freed
from flashsale.reservations import Outcome, Request
from flashsale.sale import Predecessor


@dataclass(frozen=True, slots=True)
class Manifest:
    """The arguments of `apply`."""

    sale_id: str
    revision: int
    stock: int
    max_per_user: int = 1
    starts_hour: int | None = None
    ends_hour: int | None = None
    paused: bool = False
    may_seed: bool = False
    replaces: Predecessor | None = None

    @property
    def state(self) -> str:
        return "paused" if self.paused else "open"


@dataclass(slots=True)
class Hash:
    """The sale's hash. `restarted` means that it was written under another run of the server."""

    manifest: Manifest
    state: str
    allocated: int
    accepted: int = 0
    released: int = 0
    last_hour: int = 0
    restarted: bool = False

    @property
    def finished(self) -> bool:
        ends = self.manifest.ends_hour
        return self.state in {"closed", "ended"} or (ends is not None and self.last_hour >= ends)


@dataclass(slots=True)
class Item:
    """The four keys of an item. A missing key is None."""

    sale: Hash | None = None
    buyers: dict[str, int] | None = None
    reservations: dict[str, Request] | None = None
    outbox: dict[str, str] | None = None
    """Reservation ids by entry id. An empty outbox is a key too."""
    outbox_limit: int = 4
    settled: set[str] = field(default_factory=set)
    taken: dict[str, Request] = field(default_factory=dict)
    """All requests that this sale has accepted, as in a complete ledger."""

    @property
    def others(self) -> int:
        return sum(part is not None for part in (self.buyers, self.reservations, self.outbox))

    @property
    def fenced(self) -> bool:
        return self.sale is not None and (self.sale.restarted or self.torn)

    @property
    def torn(self) -> bool:
        return self.sale is not None and self.sale.accepted > 0 and self.others < 3

    @property
    def useless(self) -> bool:
        """Whether no call can make the sale accept anything again."""
        return self.sale is None or self.sale.state == "ended"

    def apply(self, manifest: Manifest) -> Applied:  # noqa: PLR0911 - a list of rules
        sale = self.sale
        if sale is None:
            if not manifest.may_seed or self.others:
                return Applied.MISSING
            return self._seed(manifest)
        if sale.manifest.sale_id != manifest.sale_id:
            wanted = (sale.manifest.sale_id, sale.accepted)
            if manifest.replaces != wanted or not sale.finished or self.outbox:
                return Applied.CONFLICT
            return self._seed(manifest) if manifest.may_seed else Applied.MISSING
        if manifest.revision < sale.manifest.revision:
            return Applied.STALE
        if self.fenced:
            return Applied.FENCED
        if sale.state == "ended" or (sale.state != "closed" and sale.finished):
            sale.state = "ended"
            return Applied.ENDED
        allocated = max(manifest.stock, sale.accepted - sale.released)
        if (manifest.revision, manifest.state, allocated) == (
            sale.manifest.revision,
            sale.state,
            sale.allocated,
        ):
            return Applied.UNCHANGED
        sale.manifest, sale.state, sale.allocated = manifest, manifest.state, allocated
        return Applied.CHANGED

    def rebuild(self, claim: int) -> None:
        """Rebuilds a fenced sale, whose outbox is empty, from the ledger."""
        sale = self.sale
        if sale is None:
            raise ValueError("without the hash there is no ledger row")
        sale.manifest = replace(sale.manifest, revision=claim)
        if sale.state != "closed":
            sale.state = sale.manifest.state
        sale.accepted = sum(request.quantity for request in self.taken.values())
        sale.allocated = max(sale.manifest.stock, sale.accepted)
        sale.restarted = False
        self.reservations = dict(self.taken) or None
        self.buyers = self.held() or None
        self.outbox, self.settled = {}, set(self.taken)

    def held(self) -> dict[str, int]:
        """Returns the accepted units per buyer."""
        held: dict[str, int] = {}
        for request in self.taken.values():
            held[request.user_id] = held.get(request.user_id, 0) + request.quantity
        return held

    def _seed(self, manifest: Manifest) -> Applied:
        self.sale = Hash(manifest, manifest.state, manifest.stock)
        self.buyers = self.reservations = self.outbox = None
        self.settled, self.taken = set(), {}
        return Applied.SEEDED

    def reserve(self, batch: Sequence[Request]) -> Outcome | list[Outcome]:
        """Returns the outcomes. The caller adds accepted requests to the outbox.

        The server makes the entry ids of the outbox, so the model cannot predict them.
        """
        sale = self.sale
        if sale is None:
            return Outcome.UNKNOWN
        if self.fenced:
            return Outcome.FENCED
        answers = [self._decide(sale, request) for request in batch]
        if Outcome.ACCEPTED not in answers and sale.finished and sale.state != "closed":
            sale.state = "ended"
        return answers

    def _decide(self, sale: Hash, request: Request) -> Outcome:  # noqa: PLR0911 - a list of rules
        known = (self.reservations or {}).get(request.reservation_id)
        if known is not None:
            same = known.quantity == request.quantity
            return Outcome.REPLAYED if same else Outcome.KEY_REUSED
        if sale.finished:
            return Outcome.ENDED
        if sale.state == "paused":
            return Outcome.PAUSED
        if sale.last_hour < (sale.manifest.starts_hour or 0):
            return Outcome.NOT_OPEN
        held = (self.buyers or {}).get(request.user_id, 0)
        available = sale.allocated - sale.accepted + sale.released
        if held + request.quantity > sale.manifest.max_per_user:
            return Outcome.LIMIT_REACHED
        if available <= 0:
            return Outcome.SOLD_OUT
        if request.quantity > available:
            return Outcome.NOT_ENOUGH_LEFT
        reservations = self.reservations or {}
        if len(self.unsettled) >= self.outbox_limit:
            return Outcome.OUTBOX_FULL
        self.reservations = reservations | {request.reservation_id: request}
        self.taken[request.reservation_id] = request
        self.buyers = (self.buyers or {}) | {request.user_id: held + request.quantity}
        sale.accepted += request.quantity
        return Outcome.ACCEPTED

    @property
    def unsettled(self) -> set[str]:
        """The reservations with an outbox entry."""
        return (self.reservations or {}).keys() - self.settled

    def settle(self, pairs: Sequence[tuple[str, str]]) -> int:
        outbox = self.outbox or {}
        gone = {entry for entry, identity in pairs if outbox.get(entry) == identity}
        for entry in gone:
            self.settled.add(outbox.pop(entry))
        return len(gone)

    def close(self, sale_id: str, revision: int) -> Closed:
        sale = self.sale
        if sale is None or sale.manifest.sale_id != sale_id:
            return Closed.UNKNOWN
        if revision < sale.manifest.revision:
            return Closed.STALE
        state = "ended" if sale.finished and sale.state != "closed" else "closed"
        if (sale.state, sale.manifest.revision) == (state, revision):
            return Closed.UNCHANGED
        sale.state, sale.manifest = state, replace(sale.manifest, revision=revision)
        return Closed.CLOSED

    def free(self, sale_id: str, revision: int, recorded: int) -> Freed:
        sale = self.sale
        if sale is None or sale.manifest.sale_id != sale_id:
            return Freed.UNKNOWN
        if sale.state not in {"closed", "ended"} or sale.manifest.revision != revision:
            return Freed.OPEN
        if self.outbox or sale.accepted != recorded:
            return Freed.UNRECORDED
        self.sale = self.buyers = self.reservations = self.outbox = None
        self.settled, self.taken = set(), {}
        return Freed.FREED
