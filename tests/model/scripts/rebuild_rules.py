"""Faults, and calls that rebuild a sale, for both the server and the model."""

from dataclasses import replace
from typing import cast

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from flashsale.reservations import FINAL, Record, State
from flashsale.sale import Predecessor
from flashsale_operator.sales.recovery import Fenced, Step, Trusted
from tests.model.scripts import rebuild_model
from tests.model.scripts.item import OTHER_RUN, THIS_RUN, Manifest, buyers_of, units
from tests.model.scripts.machine import (
    FORMER,
    HOUR_MS,
    LEASE_MS,
    OTHER_SERVER,
    OWN_ENGINE,
    PARTS,
    SALES,
    chances,
    engines,
    stocks,
)
from tests.model.scripts.reservation_rules import ReservationRules

miscounts = st.sampled_from(["", "reservations", "buyers", "holds"])
"""The part that the first `trust` of a rebuild counts wrong."""
interruptions = st.sampled_from(["", "", "undrained", "closed"])
"""Why a rebuild before it cannot begin."""


class RebuildRules(ReservationRules):
    """Restarts the server, loses keys, lets time pass, and rebuilds."""

    @rule(chance=chances)
    @precondition(lambda self: self.model.sale is not None and self.model.sale.run == THIS_RUN)
    def restart(self, chance: int) -> None:
        if chance < 40:
            self.change_run()

    def change_run(self) -> None:
        """Makes the hash look as if it was written under another run of the server."""
        self.hash.run = OTHER_RUN
        self.set_field("run_id", OTHER_SERVER)

    @rule(
        sale_id=st.sampled_from([*SALES[:1] * 4, SALES[1]]),
        calls=st.lists(
            st.tuples(
                st.sampled_from(["fence", "wait", "begin", "begin"]),
                st.sampled_from([1, 0, -1]),
                st.sampled_from([(0, 0), (0, 0), (1, 0), (1, 1), (1, 2), (0, 1)]),
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
        calls: list[tuple[Step, int, tuple[int, int], bool, int]],
        engine: str,
        chance: int,
    ) -> None:
        """Makes a few calls of rebuilds, which may be interrupted."""
        if chance < 20 or self.model.fenced or self.model.sale is None:
            first, *others = calls
            if chance % 4:  # otherwise the mark may be gone, or another rebuild's
                first = ("fence", *first[1:])
            for call in (first, *others):
                self._fence(sale_id, engine, *call)

    def _fence(
        self,
        sale_id: str,
        engine: str,
        step: Step,
        above: int,
        more: tuple[int, int],
        leased: bool,
        again: int,
    ) -> None:
        """`more` are the accepted and the no longer held units that Redis lacks."""
        sale = self.model.sale
        accepted, held, released = (
            (0, 0, 0) if sale is None else (sale.accepted, sale.held, sale.released)
        )
        other = Predecessor(SALES[1 - SALES.index(sale_id)], accepted, released)
        if sale is None or sale.manifest.sale_id != sale_id:
            manifest = Manifest(sale_id, 1, 5, replaces=other, engine=engine)
        else:
            manifest = replace(sale.manifest, replaces=other, engine=engine)
        if step == "fence" or again < 10:
            self.claim = self.next_revision(above)
        self.revision = max(self.revision, self.claim)
        self.highest_limit = max(self.highest_limit, manifest.max_per_user)
        accepted, held = accepted + more[0], held + more[0] - more[1]
        # A hash of the previous version does not tell when it was rebuilt.
        rebuilt = sale.rebuilt + (60 <= again < 90) if sale is not None and sale.rebuilt else 0
        closed = sale is not None and sale.state == "closed"
        expected = rebuild_model.fence(
            self.model,
            manifest,
            self.claim,
            step,
            accepted=accepted,
            held=held,
            rebuilt=rebuilt,
            closed=closed,
            same_run=again < 90,
            leased=leased,
        )
        call = self.server.recovery.fence(
            self.spec(manifest),
            self.claim,
            step=step,
            recorded=accepted,
            held=held,
            rebuilt=rebuilt,
            engine_id=engine,
            run_id=self.server.run_id if again < 90 else OTHER_SERVER,
            closed=closed,
            replaces=manifest.replaces,
            lease_ms=LEASE_MS if leased else 0,
        )
        assert self.server.run(call) is expected
        self.seen(f"fence: {expected}")

    @rule(wrong=miscounts, early=interruptions)
    @precondition(lambda self: self.model.fenced)
    def rebuild(self, wrong: str, early: str) -> None:
        """Rebuilds from a ledger that has recorded everything and whose row matches the hash.

        A rebuild before it is too `early`, because it does not wait for Kafka, or because the sale
        is closed meanwhile.
        """
        if early:
            sale = self.hash.manifest
            self._fence(sale.sale_id, sale.engine, "fence", 1, (0, 0), False, 50)
            if early == "closed":
                self.close_sale(sale.sale_id, self.next_revision(1), OWN_ENGINE)
                self.drain_outbox()
            self._fence(sale.sale_id, sale.engine, "begin", 0, (0, 0), False, 50)
        self.drain_outbox()
        manifest, closed = self.hash.manifest, self.hash.state == "closed"
        claim = self.revision = max(self.revision, manifest.revision) + 1
        records = {
            own_id: self._with_time_left(record) for own_id, record in self.model.ledger.items()
        }
        rebuild_model.rebuild(self.model, claim, records)
        self.server.run(self._rebuild(manifest, claim, records, wrong, closed=closed))
        self.seen("rebuilt")
        if self.model.holds:
            self.seen("rebuilt with holds")

    def _with_time_left(self, record: Record) -> Record:
        """Returns a hold that does not expire within its length, or within a minute."""
        if record.state is not State.HELD or record.expires_ms is None:
            return record
        least_ms = min(60_000, record.expires_ms - record.accepted_ms)
        now_ms = self.zero_ms + self.hash.last_hour * HOUR_MS
        return record._replace(expires_ms=max(record.expires_ms, now_ms + least_ms))

    async def _rebuild(
        self,
        manifest: Manifest,
        claim: int,
        ledger: dict[str, Record],
        wrong: str,
        *,
        closed: bool,
    ) -> None:
        recovery, spec = self.server.recovery, self.spec(manifest)
        for step, expected in _STEPS:
            answer = await recovery.fence(
                spec, claim, step=step, engine_id=manifest.engine, closed=closed
            )
            assert answer is expected
        own = self.keys
        assert not self.server.redis.exists(own.buyers, own.reservations, own.holds)
        records = ledger.values()
        buyers = buyers_of(records)
        if ledger:
            restored = await recovery.restore(self.item, claim, buyers=buyers)
            assert restored is Trusted.RESTORED
            restored = await recovery.restore(self.item, claim, records=[*ledger.items()])
            assert restored is Trusted.RESTORED
        counts = {
            "reservations": len(ledger),
            "buyers": len(buyers),
            "holds": sum(record.state is State.HELD for record in records),
        }

        async def trust(**found: int) -> Trusted:
            return await recovery.trust(
                self.item,
                claim,
                self.server.run_id,
                accepted=units(records, *State),
                released=units(records, *FINAL),
                held=units(records, State.HELD),
                **found,
            )

        if wrong:
            assert await trust(**counts | {wrong: counts[wrong] + 1}) is Trusted.INCOMPLETE
        assert await trust(**counts) is Trusted.TRUSTED

    @rule(hours=st.sampled_from([1, 1, 2, 3]))
    @precondition(lambda self: self.model.sale is not None)
    def pass_time(self, hours: int) -> None:
        self.pass_hours(hours)

    @rule(part=st.sampled_from([*PARTS, "sale", "holds", "holds"]), chance=chances)
    def lose(self, part: str, chance: int) -> None:
        if chance < 20:  # rare, because most calls after a loss do nothing
            self.lose_part(part)
            self.crowd(chance % 6, 2)

    @rule(chance=chances)
    @precondition(lambda self: self.model.sale is not None)
    def age(self, chance: int) -> None:
        """Makes the keys look as if the previous version had written them, where it could."""
        if chance > 20:
            return
        redis, keys = self.server.redis, self.keys
        fields = cast("dict[str, str]", redis.hgetall(keys.sale))
        old = [name for name, value in FORMER.items() if fields.get(name) == value]
        redis.hdel(keys.sale, "stock", *old)
        self.hash.stock = None
        for own_id, record in (self.model.reservations or {}).items():
            if record.version == 1 and record.expires_ms is None:
                text = ",".join(map(str, ("accepted", *record[1:6])))
                redis.hset(keys.reservations, own_id, text)
                self.seen("aged")

    @rule(stock=stocks, chance=chances)
    @precondition(lambda self: not self.model.fenced and not self.model.useless(""))
    def apply_former(self, stock: int, chance: int) -> None:
        """Applies another stock as the previous version does, which does not write it."""
        if chance > 20:
            return
        sale = self.hash
        self.revision = self.next_revision(1)
        sale.manifest = replace(sale.manifest, stock=stock, revision=self.revision)
        sale.allocated = max(stock, sale.accepted - sale.released)
        self.set_field("revision", str(self.revision))
        self.set_field("allocated", str(sale.allocated))


_STEPS: tuple[tuple[Step, Fenced], ...] = (
    ("fence", Fenced.FENCED),
    ("wait", Fenced.FENCED),
    ("begin", Fenced.BEGUN),
)
