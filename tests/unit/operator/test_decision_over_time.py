"""Decisions in a small model: no sale ever sells more units than it was allocated.

Reconcilers die between any two steps. Redis restarts, from older copies or empty. The model's
Redis follows `apply.lua` and `close.lua`. The tests in tests/servers/contract check the scripts
themselves.
"""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flashsale.inventory import Applied, ServerTime
from flashsale.ledger import SaleRow
from flashsale.sale import Predecessor, Sale, SaleSpec, SaleState
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

SALE_IDS = (SPEC.sale_id, OTHER.sale_id)
specs = st.builds(
    SaleSpec,
    sale_id=st.sampled_from((*SALE_IDS, SPEC.sale_id, SPEC.sale_id)),
    item_id=st.just(SPEC.item_id),
    stock=st.integers(1, 2),
    paused=st.sampled_from([False, False, False, True]),
    ends_ms=st.sampled_from([None, None, None, NOW_MS + 3]),
)


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.server = ServerTime(NOW_MS, "run-1")
        self.rows: dict[str, SaleRow] = {}
        self.sale: Sale | None = None
        self.copies: list[Sale | None] = [None]
        self.sold = dict.fromkeys(SALE_IDS, 0)
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
            row = self.rows[sale_id] = replace(row, closed=True, revision=row.revision + 1)
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
        self.sale = replace(self.sale, accepted=self.sale.accepted + units, outbox_length=1)
        self.sold[self.sale.sale_id] += units

    @rule()
    def publish_and_record(self) -> None:
        """Living pods have their accepted events in memory, even if Redis was wiped."""
        for sale_id, row in self.rows.items():
            self.rows[sale_id] = replace(row, accepted=self.sold[sale_id])
        if self.sale is not None:
            self.sale = replace(self.sale, outbox_length=0)

    @precondition(lambda self: self.sale is not None)
    @rule()
    def copy(self) -> None:
        self.copies.append(self.sale)

    @rule(copy=st.none() | st.integers(0, 5))
    def restart(self, copy: int | None) -> None:
        self.server = ServerTime(self.server.now_ms, f"{self.server.run_id}+")
        if copy is not None:
            self.sale = self.copies[copy % len(self.copies)]

    @precondition(lambda self: self.sale is not None)
    @rule()
    def flush(self) -> None:
        self.sale = None

    @rule()
    def time_passes(self) -> None:
        self.server = ServerTime(self.server.now_ms + 1, self.server.run_id)

    @invariant()
    def nothing_is_sold_twice(self) -> None:
        for sale_id in SALE_IDS:
            assert self.sold[sale_id] <= self.allocated[sale_id]

    @invariant()
    def the_ledger_takes_what_is_sold(self) -> None:
        for row in self.rows.values():
            assert self.sold[row.sale_id] <= row.capacity

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
        accepted = old.accepted if old else 0
        capacity = max(old.capacity if old else 0, spec.stock)
        self.rows[spec.sale_id] = a_row(
            spec, revision=revision, accepted=accepted, capacity=capacity
        )
        self.allocated[spec.sale_id] = max(self.allocated[spec.sale_id], spec.stock)
        return revision

    def _rebuild(self, row: SaleRow, replaces: Predecessor | None) -> StillFenced | None:
        """Rebuilds like the scripts: the events of living pods are recorded first."""
        sale = self.sale
        if sale is not None and sale.sale_id != row.sale_id:
            if replaces != (sale.sale_id, sale.accepted) or sale.outbox_length:
                return StillFenced(("Redis has another sale of the item",))
            assert sale.finished(self.server.now_ms)
        self.publish_and_record()
        known = self.rows[row.sale_id]
        self.rows[row.sale_id] = known = replace(known, revision=known.revision + 1)
        spec = spec_of(known)
        self.sale = a_sale(
            spec,
            revision=known.revision,
            run_id=self.server.run_id,
            accepted=known.accepted,
            allocated=max(spec.stock, known.accepted),
        )
        return None

    def _apply(self, step: Apply) -> Applied:  # noqa: PLR0911 - one per answer of the script
        spec, sale, now_ms = spec_of(step.row), self.sale, self.server.now_ms
        seeded = a_sale(spec, revision=step.row.revision, run_id=self.server.run_id)
        if sale is None or sale.sale_id != spec.sale_id:
            if sale is not None and (
                step.replaces != (sale.sale_id, sale.accepted)
                or not sale.finished(now_ms)
                or sale.outbox_length
            ):
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
            seeded, allocated=max(spec.stock, sale.held), accepted=sale.accepted,
            outbox_length=sale.outbox_length,
        )  # fmt: skip
        return Applied.CHANGED


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
