"""Calls that change reservations, for both the server and the model."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from flashsale.errors import RedisUnavailable
from flashsale.reservations import (
    BatchReply,
    Expired,
    OrderCall,
    Outcome,
    Record,
    Request,
)
from tests.model.scripts import reservation_model
from tests.model.scripts.machine import (
    NO_ENTRY,
    OWN_ENGINE,
    SALES,
    TRACE,
    Machine,
    callers,
    chances,
    engines,
    places,
)


class ReservationRules(Machine):
    """Reserves, confirms, cancels, expires and settles."""

    @rule(
        wanted=st.lists(
            st.tuples(st.integers(0, 5), st.sampled_from([1, 1, 2, 3]), chances),
            min_size=1,
            max_size=6,
        ),
        engine=engines,
        place=places,
    )
    def reserve(
        self, wanted: list[tuple[int, int, int]], engine: str = OWN_ENGINE, place: int = 0
    ) -> None:
        self.send([self._request(*one) for one in wanted], engine, place)

    def send(self, batch: list[Request], engine: str = OWN_ENGINE, place: int = 0) -> None:
        before = self.model.sale and replace(self.model.sale)
        fenced = self.model.fenced
        others = [Request("id", "user", 1)]
        batches = [(self.empty, others), (self.broken, others)]
        batches.insert(place, (self.item, batch))
        call = self.server.inventory.reserve_all(batches, timeout_seconds=10, engine_id=engine)
        replies = self.server.run(call)
        reply = replies.pop(place)
        assert replies[0] is Outcome.UNKNOWN
        assert isinstance(replies[1], RedisUnavailable)
        assert not isinstance(reply, RedisUnavailable)
        now_ms = reply.now_ms if isinstance(reply, BatchReply) else 0
        expected = reservation_model.reserve(self.model, batch, engine, now_ms)
        if not isinstance(reply, BatchReply):
            assert reply is expected
            self.seen(reply)
            return
        assert [answer.outcome for answer in reply.answers] == expected
        self.check_time(now_ms)
        sale = self.hash
        for request, (outcome, detail) in zip(batch, reply.answers, strict=True):
            self.seen(outcome)
            record = (self.model.reservations or {}).get(request.reservation_id)
            if outcome is Outcome.ACCEPTED:
                assert before is not None
                assert before.state == "open"
                assert not fenced
                assert not before.finished
                assert record is not None
                self.expect_entry(detail, request.reservation_id, record, "")
                if before.accepted + request.quantity > before.allocated:
                    self.seen("sold again")
            elif outcome is Outcome.REPLAYED:
                assert record is not None
                assert Record.parse(detail) == record
                self.seen(f"replayed: {record.state}")
        assert reply.snapshot == self.snapshot()
        assert reply.available == sale.available
        assert reply.starts_ms == (self.ms(sale.manifest.starts_hour) or 0)
        assert reply.version == sale.next_version()
        assert reply.hold_ms == 1000 * sale.manifest.hold_seconds
        assert reply.held == sale.held

    @rule(first=st.integers(0, 5), size=st.integers(2, 6))
    def crowd(self, first: int, size: int) -> None:
        """Sends a batch of users who each want one unit."""
        self.reserve([((first + n) % 6, 1, 99) for n in range(size)])

    @rule(
        verb=st.sampled_from(["confirm", "confirm", "cancel"]),
        picks=st.lists(
            st.tuples(st.integers(0, 9), st.sampled_from(["a", "a", "a", "b", ""]), chances),
            min_size=1,
            max_size=5,
        ),
        engine=callers,
    )
    @precondition(lambda self: self.used)
    def change(
        self, verb: reservation_model.Verb, picks: list[tuple[int, str, int]], engine: str
    ) -> None:
        """Confirms or cancels reservations. Most calls for one of them name the same order."""
        calls = []
        for pick, order_ref, chance in picks:
            known = list(self.model.ledger)[-10:] if chance > 4 else []
            known = known or [request.reservation_id for request in self.used]
            own_id = known[pick % len(known)]
            needed = "a" if verb == "confirm" else ""
            sale_id = ["", "", *SALES][chance % 4]
            trace = TRACE if chance % 2 else ""
            calls.append(OrderCall(own_id, order_ref or needed, trace, sale_id))
        self.change_records(verb, calls, engine)

    @rule(limit=st.sampled_from([128, 128, 1, 2]), engine=callers)
    def expire(self, limit: int, engine: str) -> None:
        call = self.server.inventory.expire(self.item, limit, timeout_seconds=10, engine_id=engine)
        reply = self.server.run(call)
        now_ms = reply.now_ms if isinstance(reply, Expired) else 0
        expected = reservation_model.expire(self.model, limit, engine, now_ms)
        if not isinstance(reply, Expired):
            assert reply is expected
            self.seen(f"expire: {reply}")
            return
        assert [(own_id, record) for own_id, _, record in reply.holds] == expected
        assert reply.snapshot == self.snapshot()
        self.check_time(now_ms)
        for own_id, entry_id, record in reply.holds:
            self.seen("expired")
            self.expect_entry(entry_id, own_id, record, "")

    @rule(
        picks=st.lists(st.tuples(st.integers(0, 9), chances), min_size=1, max_size=5), place=places
    )
    def settle(self, picks: list[tuple[int, int]], place: int) -> None:
        """Settles entries. Some calls are wrong in an id or version, or settle an entry again."""
        if not self.model.outbox:
            self.crowd(picks[0][0] % 6, len(picks))
        outbox = [
            (entry_id, own_id, record.version)
            for entry_id, (own_id, record) in (self.model.outbox or {}).items()
        ]
        named = []
        for pick, chance in picks:
            entry, own_id, version = outbox[pick % len(outbox)] if outbox else NO_ENTRY
            if chance < 15:
                own_id = outbox[(pick + 1) % len(outbox)][1] if outbox else "no-id"
            elif chance < 25:
                version += 1 if chance % 2 or version == 1 else -1
            elif chance < 30:
                entry = NO_ENTRY[0]
            elif chance < 40 and self.retired:
                entry, own_id, version = self.retired[pick % len(self.retired)]
            named += [(entry, own_id, version)] * (2 if chance > 95 else 1)
        self.settle_entries(named, place)

    @rule()
    def drain(self) -> None:
        """Settles all entries."""
        self.drain_outbox()

    def _request(self, user: int, quantity: int, chance: int) -> Request:
        """Returns a new request, or an earlier one with the same or another quantity."""
        if self.used and chance < 30:
            known = self.used[chance % len(self.used)]
            return known if chance < 22 else known._replace(quantity=known.quantity % 3 + 1)
        key = f"key-{chance}" if chance < 60 else ""
        number = next(self.ids)
        # Only ids that end in hexadecimal digits give their outbox entries a mark.
        own_id = f"{self.item}-{number:08x}" if number % 3 else f"{self.item}-r{number}"
        request = Request(own_id, f"user-{user}", quantity, key)
        self.used.append(request)
        return request
