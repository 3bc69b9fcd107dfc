"""A model of the Lua scripts in Python: their results and the state of an item after each call.

Each script except `settle` and `restore` reads the sale first, which latches the fence.

Hours count from the start of a sequence, which takes much less than one hour. The server's clock is
at hour 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flashsale.inventory import Applied, Closed, Freed
from flashsale.reservations import Outcome, Request
from flashsale.sale import Predecessor
from flashsale_operator.sales.recovery import Fenced, Step

THIS_RUN = "this"
"""The run of the server."""
OTHER_RUN = "other"
"""The run of another server."""


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
    may_seed: bool = False
    replaces: Predecessor | None = None
    engine: str = ""

    @property
    def state(self) -> str:
        return "paused" if self.paused else "open"


@dataclass(slots=True)
class Hash:
    """The sale's hash. `run` is `THIS_RUN`, `OTHER_RUN`, or a word that is no server's run."""

    manifest: Manifest
    state: str
    allocated: int
    accepted: int = 0
    released: int = 0
    last_hour: int = 0
    run: str = THIS_RUN
    leased: bool | None = None
    """Whether the lease of the rebuild lasts. None if the hash has no lease."""

    def foreign(self, engine: str) -> bool:
        return bool(engine and self.manifest.engine) and engine != self.manifest.engine

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
    """All requests that the sale `recorded_sale` has accepted, as in a complete ledger."""
    recorded_sale: str = ""

    @property
    def others(self) -> int:
        return sum(part is not None for part in (self.buyers, self.reservations, self.outbox))

    @property
    def fenced(self) -> bool:
        return self.sale is not None and (self.sale.run != THIS_RUN or self.torn)

    @property
    def torn(self) -> bool:
        return self.sale is not None and self.sale.accepted > 0 and self.others < 3

    @property
    def whole(self) -> bool:
        """Whether the keys have all parts of the sale, even if they are not trusted."""
        return not self.torn and not (self.sale and self.sale.run.startswith("rebuild:"))

    def useless(self, engine: str) -> bool:
        """Whether no call of the engine can make the sale accept anything again."""
        return self.sale is None or self.sale.state == "ended" or self.sale.foreign(engine)

    def _read(self) -> Hash | None:
        """Reads the sale. Under another run it latches the fence."""
        if self.sale is not None and self.sale.run == OTHER_RUN:
            self.sale.run = "fenced"
        return self.sale

    def _replaceable(self, sale: Hash, replaces: Predecessor | None) -> bool:
        wanted = (sale.manifest.sale_id, sale.accepted)
        return replaces == wanted and sale.finished and not self.outbox

    def apply(self, manifest: Manifest) -> Applied:  # noqa: PLR0911 - a list of rules
        sale = self._read()
        if sale is None:
            if not manifest.may_seed or self.others:
                return Applied.MISSING
            return self._seed(manifest)
        if sale.foreign(manifest.engine):
            return Applied.OTHER_ENGINE
        if sale.manifest.sale_id != manifest.sale_id:
            if not self._replaceable(sale, manifest.replaces):
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
        if (manifest.revision, manifest.state, allocated, manifest.engine) == (
            sale.manifest.revision,
            sale.state,
            sale.allocated,
            sale.manifest.engine,
        ):
            return Applied.UNCHANGED
        sale.manifest, sale.state, sale.allocated = manifest, manifest.state, allocated
        return Applied.CHANGED

    def fence(  # noqa: PLR0911 - a list of rules
        self,
        manifest: Manifest,
        claim: int,
        step: Step,
        recorded: int,
        *,
        closed: bool = False,
        leased: bool = True,
    ) -> Fenced:
        sale, mine = self._read(), f"rebuild:{claim}"
        if sale is not None and sale.foreign(manifest.engine):
            return Fenced.OTHER_ENGINE
        if step != "fence" and (sale is None or sale.run != mine):
            return Fenced.SUPERSEDED
        marker = Hash(replace(manifest, revision=claim), manifest.state, manifest.stock)
        marker.run, marker.leased = mine, leased
        if closed:
            marker.state = "closed"
        if step == "begin" and sale is not None:
            if sale.manifest.revision > claim:
                return Fenced.SUPERSEDED
            if self.outbox:
                return Fenced.UNDRAINED
            self.buyers = self.reservations = None
            marker.last_hour = sale.last_hour
            self._mark(marker)
            return Fenced.BEGUN
        if sale is not None and sale.manifest.sale_id != manifest.sale_id:
            if not self._replaceable(sale, manifest.replaces):
                return Fenced.CONFLICT
            self.buyers = self.reservations = self.outbox = sale = None
        if sale is None:
            self._mark(marker)
            return Fenced.FENCED
        if not self.fenced and sale.accepted >= recorded:
            return Fenced.TRUSTED
        other = int(sale.run.removeprefix("rebuild:")) if sale.run.startswith("rebuild:") else 0
        if other > claim and sale.leased:
            return Fenced.REBUILDING
        sale.run, sale.leased = mine, leased
        return Fenced.FENCED

    def _mark(self, marker: Hash) -> None:
        self.sale = marker
        if marker.manifest.sale_id != self.recorded_sale:
            self.recorded_sale, self.taken = marker.manifest.sale_id, {}

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
        sale.run, sale.leased = THIS_RUN, None
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
        self.settled, self.taken, self.recorded_sale = set(), {}, manifest.sale_id
        return Applied.SEEDED

    def reserve(self, batch: Sequence[Request], engine: str) -> Outcome | list[Outcome]:
        """Returns the outcomes. The caller adds accepted requests to the outbox.

        The server makes the entry ids of the outbox, so the model cannot predict them.
        """
        sale = self._read()
        if sale is None:
            return Outcome.UNKNOWN
        if self.fenced:
            return Outcome.FENCED
        if sale.foreign(engine):
            return Outcome.OTHER_ENGINE
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

    def page(self) -> Outcome | set[str]:
        """Returns the ids of all reservations."""
        sale = self._read()
        if sale is None:
            return Outcome.UNKNOWN
        return Outcome.FENCED if self.fenced else {*(self.reservations or ())}

    def close(self, sale_id: str, revision: int, engine: str) -> Closed:
        sale = self._read()
        if sale is None or sale.manifest.sale_id != sale_id:
            return Closed.UNKNOWN
        if sale.foreign(engine):
            return Closed.OTHER_ENGINE
        if revision < sale.manifest.revision:
            return Closed.STALE
        state = "ended" if sale.finished and sale.state != "closed" else "closed"
        if (sale.state, sale.manifest.revision) == (state, revision):
            return Closed.UNCHANGED
        sale.state, sale.manifest = state, replace(sale.manifest, revision=revision)
        return Closed.CLOSED

    def free(self, sale_id: str, revision: int, recorded: int, engine: str) -> Freed:
        sale = self._read()
        if sale is None or sale.manifest.sale_id != sale_id:
            return Freed.UNKNOWN
        if sale.foreign(engine):
            return Freed.OTHER_ENGINE
        if sale.state not in {"closed", "ended"} or sale.manifest.revision != revision:
            return Freed.OPEN
        if self.outbox or sale.accepted != recorded:
            return Freed.UNRECORDED
        self.sale = self.buyers = self.reservations = self.outbox = None
        self.settled, self.taken = set(), {}
        return Freed.FREED
