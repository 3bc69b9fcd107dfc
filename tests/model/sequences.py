"""Random sequences of calls of the Lua scripts, with faults and rebuilds between them."""

from dataclasses import replace
from typing import cast

from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
)

from flashsale.errors import ContractViolation
from flashsale.reservations import BatchReply, Outcome, Record
from flashsale.sale import Predecessor
from flashsale_operator.sales.recovery import Fenced, Step, Trusted
from tests.model.on_server import LEASE_MS, OTHER_SERVER, PARTS, OnServer
from tests.model.scripts import OTHER_RUN, THIS_RUN, Hash, Manifest

SALES = ("default/first", "default/second")
OWN_ENGINE = "own"
NO_ENTRY = "1-1"

chances = st.sampled_from(range(100))
stocks = st.sampled_from([8, 12, 5, 3, 1, 0])
limits = st.sampled_from([2, 3, 4, 1])
pauses = st.sampled_from([False] * 5 + [True])
sales = st.sampled_from(SALES)
engines = st.sampled_from([OWN_ENGINE] * 20 + ["other", ""])
"""The caller's engine. The previous version has none."""
revisions = st.sampled_from([0, 0, 1, 1, 1, 2, -1])
"""Difference between a call's revision and the highest used revision."""
_STEPS: tuple[tuple[Step, Fenced], ...] = (
    ("fence", Fenced.FENCED),
    ("wait", Fenced.FENCED),
    ("begin", Fenced.BEGUN),
)


