"""The invariants of `decide` under all observations."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flashsale.clocks import ServerTime
from flashsale.sale import SaleSpec, SaleState, utc_of_ms
from flashsale_operator.kubernetes.queue import Key
from flashsale_operator.sales.decision import (
    SEED_MS,
    Apply,
    Done,
    Observed,
    Reason,
    Rebuild,
    WriteRow,
    decide,
    spec_of,
    untrusted,
)
from tests.support.observations import (
    NOW_MS,
    OTHER,
    SERVER,
    SPEC,
    STILL_FENCED,
    a_row,
    a_sale,
)

SOON = NOW_MS + SEED_MS

times = st.none() | st.integers(NOW_MS - 3, NOW_MS + 3)
specs = st.builds(
    SaleSpec,
    sale_id=st.sampled_from([SPEC.sale_id, OTHER.sale_id, "yard/older"]),
    item_id=st.just(SPEC.item_id),
    stock=st.integers(0, 3),
    ends_ms=times,
    paused=st.booleans(),
)
counts = st.sampled_from([(0, 0, 0), (1, 0, 0), (1, 0, 1), (2, 1, 0), (2, 1, 1), (3, 0, 2)])


def with_counts(record: Any, units: tuple[int, int, int]) -> Any:  # noqa: ANN401 - a row or a sale
    accepted, released, held = units
    return replace(record, accepted=accepted, released=released, held=held)


rows = st.builds(
    with_counts,
    st.builds(
        a_row,
        specs,
        closed=st.booleans(),
        revision=st.integers(1, 3),
        closed_at=st.none() | st.integers(NOW_MS - 3, NOW_MS).map(utc_of_ms),
    ).map(lambda row: replace(row, revision=row.revision + row.closed)),  # a close is a change
    counts,
)
sales = st.builds(
    with_counts,
    st.builds(
        a_sale,
        specs,
        run_id=st.sampled_from(["run-0", "run-1"]),
        revision=st.integers(1, 3),
        stored_state=st.sampled_from(["open", "paused", "ended", "closed"]),
        outbox_length=st.integers(0, 1),
        torn=st.booleans(),
        engine=st.sampled_from(["", "e-1"]),
    ),
    counts,
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[SaleSpec, Observed]:
    spec = draw(specs)
    all_rows = {row.sale_id: row for row in draw(st.lists(rows, max_size=2))}
    row = all_rows.pop(spec.sale_id, None)
    seen = Observed(
        server=ServerTime(NOW_MS, "run-1"),
        sale=draw(st.none() | sales),
        row=row,
        others=tuple(all_rows.values()),
        written=draw(st.none() | st.integers(1, 3)),
        seeded=draw(st.booleans()),
        still_fenced=draw(st.none() | st.just(STILL_FENCED)),
        engine_id="e-1",
        before=row and with_counts(row, draw(counts)),
    )
    return spec, seen


@given(situations())
def test_no_observation_leads_to_selling_a_unit_twice(situation: tuple[SaleSpec, Observed]) -> None:
    spec, seen = situation
    row, sale = seen.row, seen.sale
    action = decide(spec, seen)
    own = sale if sale is not None and sale.sale_id == spec.sale_id else None
    match action:
        case Apply():
            assert action.row is row, "Redis gets the contents of the ledger"
            assert not row.closed
            if own is None:
                assert action.seed_until_ms == SOON
                assert seen.written == row.revision == 1
                assert not seen.seeded
                if sale is not None:
                    assert sale.finished(NOW_MS)
                    assert sale.outbox_length == 0
                    assert sale.held == 0
                    assert action.replaces == (sale.sale_id, sale.accepted, sale.released)
                    assert Key.of(sale.sale_id).namespace == Key.of(spec.sale_id).namespace
            else:
                assert action.seed_until_ms is None
                assert action.replaces is None
                assert row.revision >= own.revision
                assert not untrusted(seen.before, own, SERVER)
                if not own.finished(NOW_MS) or own.stored_state == "closed":
                    assert spec_of(row) == spec
        case WriteRow():
            assert action.others == seen.others
            if row is not None and row.closed and not (own and own.revision > row.revision):
                assert not row.ended(utc_of_ms(NOW_MS)), "an ended sale stays ended"
            if own is not None:
                assert own.stored_state == "closed" or not own.finished(NOW_MS), (
                    "an ended sale stays ended"
                )
            elif row is None or row.closed:
                assert not any(other.held for other in seen.others), "its holds need the item"
        case Done(state, reason, message):
            assert message
            if reason is Reason.APPLIED and state is not SaleState.ENDED:
                assert own is not None
                assert row is not None
                assert spec_of(row) == spec
                assert own.revision == row.revision
                assert own.allocated == max(spec.stock, own.taken)
                assert not untrusted(seen.before, own, SERVER)
                assert own.engine == seen.engine_id
        case Rebuild():
            assert action.row is row
            assert seen.still_fenced is None
