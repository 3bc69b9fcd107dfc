"""Redis in the model: the scripts of src/flashsale/lua. Each call happens at one instant."""

from collections.abc import Iterable, Mapping, Sequence

from tests.model.records import (
    CANCELLED,
    CONFIRMED,
    EXPIRED,
    HELD,
    LEAST_AFTER_REBUILD,
    MAX_EXPIRED_HOLDS,
    MAX_PER_USER,
    NOTHING,
    UNTRUSTED,
    Answer,
    Event,
    Keys,
    Progress,
    Rebuilding,
    Request,
    Row,
    SaleHash,
    Stamp,
    due,
    expired_by_user,
    units_by_user,
)
from tests.model.server import Server
from tests.model.world import Violation


class Redis(Server):
    """The server, with the scripts of buyers, of the order service and of operators."""

    # The scripts of the API.

    def reserve(self, batch: Sequence[Request]) -> list[Answer]:
        """reserve.lua."""
        sale = self.read_sale()
        if sale is None or self.fenced():
            return [Answer("unknown" if sale is None else "fenced")] * len(batch)
        answers = [self._reserve(sale, request) for request in batch]
        if any(answer.outcome == "accepted" for answer in answers):
            self.wrote()
        return answers

    def _reserve(self, sale: SaleHash, request: Request) -> Answer:
        known = self.keys.reservations.get(request.reservation_id)
        if known is not None:
            if known.quantity != request.quantity:
                return Answer("key_reused")
            if known.final and self.world.rules.ended_not_replayed:
                return Answer(known.state)
            return Answer("replayed", 0, self._today(sale, known))
        refusal = self._refusal(sale, request)
        return Answer(refusal) if refusal else self._accept(sale, request)

    def _refusal(self, sale: SaleHash, request: Request) -> str:
        """Returns the first reason to refuse a new reservation, if there is one."""
        keys, (_, user, quantity) = self.keys, request
        reasons = {
            "ended": sale.state != "open",
            "limit_reached": keys.buyers.get(user, 0) + quantity > MAX_PER_USER,
            "too_many_holds": keys.expired.get(user, 0) >= MAX_EXPIRED_HOLDS,
            "sold_out": quantity > sale.allocated - sale.accepted + sale.released,
            "outbox_full": len(keys.outbox) >= self.outbox_limit,
        }
        return next((reason for reason, applies in reasons.items() if applies), "")

    def _accept(self, sale: SaleHash, request: Request) -> Answer:
        (reservation_id, user, quantity), now, keys = request, self.clock, self.keys
        event = Event(
            reservation_id,
            user,
            quantity,
            version=self._next_version(sale, 0),
            state=CONFIRMED if sale.hold is None else HELD,
            occurred=now,
            expires=None if sale.hold is None else now + sale.hold,
            confirmed_at=now if sale.hold is None else None,
            order_ref=None,
            capacity=sale.allocated + sale.released,
            revision=sale.revision,
        )
        entry = self._add(event)
        keys.reservations[reservation_id] = event
        keys.buyers[user] = keys.buyers.get(user, 0) + quantity
        sale.accepted += quantity
        if event.state == HELD:
            sale.held += quantity
            keys.holds[reservation_id] = self._due(event, event.seconds)
        return Answer("accepted", entry, event)

    def _next_version(self, sale: SaleHash, version: int) -> int:
        rebuilt = sale.rebuilt if self.world.rules.unique_versions else 0
        return max(version, 1000 * rebuilt) + 1

    def _due(self, hold: Event, seconds: float) -> float:
        return due(hold, seconds, grace=self.world.rules.expiry_has_grace)

    def _today(self, sale: SaleHash, known: Event) -> Event:
        """Returns a known reservation with the sale's current numbers, as a replay publishes it."""
        return known._replace(capacity=sale.allocated + sale.released, revision=sale.revision)

    def confirm(self, reservation_id: str, order_ref: str) -> Answer:
        """confirm.lua."""
        sale, known = self.read_sale(), self.keys.reservations.get(reservation_id)
        if sale is None or self.fenced():
            return Answer("unknown" if sale is None else "fenced")
        if known is None:
            return Answer("not_found")
        if known.final:
            return Answer(known.state)
        unset = known.order_ref is None and self.world.rules.unpaid_order_is_set
        if known.state == HELD or unset:
            return self._change(sale, known, CONFIRMED, order_ref)
        if known.order_ref == order_ref:
            return Answer("replayed", 0, self._today(sale, known))
        return Answer("other_order")

    def cancel(self, reservation_id: str, order_ref: str | None) -> Answer:
        """cancel.lua."""
        sale, known = self.read_sale(), self.keys.reservations.get(reservation_id)
        if sale is None or self.fenced():
            return Answer("unknown" if sale is None else "fenced")
        if known is None:
            return Answer("not_found")
        if known.final:
            return Answer("replayed", 0, self._today(sale, known))
        own = known.order_ref in (None, order_ref) or not self.world.rules.confirmed_needs_order
        if known.state == CONFIRMED and not own:
            return Answer("other_order")
        return self._change(sale, known, CANCELLED, known.order_ref or order_ref)

    def expire(self, limit: int) -> list[Answer]:
        """expire.lua. Any pod can call it at any time: its lease only saves work."""
        return self.expire_all(self.due_holds(limit))

    def due_holds(self, limit: int) -> list[str]:
        """Returns the first holds that may expire. Without a trusted sale there are none."""
        if self.read_sale() is None or self.fenced():
            return []
        every = [(at, known) for known, at in self.keys.holds.items() if at <= self.clock]
        return [known for _, known in sorted(every)[:limit]]

    def expire_all(self, reservation_ids: Iterable[str]) -> list[Answer]:
        """Expires reservations without looking at their state."""
        sale, keys, answers = self.read_sale(), self.keys, []
        if sale is None or self.fenced():
            return []
        for reservation_id in reservation_ids:
            known = keys.reservations.get(reservation_id)
            if known is None or not self._takes_changes():
                break
            if reservation_id in self.world.oracle.confirmed:
                raise Violation(f"{reservation_id} expires, but was answered 200 for an order")
            self.world.oracle.counts["expired"] += 1
            answers.append(self._change(sale, known, EXPIRED, None))
        return answers

    def _takes_changes(self) -> bool:
        limited = not self.world.rules.limit_spares_changes
        return not (limited and len(self.keys.outbox) >= self.outbox_limit)

    def _change(self, sale: SaleHash, known: Event, state: str, order_ref: str | None) -> Answer:
        if not self._takes_changes():
            return Answer("outbox_full")
        rules, now = self.world.rules, self.clock
        confirmed_at = now if state == CONFIRMED else None
        event = self._today(sale, known)._replace(
            version=self._next_version(sale, known.version),
            state=state,
            occurred=now,
            confirmed_at=known.confirmed_at if known.confirmed_at is not None else confirmed_at,
            order_ref=order_ref,
        )
        entry = self._add(event)
        self.keys.reservations[event.reservation_id] = event
        if known.state == HELD:
            sale.held -= event.quantity
            self.keys.holds.pop(event.reservation_id, None)
        if event.final and not rules.release_when_acknowledged:
            self._give_back(sale, event)
        self.wrote()
        self.world.log("redis", "writes", event)
        return Answer("changed", entry, event)

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
            if found[0].final and rules.release_when_acknowledged and keys.sale is not None:
                self._give_back(keys.sale, found[0])
        if wrote:
            self.wrote()

    def _add(self, event: Event) -> int:
        self.keys.last_entry += 1
        self.keys.outbox[self.keys.last_entry] = (event, self.world.now)
        return self.keys.last_entry

    def _give_back(self, sale: SaleHash, event: Event) -> None:
        """Makes the units of an ended reservation available again, and gives back the limit."""
        buyers, expired, user = self.keys.buyers, self.keys.expired, event.user
        sale.released += event.quantity
        if self.world.rules.released_above_stock_withdrawn and sale.state != "closed":
            sale.allocated = max(sale.stock, sale.accepted - sale.released)
        buyers[user] = buyers.get(user, 0) - event.quantity
        if event.state == EXPIRED or not self.world.rules.only_expiry_counts:
            expired[user] = expired.get(user, 0) + 1

    # The scripts of operators.

    def apply(self, row: Row, *, seed: bool) -> str:
        """apply.lua."""
        sale = self.read_sale()
        if sale is None:
            if not seed:
                return "missing"
            self.keys.sale = SaleHash(
                self.stamp, row.revision, row.state, row.allocated, row.allocated, hold=row.hold
            )
            self.wrote()
            return "seeded"
        if row.revision < sale.revision:
            return "stale"
        if self.fenced():
            return "fenced"
        sale.revision, sale.state, sale.hold = row.revision, row.state, row.hold
        sale.stock = row.allocated
        sale.allocated = max(sale.stock, sale.accepted - sale.released)
        self.wrote()
        return "changed"

    def close(self, revision: int) -> None:
        """close.lua."""
        sale = self.read_sale()
        if sale is not None and revision >= sale.revision:
            sale.revision, sale.state = revision, "closed"
            self.wrote()

    def free(self, row: Row) -> str:
        """free.lua: deletes the keys of a closed sale that the ledger has completely."""
        rules, sale, keys = self.world.rules, self.read_sale(), self.keys
        if sale is None or self.fenced():
            return "unknown" if sale is None else "fenced"
        if sale.state != "closed" or sale.revision != row.revision:
            return "open"
        if keys.holds and rules.freed_without_holds:
            return "held"
        others_differ = (sale.released, sale.held) != (row.released, row.held)
        if others_differ and rules.freed_if_all_recorded:
            return "unrecorded"
        if keys.outbox or sale.accepted != row.accepted:
            return "unrecorded"
        self.keys = Keys(heartbeats=keys.heartbeats, last_entry=keys.last_entry)
        self.world.oracle.counts["freed"] += 1
        self.wrote()
        return "freed"

    def republish(self) -> list[Event]:
        """page.lua and republish.py: all records as events with the sale's current numbers."""
        sale = self.read_sale()
        if sale is None or (self.fenced() and self.world.rules.fenced_not_republished):
            return []
        return [self._today(sale, event) for event in self.keys.reservations.values()]

    def lags(self, recorded: Progress) -> bool:
        """Whether the ledger has recorded more of the sale than Redis has."""
        rules, sale = self.world.rules, self.keys.sale
        if sale is None or not rules.ledger_knows_more:
            return False
        undecided = sale.accepted - sale.held < recorded.decided
        former = sale.rebuilt < recorded.rebuilt
        return (
            sale.accepted < recorded.accepted
            or (undecided and rules.decided_units_compared)
            or (former and rules.rebuilds_compared)
        )

    def mark_rebuild(
        self,
        claim: int,
        stamp: Stamp,
        seconds: float,
        *,
        recorded: Progress = NOTHING,
        again: bool = False,
    ) -> bool:
        """fence.lua: marks the sale for a rebuild that began under `stamp`, or renews its mark.

        If the keys are missing, the first call creates a fenced sale, so that buyers do not get
        `unknown`. `recorded` is the ledger's progress.
        """
        rules, sale = self.world.rules, self.read_sale()
        if rules.other_run_ends_rebuild and stamp != self.stamp:
            return False
        if again and rules.lost_mark_ends_rebuild and (sale is None or _claim(sale) != claim):
            return False
        if sale is None:
            sale = self.keys.sale = SaleHash(UNTRUSTED, 0, "closed", 0, 0)
        elif rules.rebuild_guarded:
            untrusted = self.fenced() or sale.stamp == UNTRUSTED
            trusted = not (untrusted or self.lags(recorded))
            if trusted or (self.rebuilding(sale, seconds) and claim != _claim(sale)):
                return False
        sale.stamp, sale.rebuilding = UNTRUSTED, Rebuilding(claim, self.clock + seconds)
        self.wrote()
        return True

    def rebuilding(self, sale: SaleHash, seconds: float) -> bool:
        """Whether a rebuild has a mark on the sale that has not expired, of at most `seconds`."""
        mark = sale.rebuilding
        if mark is None or mark.until <= self.clock:
            return False
        return mark.until <= self.clock + seconds or not self.world.rules.times_ahead_ignored

    def fill_rebuild(self, claim: int, reservations: Mapping[str, Event]) -> bool:
        """restore.lua: writes the ledger's reservations."""
        if self._of_another(claim) or self.keys.outbox:
            return False
        rules, keys = self.world.rules, self.keys
        keys.reservations = dict(reservations)
        keys.buyers = units_by_user(reservations.values())
        if rules.expired_counts_restored:
            keys.expired = expired_by_user(reservations.values())
        else:
            keys.expired = {}
        keys.holds = {}
        for event in reservations.values():
            if event.state == HELD and rules.holds_restored:
                self._restore_hold(event)
            if not rules.orders_restored:
                keys.reservations[event.reservation_id] = event._replace(order_ref=None)
        self.wrote()
        return True

    def _restore_hold(self, hold: Event) -> None:
        """Restores a hold, with time for a shop to repeat a confirmation that was lost."""
        expires = hold.expires or 0.0
        if self.world.rules.holds_extended:
            expires = max(expires, self.clock + min(LEAST_AFTER_REBUILD, hold.seconds))
        restored = hold._replace(expires=expires)
        self.keys.reservations[hold.reservation_id] = restored
        self.keys.holds[hold.reservation_id] = self._due(restored, hold.seconds)

    def finish_rebuild(self, claim: int, row: Row, stamp: Stamp, reservations: int) -> bool:
        """trust.lua: opens the sale, as the last step of a rebuild that began under `stamp`."""
        if self._of_another(claim):
            return False
        complete = stamp == self.stamp and len(self.keys.reservations) == reservations
        if self.world.rules.rebuild_guarded and not complete:
            return False
        self.keys.sale = SaleHash(
            self.stamp,
            row.revision,
            row.state,
            row.allocated,
            max(row.allocated, row.accepted - row.released),
            row.accepted,
            row.released,
            row.hold,
            row.held,
            rebuilt=claim,
        )
        self.wrote()
        return True

    def _of_another(self, claim: int) -> bool:
        """Whether the sale is not fenced, or not any more, for this rebuild."""
        sale = self.keys.sale
        if sale is None or not self.world.rules.rebuild_guarded:
            return sale is None
        return _claim(sale) != claim


def _claim(sale: SaleHash) -> int:
    return 0 if sale.rebuilding is None else sale.rebuilding.claim