class Scripts(OnServer):
    """Each rule makes the same call on the server and on the model."""

    # The calls.

    @initialize(stock=stocks, limit=limits, paused=pauses, engine=engines)
    def seed(self, stock: int, limit: int, paused: bool, engine: str) -> None:
        manifest = Manifest(SALES[0], 1, stock, limit, paused=paused, may_seed=True, engine=engine)
        self._apply(manifest)

    @rule(
        sale_id=st.sampled_from([*SALES[:1] * 4, SALES[1]]),
        above=revisions,
        stock=stocks,
        limit=limits,
        window=st.tuples(
            st.sampled_from([None, None, None, -1, 1]),
            st.sampled_from([None, None, None, -1, 2, 4]),
        ),
        paused=pauses,
        may_seed=st.booleans(),
        replaces=st.sampled_from([None, 0, 0, 1]),
        engine=engines,
    )
    def apply(
        self,
        sale_id: str,
        above: int,
        stock: int,
        limit: int,
        window: tuple[int | None, int | None],
        paused: bool,
        may_seed: bool,
        replaces: int | None,
        engine: str,
    ) -> None:
        held = self.model.sale
        accepted = 0 if held is None else held.accepted
        other = SALES[1 - SALES.index(sale_id)]
        self._apply(
            Manifest(
                sale_id,
                self._revision(above),
                stock,
                limit,
                *window,
                paused=paused,
                may_seed=may_seed,
                replaces=None if replaces is None else Predecessor(other, accepted + replaces),
                engine=engine,
            )
        )

    @rule(stock=stocks, limit=limits, paused=pauses, again=chances, engine=engines)
    @precondition(lambda self: self.model.sale is not None)
    def edit(self, stock: int, limit: int, paused: bool, again: int, engine: str) -> None:
        """Applies the same sale again, mostly with a new revision and other values."""
        sale = cast("Hash", self.model.sale)
        manifest = replace(sale.manifest, may_seed=False, replaces=None, engine=engine)
        if again > 25:
            manifest = replace(
                manifest,
                revision=self._revision(1),
                stock=stock,
                max_per_user=limit,
                paused=paused,
            )
        self._apply(manifest)

    @rule(
        wanted=st.lists(
            st.tuples(st.integers(0, 5), st.sampled_from([1, 1, 2, 3]), chances),
            min_size=1,
            max_size=6,
        ),
        engine=engines,
    )
    def reserve(self, wanted: list[tuple[int, int, int]], engine: str = OWN_ENGINE) -> None:
        batch = [self._request(*one) for one in wanted]
        before = self.model.sale and replace(self.model.sale)
        fenced = self.model.fenced
        expected = self.model.reserve(batch, engine)
        call = self.server.inventory.reserve(self.item, batch, timeout_seconds=10, engine_id=engine)
        reply = self.server.run(call)
        if not isinstance(reply, BatchReply):
            assert reply is expected
            self.server.seen[reply] += 1
            return
        assert [answer.outcome for answer in reply.answers] == expected
        sale = cast("Hash", self.model.sale)
        for request, (outcome, detail) in zip(batch, reply.answers, strict=True):
            self.server.seen[outcome] += 1
            if outcome is Outcome.ACCEPTED:
                assert before is not None
                assert before.state == "open"
                assert not fenced
                assert not before.finished
                self.model.outbox = (self.model.outbox or {}) | {detail: request.reservation_id}
                self.engine_of[request.reservation_id] = sale.manifest.engine
            elif outcome is Outcome.REPLAYED:
                known = (self.model.reservations or {})[request.reservation_id]
                record = Record.parse(detail)
                assert (record.state, record.version) == ("accepted", 1)
                assert record[2] == known.quantity
                assert record[4:] == (known.user_id, known.request_key)
        manifest = sale.manifest
        capacity = sale.allocated + sale.released
        numbers = (manifest.sale_id, sale.allocated, capacity, manifest.revision)
        assert reply.snapshot == (*numbers, manifest.engine)
        assert reply.available == capacity - sale.accepted
        assert reply.outbox_length == len(self.model.outbox or {})
        assert reply.starts_ms == (self._ms(manifest.starts_hour) or 0)

    @rule(first=st.integers(0, 5), size=st.integers(2, 6))
    def crowd(self, first: int, size: int) -> None:
        """Sends a batch of users who each want one unit."""
        self.reserve([((first + n) % 6, 1, 99) for n in range(size)])

    @rule(picks=st.lists(st.tuples(st.integers(0, 9), chances), min_size=1, max_size=5))
    def settle(self, picks: list[tuple[int, int]]) -> None:
        """Settles entries, some with the id of another reservation and some that do not exist."""
        outbox = list((self.model.outbox or {}).items())
        pairs = []
        for pick, chance in picks:
            entry, identity = outbox[pick % len(outbox)] if outbox else (NO_ENTRY, "no-id")
            if chance < 20:
                identity = outbox[(pick + 1) % len(outbox)][1] if outbox else "no-id"
            elif chance < 30:
                entry = NO_ENTRY
            elif chance < 40 and self.retired:
                entry, identity = self.retired[pick % len(self.retired)]
            pairs.append((entry, identity))
        expected = self.model.settle(pairs)
        assert self.server.run(self.server.outbox.settle(self.item, pairs)) == expected
        self.retired += pairs
        self.server.seen["settled"] += expected

    @rule()
    def drain(self) -> None:
        pairs = list((self.model.outbox or {}).items())
        expected = self.model.settle(pairs)
        if pairs:
            assert self.server.run(self.server.outbox.settle(self.item, pairs)) == expected

    @rule(sale_id=st.sampled_from([SALES[0], *SALES]), above=revisions, chance=chances,
          engine=engines)  # fmt: skip
    def close(self, sale_id: str, above: int, chance: int, engine: str) -> None:
        if chance > 50:
            return
        revision = self._revision(above)
        expected = self.model.close(sale_id, revision, engine)
        call = self.server.inventory.close(self.item, sale_id, revision, engine)
        assert self.server.run(call) is expected
        self.server.seen[f"close: {expected}"] += 1

    @rule(stock=stocks, limit=limits, chance=chances)
    @precondition(lambda self: self.model.sale is not None)
    def succeed(self, stock: int, limit: int, chance: int) -> None:
        """Closes the sale, and applies another one in its place, drained or not."""
        if chance > 15:
            return
        sale = cast("Hash", self.model.sale)
        former, revision = sale.manifest.sale_id, self._revision(1)
        expected = self.model.close(former, revision, OWN_ENGINE)
        call = self.server.inventory.close(self.item, former, revision, OWN_ENGINE)
        assert self.server.run(call) is expected
        self._apply(
            Manifest(
                SALES[1 - SALES.index(former)],
                self._revision(1),
                stock,
                limit,
                may_seed=True,
                replaces=Predecessor(former, sale.accepted),
                engine=OWN_ENGINE,
            )
        )

    @rule(sale_id=st.sampled_from([SALES[0], *SALES]), above=st.sampled_from([0, 0, 0, -1]),
          more=st.sampled_from([0, 0, 0, 1]), engine=engines)  # fmt: skip
    def free(self, sale_id: str, above: int, more: int, engine: str) -> None:
        sale = self.model.sale
        revision = above + (sale.manifest.revision if sale else self.revision)
        recorded = more + (sale.accepted if sale else 0)
        expected = self.model.free(sale_id, revision, recorded, engine)
        call = self.server.inventory.free(self.item, sale_id, revision, recorded, engine)
        assert self.server.run(call) is expected
        self.server.seen[f"free: {expected}"] += 1

    @rule(count=st.sampled_from([1, 500]))
    def page(self, count: int) -> None:
        """Reads all reservations, as a republishing does."""
        expected = self.model.page()
        try:
            found = self.server.run(self._pages(count))
        except ContractViolation:
            assert expected in {Outcome.UNKNOWN, Outcome.FENCED}
        else:
            assert found == expected

    async def _pages(self, count: int) -> set[str]:
        sale, found = cast("Hash", self.model.sale), set()
        pages = self.server.inventory.reservation_pages(self.item, count)
        async for snapshot, page in pages:
            assert snapshot.revision == sale.manifest.revision
            assert snapshot.engine == sale.manifest.engine
            assert snapshot.capacity == sale.allocated + sale.released
            found |= {reservation_id for reservation_id, _ in page}
        return found

    # Faults and rebuilds.

    @rule(chance=chances)
    @precondition(lambda self: self.model.sale is not None and self.model.sale.run == THIS_RUN)
    def restart(self, chance: int) -> None:
        """Makes the hash look as if it was written under another run of the server."""
        if chance > 40:
            return
        cast("Hash", self.model.sale).run = OTHER_RUN
        self._set("run_id", OTHER_SERVER)

    @rule(
        sale_id=st.sampled_from([*SALES[:1] * 4, SALES[1]]),
        calls=st.lists(
            st.tuples(
                st.sampled_from(["fence", "wait", "begin", "begin"]),
                st.sampled_from([1, 0, -1]),
                st.sampled_from([0, 1]),
                st.booleans(),
                chances,
            ),
            min_size=1,
            max_size=4,
        ),
        engine=engines,
        chance=chances,
    )
    def fence(
        self,
        sale_id: str,
        calls: list[tuple[Step, int, int, bool, int]],
        engine: str,
        chance: int,
    ) -> None:
        """Makes a few calls of rebuilds, which may be interrupted."""
        if chance < 30 or self.model.fenced or self.model.sale is None:
            first, *others = calls
            if chance % 4:  # otherwise the mark may be gone, or another rebuild's
                first = ("fence", *first[1:])
            for call in (first, *others):
                self._fence(sale_id, engine, *call)

    def _fence(
        self, sale_id: str, engine: str, step: Step, above: int, more: int, leased: bool, again: int
    ) -> None:
        sale = self.model.sale
        accepted = 0 if sale is None else sale.accepted
        other = Predecessor(SALES[1 - SALES.index(sale_id)], accepted)
        if sale is None or sale.manifest.sale_id != sale_id:
            manifest = Manifest(sale_id, 1, 5, replaces=other, engine=engine)
        else:
            manifest = replace(sale.manifest, replaces=other, engine=engine)
        if step == "fence" or again < 10:
            self.claim = self._revision(above)
        self.revision = max(self.revision, self.claim)
        self.highest_limit = max(self.highest_limit, manifest.max_per_user)
        recorded = accepted + more
        closed = sale is not None and sale.state == "closed"
        expected = self.model.fence(
            manifest, self.claim, step, recorded, closed=closed, leased=leased
        )
        call = self.server.recovery.fence(
            self._spec(manifest),
            self.claim,
            step=step,
            recorded=recorded,
            engine_id=engine,
            closed=closed,
            replaces=manifest.replaces,
            lease_ms=LEASE_MS if leased else 0,
        )
        assert self.server.run(call) is expected
        self.server.seen[f"fence: {expected}"] += 1

    @rule()
    @precondition(lambda self: self.model.fenced and not self.model.outbox)
    def rebuild(self) -> None:
        """Rebuilds from a ledger that has recorded everything and whose row matches the hash."""
        sale = cast("Hash", self.model.sale)
        claim = self.revision = max(self.revision, sale.manifest.revision) + 1
        closed = sale.state == "closed"
        self.model.rebuild(claim)
        self.server.run(self._rebuild(sale.manifest, claim, closed=closed))
        self.server.seen["rebuilt"] += 1

    async def _rebuild(self, manifest: Manifest, claim: int, *, closed: bool) -> None:
        recovery, spec = self.server.recovery, self._spec(manifest)
        for step, expected in _STEPS:
            answer = await recovery.fence(
                spec, claim, step=step, engine_id=manifest.engine, closed=closed
            )
            assert answer is expected
        held, taken = self.model.held(), self.model.taken
        records = [
            (identity, Record("accepted", 1, r.quantity, self.zero_ms, r.user_id, r.request_key))
            for identity, r in taken.items()
        ]
        if taken:
            for page in ({"buyers": held}, {"records": records}):
                restored = await recovery.restore(self.item, claim, **page)
                assert restored is Trusted.RESTORED
        ended = await recovery.trust(
            self.item,
            claim,
            self.server.run_id,
            accepted=sum(held.values()),
            released=0,
            reservations=len(taken),
            buyers=len(held),
        )
        assert ended is Trusted.TRUSTED

    @rule(hour=st.sampled_from([1, 2, 3]))
    @precondition(lambda self: self.model.sale is not None and self.model.sale.last_hour < 3)
    def pass_time(self, hour: int) -> None:
        """Makes the sale remember a later time, as if the clock was set back since."""
        sale = cast("Hash", self.model.sale)
        sale.last_hour = max(sale.last_hour, hour)
        self._set("last_now_ms", str(self._ms(sale.last_hour)))

    @rule(part=st.sampled_from(PARTS), chance=chances)
    def lose(self, part: str, chance: int) -> None:
        if chance < 20:  # rare, because most calls after a loss do nothing
            self._lose(part)

    @rule(stock=stocks, limit=limits)
    @precondition(lambda self: self.model.useless(OWN_ENGINE))
    def start_over(self, stock: int, limit: int) -> None:
        """Deletes all keys and seeds a sale, so that the rest of the sequence does something."""
        manifest = Manifest(
            SALES[0], self._revision(1), stock, limit, may_seed=True, engine=OWN_ENGINE
        )
        self._apply(manifest)  # must not repair a lost sale
        for part in PARTS:
            self._lose(part)
        self._apply(manifest)
