"""Decisions in a small model: no sale ever sells more units than it was allocated.

Reconcilers die between any two steps. Redis restarts, from older copies or empty. Holds are
confirmed or end, and ended ones are for sale again after Kafka has their events. The model's
Redis follows `apply.lua` and `close.lua`. The tests in tests/servers/contract check the scripts
themselves.
"""

from dataclasses import replace
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flashsale.clocks import ServerTime
from flashsale.inventory import Applied
from flashsale.ledger import SaleRow
from flashsale.sale import Predecessor, Sale, SaleSpec, SaleState, utc_of_ms
from flashsale_operator.sales.decision import (
    Apply,
    Done,
    Observed,
    Reason,
    Rebuild,
    StillFenced,
    WriteRow,
    decide,
    spec_of,
)
from flashsale_operator.sales.reconciler import MAX_STEPS
from tests.support.observations import NOW_MS, OTHER, SPEC, a_row, a_sale
from tests.support.sequences import run_sequences

SALE_IDS = (SPEC.sale_id, OTHER.sale_id)
specs = st.builds(
    SaleSpec,
    sale_id=st.sampled_from((*SALE_IDS, SPEC.sale_id, SPEC.sale_id)),
    item_id=st.just(SPEC.item_id),
    stock=st.integers(1, 2),
    paused=st.sampled_from([False, False, False, True]),
    hold_seconds=st.sampled_from([None, 1]),
    ends_ms=st.sampled_from([None, None, None, NOW_MS + 3]),
)


class Counts(NamedTuple):
    """Units of a sale, and the highest capacity that an event had."""

    accepted: int = 0
    held: int = 0
    released: int = 0
    capacity: int = 0


NOTHING = Counts()


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.server = ServerTime(NOW_MS, "run-1")
        self.rows: dict[str, SaleRow] = {}
        self.sale: Sale | None = None
        self.ended = 0
        """Units of ended holds whose events are in the outbox."""
        self.copies: list[tuple[Sale | None, int]] = [(None, 0)]
        self.events = dict.fromkeys(SALE_IDS, NOTHING)
        """The counts of all events of a sale, with those that only living pods have."""
        self.allocated = dict.fromkeys(SALE_IDS, 0)

    @rule(spec=specs, lives=st.sampled_from([MAX_STEPS, MAX_STEPS, 1, 2, 3, 4]))
    def apply(self, spec: SaleSpec, lives: int) -> None:
        """A reconciler applies the manifest, and may die after a few steps."""
        self._reconcile(spec, lives)

    @precondition(lambda self: self.sale is not None)
    @rule(sale_id=st.sampled_from(SALE_IDS), reaches_redis=st.booleans())
    def close(self, sale_id: str, reaches_redis: bool) -> None:
        row = self.rows.get(sale_id)
        if row is None:
            return
        if not row.closed:
            row = self.rows[sale_id] = replace(
                row,
                closed=True,
                closed_at=utc_of_ms(self.server.now_ms),
                revision=row.revision + 1,
            )
        sale = self.sale
        if reaches_redis and sale is not None and sale.sale_id == sale_id:
            over = sale.stored_state != "closed" and sale.finished(self.server.now_ms)
            state = "ended" if over else "closed"
            self.sale = replace(sale, stored_state=state, revision=row.revision)

    @precondition(lambda self: self._state() is SaleState.SELLING)
    @rule(all_of_it=st.booleans())
    def sell(self, all_of_it: bool) -> None:
        assert self.sale is not None
        units = self.sale.available if all_of_it else 1
        held = units if self.sale.hold_ms else 0
        capacity = self.sale.allocated + self.sale.released
        self._change(accepted=units, held=held, capacity=capacity)

    @precondition(lambda self: self._holds_can_end())
    @rule(confirmed=st.booleans())
    def end_a_hold(self, confirmed: bool) -> None:
        self._change(held=-1, released=0 if confirmed else 1)
        self.ended += not confirmed

    @rule()
    def publish_and_record(self) -> None:
        """Living pods have their events in memory, even if Redis was wiped."""
        for sale_id, row in self.rows.items():
            said = self.events[sale_id]
            self.rows[sale_id] = replace(
                row,
                accepted=said.accepted,
                held=said.held,
                released=said.released,
                capacity=max(row.capacity, said.capacity),
            )
        if self.sale is not None:
            trusted = self.sale.run_id == self.server.run_id
            released = self.sale.released + (self.ended if trusted else 0)
            self.sale = replace(self.sale, released=released, outbox_length=0)
        self.ended = 0

    @precondition(lambda self: self.sale is not None)
    @rule()
    def copy(self) -> None:
        self.copies.append((self.sale, self.ended))

    @rule(copy=st.none() | st.integers(0, 5))
    def restart(self, copy: int | None) -> None:
        self.server = ServerTime(self.server.now_ms, f"{self.server.run_id}+")
        if copy is not None:
            self.sale, self.ended = self.copies[copy % len(self.copies)]

    @precondition(lambda self: self.sale is not None)
    @rule()
    def flush(self) -> None:
        self.sale, self.ended = None, 0

    @rule()
    def time_passes(self) -> None:
        self.server = ServerTime(self.server.now_ms + 1, self.server.run_id)

    @invariant()
    def nothing_is_sold_twice(self) -> None:
        for sale_id, said in self.events.items():
            assert said.accepted - said.released <= self.allocated[sale_id]

    @invariant()
    def the_ledger_takes_what_is_sold(self) -> None:
        for row in self.rows.values():
            said = self.events[row.sale_id]
            assert said.accepted <= max(row.capacity, said.capacity)

    def _change(self, **changes: int) -> None:
        """Adds to the counts of Redis' sale and to those of its events."""
        assert self.sale is not None
        accepted, held = changes.get("accepted", 0), changes["held"]
        self.sale = replace(
            self.sale,
            accepted=self.sale.accepted + accepted,
            held=self.sale.held + held,
            outbox_length=1,
        )
        said = self.events[self.sale.sale_id]
        self.events[self.sale.sale_id] = Counts(
            said.accepted + accepted,
            said.held + held,
            said.released + changes.get("released", 0),
            max(said.capacity, changes.get("capacity", 0)),
        )

    def _holds_can_end(self) -> bool:
        """Paused, ended and closed sales confirm and expire holds too."""
        sale = self.sale
        return sale is not None and sale.held > 0 and self._state() is not SaleState.FENCED

    def _state(self) -> SaleState | None:
        if self.sale is None:
            return None
        return self.sale.state(self.server.now_ms, self.server.run_id)

    def _reconcile(self, spec: SaleSpec, lives: int) -> None:
        written: int | None = None
        seeded = False
        still_fenced: StillFenced | None = None
        for _ in range(lives):
            seen = Observed(
                server=self.server,
                sale=self.sale,
                row=self.rows.get(spec.sale_id),
                others=tuple(row for row in self.rows.values() if row.sale_id != spec.sale_id),
                written=written,
                seeded=seeded,
                still_fenced=still_fenced,
                before=self.rows.get(spec.sale_id),
            )
            match decide(spec, seen):
                case WriteRow() as step:
                    written = self._write_row(spec, step)
                case Rebuild(row, replaces):
                    still_fenced = self._rebuild(row, replaces)
                case Apply() as step:
                    seeded = seeded or step.seed_until_ms is not None
                    assert self._apply(step) not in (Applied.STALE, Applied.MISSING)
                case Done(reason=reason):
                    assert reason is not Reason.SUPERSEDED, "no other writer exists"
                    return
        assert lives < MAX_STEPS, "a reconcile always ends"

    def _write_row(self, spec: SaleSpec, step: WriteRow) -> int:
        old = self.rows.get(spec.sale_id)
        revision = max(old.revision if old else 0, step.above) + 1
        if old is None:
            self.rows[spec.sale_id] = a_row(spec, revision=revision)
        else:
            self.rows[spec.sale_id] = a_row(
                spec,
                revision=revision,
                accepted=old.accepted,
                held=old.held,
                released=old.released,
                capacity=max(old.capacity, spec.stock + old.released),
            )
        self.allocated[spec.sale_id] = max(self.allocated[spec.sale_id], spec.stock)
        return revision

    def _rebuild(self, row: SaleRow, replaces: Predecessor | None) -> StillFenced | None:
        """Rebuilds like the scripts: the events of living pods are recorded first."""
        sale = self.sale
        other = sale is not None and sale.sale_id != row.sale_id
        if sale is not None and other and not self._replaceable(sale, replaces):
            return StillFenced(("Redis has another sale of the item",))
        self.publish_and_record()
        known = self.rows[row.sale_id]
        self.rows[row.sale_id] = known = replace(known, revision=known.revision + 1)
        spec = spec_of(known)
        self.sale = a_sale(
            spec,
            revision=known.revision,
            run_id=self.server.run_id,
            accepted=known.accepted,
            released=known.released,
            held=known.held,
            allocated=max(spec.stock, known.accepted - known.released),
            stored_state="closed" if known.closed else "paused" if known.paused else "open",
        )
        return None

    def _replaceable(self, sale: Sale, replaces: Predecessor | None) -> bool:
        return (
            replaces == (sale.sale_id, sale.accepted, sale.released)
            and sale.finished(self.server.now_ms)
            and not sale.outbox_length
            and not sale.held
        )

    def _apply(self, step: Apply) -> Applied:  # noqa: PLR0911 - one per answer of the script
        spec, sale, now_ms = spec_of(step.row), self.sale, self.server.now_ms
        seeded = a_sale(spec, revision=step.row.revision, run_id=self.server.run_id)
        if sale is None or sale.sale_id != spec.sale_id:
            if sale is not None and not self._replaceable(sale, step.replaces):
                return Applied.CONFLICT
            if step.seed_until_ms is None:
                return Applied.MISSING
            self.sale = seeded
            return Applied.SEEDED
        if step.row.revision < sale.revision:
            return Applied.STALE
        if sale.run_id != self.server.run_id:
            return Applied.FENCED
        if sale.stored_state != "closed" and sale.finished(now_ms):
            self.sale = replace(sale, stored_state="ended")
            return Applied.ENDED
        self.sale = replace(
            seeded, allocated=max(spec.stock, sale.taken), accepted=sale.accepted,
            released=sale.released, held=sale.held, outbox_length=sale.outbox_length,
        )  # fmt: skip
        return Applied.CHANGED


def test_no_sale_sells_more_units_than_it_was_allocated() -> None:
    run_sequences(World, 300, steps=30)
