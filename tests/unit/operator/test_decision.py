"""`decide`: each rule, and the invariants under all observations."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsale.clocks import ServerTime
from flashsale.ledger import SaleRow
from flashsale.sale import Predecessor, Sale, SaleSpec, SaleState, utc_of_ms
from flashsale_operator.kubernetes.queue import Key
from flashsale_operator.sales.decision import (
    SEED_MS,
    Action,
    Apply,
    Done,
    Observed,
    Reason,
    Rebuild,
    StillFenced,
    WriteRow,
    decide,
    last_of_items,
    needs_rebuild,
    spec_of,
    state_of,
    untrusted,
)
from tests.support.observations import NOW_MS, OTHER, SERVER, SPEC, a_row, a_sale

NOT_RECORDED = "default/older sold iphone_15 before and is not fully recorded yet"
PAST = replace(SPEC, ends_ms=NOW_MS - 1)
SOON = NOW_MS + SEED_MS
STILL_FENCED = StillFenced(("one", "two"))


def observed(**changes: Any) -> Observed:  # noqa: ANN401 - any field
    return Observed(server=SERVER, **changes)


def outcome(action: Action) -> tuple[SaleState, Reason]:
    assert isinstance(action, Done), action
    return action.state, action.reason


def test_a_new_sale_is_written_into_the_ledger_first() -> None:
    assert decide(SPEC, observed()) == WriteRow(())


def test_keys_are_seeded_for_a_row_that_this_reconcile_inserted() -> None:
    assert decide(SPEC, observed(row=a_row(), written=1)) == Apply(a_row(), seed_until_ms=SOON)


def test_keys_are_seeded_only_once() -> None:
    seen = observed(row=a_row(), written=1, seeded=True)
    assert decide(SPEC, seen) == Rebuild(a_row())


def test_an_older_row_without_keys_is_fenced_until_it_is_rebuilt() -> None:
    lost = observed(row=a_row(accepted=3))
    assert decide(SPEC, lost) == Rebuild(a_row(accepted=3))
    action = decide(SPEC, replace(lost, still_fenced=STILL_FENCED))
    assert action == Done(SaleState.FENCED, Reason.FENCED, "one; two")


def test_a_row_that_this_reconcile_only_changed_is_not_seeded() -> None:
    assert decide(SPEC, observed(row=a_row(revision=2), written=2)) == Rebuild(a_row(revision=2))


def test_a_sale_that_matches_its_manifest_stays_as_it_is() -> None:
    sale = a_sale(accepted=40)
    assert outcome(decide(SPEC, observed(row=a_row(), sale=sale))) == (
        SaleState.SELLING,
        Reason.APPLIED,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"stock": 150},
        {"stock": 50},
        {"paused": True},
        {"max_per_user": 2},
        {"display_name": "iPhone"},
        {"starts_ms": NOW_MS + 1},
        {"ends_ms": NOW_MS + 1},
        {"hold_seconds": 60},
        {"max_expired_holds": 5},
    ],
)
def test_a_change_is_written_to_the_ledger_before_redis(changes: dict[str, Any]) -> None:
    spec = replace(SPEC, **changes)
    assert decide(spec, observed(row=a_row(), sale=a_sale())) == WriteRow((), above=1)
    row = a_row(spec, revision=2)
    assert decide(spec, observed(row=row, sale=a_sale(), written=2)) == Apply(row)
    applied = a_sale(spec, revision=2)
    assert isinstance(decide(spec, observed(row=row, sale=applied, written=2)), Done)


def test_a_revision_that_redis_lacks_is_applied() -> None:
    row = a_row(revision=3)
    assert decide(SPEC, observed(row=row, sale=a_sale(revision=2))) == Apply(row)


def test_stock_below_the_taken_units_is_reported_and_not_applied_endlessly() -> None:
    spec = replace(SPEC, stock=30)
    sale = a_sale(spec, allocated=40, accepted=40)
    assert outcome(decide(spec, observed(row=a_row(spec), sale=sale))) == (
        SaleState.SOLD_OUT,
        Reason.STOCK_BELOW_HELD,
    )
    released = replace(sale, released=5)
    assert decide(spec, observed(row=a_row(spec), sale=released)) == Apply(a_row(spec))


def test_an_older_ledger_takes_a_revision_above_redis() -> None:
    sale = a_sale(revision=7, accepted=9)
    assert decide(SPEC, observed(row=a_row(), sale=sale)) == WriteRow((), above=7)
    assert decide(SPEC, observed(sale=sale)) == WriteRow((), above=7)


def test_the_last_writer_wins_and_the_other_reports_superseded() -> None:
    theirs = a_row(replace(SPEC, stock=7), revision=3)
    mine = observed(row=theirs, sale=a_sale(), written=2)
    assert outcome(decide(SPEC, mine)) == (SaleState.SELLING, Reason.SUPERSEDED)


def test_the_item_of_a_sale_cannot_change() -> None:
    moved = replace(SPEC, item_id="iphone_16")
    assert outcome(decide(moved, observed(row=a_row()))) == (SaleState.UNKNOWN, Reason.ITEM_CHANGED)


@pytest.mark.parametrize("stored_state", ["open", "paused", "ended"])
def test_an_ended_sale_stays_ended(stored_state: str) -> None:
    seen = observed(row=a_row(PAST), sale=a_sale(PAST, stored_state=stored_state))
    assert outcome(decide(PAST, seen)) == (SaleState.ENDED, Reason.APPLIED)
    longer = replace(SPEC, ends_ms=NOW_MS + 60_000)
    assert outcome(decide(longer, seen)) == (SaleState.ENDED, Reason.SALE_ENDED)


def test_an_ended_sale_that_was_also_closed_stays_ended() -> None:
    seen = observed(row=a_row(PAST, closed=True), sale=a_sale(PAST, stored_state="ended"))
    assert outcome(decide(SPEC, seen)) == (SaleState.ENDED, Reason.SALE_ENDED)


def test_a_sale_that_was_closed_after_its_end_stays_ended_without_keys_and_in_a_rebuild() -> None:
    longer = replace(SPEC, ends_ms=NOW_MS + 60_000)
    row = a_row(PAST, closed=True, closed_at=utc_of_ms(NOW_MS))
    for sale in (None, a_sale(PAST, stored_state="closed")):
        seen = observed(row=row, sale=sale)
        assert outcome(decide(longer, seen)) == (SaleState.ENDED, Reason.SALE_ENDED)
        assert outcome(decide(PAST, seen)) == (SaleState.ENDED, Reason.APPLIED)
        for closed_at in (None, utc_of_ms(NOW_MS - 2)):
            earlier = replace(seen, row=replace(row, closed_at=closed_at))
            assert isinstance(decide(longer, earlier), WriteRow), "it was closed before its end"
    held = observed(row=replace(row, accepted=1, held=1))
    assert decide(longer, held) == Rebuild(replace(row, accepted=1, held=1))


def test_a_closed_sale_can_be_continued() -> None:
    seen = observed(
        row=a_row(closed=True, revision=2),
        sale=a_sale(stored_state="closed", revision=2, accepted=4),
    )
    assert decide(SPEC, seen) == WriteRow((), above=2)
    row = a_row(revision=3)
    assert decide(SPEC, replace(seen, row=row, written=3)) == Apply(row)


@pytest.mark.parametrize("changes", [{"run_id": "run-0"}, {"torn": True}])
def test_a_fenced_sale_is_rebuilt(changes: dict[str, Any]) -> None:
    seen = observed(row=a_row(accepted=4), sale=a_sale(accepted=4, **changes))
    assert decide(SPEC, seen) == Rebuild(a_row(accepted=4))
    assert outcome(decide(SPEC, replace(seen, still_fenced=STILL_FENCED))) == (
        SaleState.FENCED,
        Reason.FENCED,
    )


def test_a_sale_with_fewer_units_than_the_ledger_is_rebuilt_under_any_run() -> None:
    row = a_row(accepted=5)
    seen = observed(row=row, sale=a_sale(accepted=4), before=row)
    assert decide(SPEC, seen) == Rebuild(row)
    assert outcome(decide(SPEC, replace(seen, still_fenced=STILL_FENCED))) == (
        SaleState.FENCED,
        Reason.FENCED,
    )


def test_a_sale_with_fewer_ended_holds_than_the_ledger_is_rebuilt_under_any_run() -> None:
    row = a_row(accepted=5, held=2)
    older = a_sale(accepted=6, held=4)
    assert decide(SPEC, observed(row=row, sale=older, before=row)) == Rebuild(row)
    newer = observed(row=row, sale=replace(older, held=3), before=row)
    assert outcome(decide(SPEC, newer)) == (SaleState.SELLING, Reason.APPLIED)


def test_units_that_are_recorded_between_the_reads_are_no_loss() -> None:
    row = a_row(accepted=5)
    seen = observed(row=row, sale=a_sale(accepted=4), before=replace(row, accepted=4))
    assert outcome(decide(SPEC, seen)) == (SaleState.SELLING, Reason.APPLIED)


def test_a_sale_of_the_previous_version_gets_the_id_of_the_engine() -> None:
    row = a_row()
    assert decide(SPEC, observed(row=row, sale=a_sale(), engine_id="e-1")) == Apply(row)
    applied = observed(row=row, sale=a_sale(engine="e-1"), engine_id="e-1")
    assert isinstance(decide(SPEC, applied), Done)


def test_a_rebuild_without_kafka_reports_kafka() -> None:
    seen = observed(
        row=a_row(),
        sale=a_sale(torn=True),
        still_fenced=StillFenced(("Kafka is away",), without_kafka=True),
    )
    assert decide(SPEC, seen) == Done(SaleState.FENCED, Reason.KAFKA_UNAVAILABLE, "Kafka is away")


def test_a_fenced_sale_that_ended_is_rebuilt_without_a_new_row() -> None:
    row = a_row(PAST, accepted=4)
    seen = observed(row=row, sale=a_sale(PAST, run_id="run-0", accepted=4))
    assert decide(PAST, seen) == Rebuild(row)


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("sale", [None, a_sale(PAST, run_id="run-0", accepted=4, revision=2)])
def test_an_ended_sale_that_redis_lost_is_rebuilt(held: int, sale: Sale | None) -> None:
    """Orders are still confirmed again and refunded."""
    row = a_row(PAST, accepted=4, held=held)
    for spec in (PAST, replace(SPEC, ends_ms=NOW_MS + 60_000)):
        seen = observed(row=row, sale=sale)
        assert decide(spec, seen) == Rebuild(row)
        assert outcome(decide(spec, replace(seen, still_fenced=STILL_FENCED))) == (
            SaleState.FENCED,
            Reason.FENCED,
        )


def test_an_ended_sale_whose_item_another_sale_has_had_since_is_not_rebuilt() -> None:
    row, now = a_row(PAST, accepted=4), utc_of_ms(NOW_MS)
    seen = observed(row=row, others=(a_row(OTHER, closed=True, closed_at=now),))
    assert outcome(decide(PAST, seen)) == (SaleState.ENDED, Reason.APPLIED)
    assert decide(PAST, replace(seen, row=replace(row, held=1))) == Rebuild(replace(row, held=1))
    before = utc_of_ms(NOW_MS - 2)
    for older in (
        a_row(OTHER, closed=True, closed_at=before),
        a_row(OTHER, ends_at=before, closed=True, closed_at=now),
        a_row(OTHER, ends_at=before),
        a_row(OTHER, closed=True),
    ):
        assert decide(PAST, replace(seen, others=(older,))) == Rebuild(row), older


def test_a_lost_sale_keeps_its_item_from_another_namespace() -> None:
    other = replace(OTHER, sale_id="yard/older", ends_ms=NOW_MS - 1)
    seen = observed(others=(a_row(other),))
    assert outcome(decide(SPEC, seen)) == (SaleState.ITEM_CONFLICT, Reason.ITEM_CONFLICT)
    assert decide(SPEC, observed(others=(a_row(other, closed=True),))) == WriteRow(
        (a_row(other, closed=True),)
    )
    assert isinstance(
        decide(SPEC, observed(others=(a_row(PAST, sale_id=OTHER.sale_id),))), WriteRow
    )


def test_a_sale_that_was_closed_after_its_end_was_freed() -> None:
    row = a_row(PAST, accepted=4, closed=True, closed_at=utc_of_ms(NOW_MS))
    assert outcome(decide(PAST, observed(row=row))) == (SaleState.ENDED, Reason.APPLIED)


def test_an_ended_sale_that_lacks_an_ended_hold_is_rebuilt() -> None:
    row = a_row(PAST, accepted=4)
    seen = observed(row=row, sale=a_sale(PAST, accepted=4, held=1), before=row)
    assert decide(PAST, seen) == Rebuild(row)


@pytest.mark.parametrize(
    ("row", "sale", "state"),
    [
        (a_row(closed=True), None, SaleState.CLOSING),
        (a_row(closed=True, held=1), None, SaleState.FENCED),
        (a_row(PAST, held=1), None, SaleState.FENCED),
        (a_row(closed=True, held=1), a_sale(stored_state="closed"), SaleState.CLOSING),
        (
            a_row(closed=True, held=1),
            a_sale(stored_state="closed", run_id="run-0"),
            SaleState.FENCED,
        ),
        (a_row(closed=True), a_sale(stored_state="closed", run_id="run-0"), SaleState.CLOSING),
        (a_row(PAST), None, SaleState.FENCED),
        (a_row(PAST), a_sale(OTHER), SaleState.ENDED),
    ],
)
def test_a_finished_sale_is_fenced_with_open_holds_or_if_redis_lost_its_end(
    row: SaleRow, sale: Sale | None, state: SaleState
) -> None:
    assert state_of(row, sale, SERVER, last=True) is state
    if not row.held and sale is None:
        assert state_of(row, sale, SERVER) in (SaleState.CLOSING, SaleState.ENDED)


def test_the_last_sale_of_an_item_left_it_last_or_has_it_still() -> None:
    times = [utc_of_ms(NOW_MS + number) for number in range(3)]
    first = a_row(sale_id="a/first", ends_at=times[0], closed=True, closed_at=times[2])
    second = a_row(sale_id="a/second", closed=True, closed_at=times[1])
    third = a_row(sale_id="a/third")
    elsewhere = a_row(sale_id="a/elsewhere", item_id="pixel_8")
    assert last_of_items([second, elsewhere, first]) == {"a/second", "a/elsewhere"}
    assert last_of_items([first, third, second]) == {"a/third"}
    assert last_of_items([]) == frozenset()


def test_a_finished_sale_that_lost_its_open_holds_needs_a_rebuild() -> None:
    for row in (a_row(closed=True, accepted=3, held=1), a_row(PAST, accepted=3, held=1)):
        assert needs_rebuild(row, None, SERVER)
        assert needs_rebuild(row, a_sale(accepted=3, held=1, run_id="run-0"), SERVER)
        assert needs_rebuild(row, a_sale(accepted=3, held=1, torn=True), SERVER)
        assert needs_rebuild(row, a_sale(accepted=2, held=1), SERVER)
        assert not needs_rebuild(row, a_sale(accepted=3, held=1), SERVER)
        assert not needs_rebuild(row, a_sale(OTHER), SERVER), "it waits until that one is freed"
        assert not needs_rebuild(replace(row, held=0), None, SERVER)


def test_a_closed_sale_without_holds_needs_a_rebuild_if_it_could_not_be_freed() -> None:
    row = a_row(closed=True, accepted=3, released=1)
    whole = a_sale(stored_state="closed", accepted=3, released=1, run_id="run-0")
    assert not needs_rebuild(row, whole, SERVER)
    for other in (
        replace(whole, accepted=0),
        replace(whole, accepted=4),
        replace(whole, released=0),
        replace(whole, held=1),
    ):
        assert needs_rebuild(row, other, SERVER)
    unrecorded = replace(whole, accepted=4, run_id=SERVER.run_id)
    assert not needs_rebuild(row, unrecorded, SERVER), "its event is in flight"


def test_an_open_sale_needs_a_rebuild_if_redis_lacks_units_in_the_same_run() -> None:
    row = a_row(accepted=3)
    assert needs_rebuild(row, a_sale(accepted=2), SERVER)
    assert needs_rebuild(row, a_sale(accepted=3, run_id="run-0"), SERVER)
    assert needs_rebuild(row, None, SERVER)
    assert not needs_rebuild(row, a_sale(accepted=4), SERVER)
    assert not needs_rebuild(row, a_sale(OTHER), SERVER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "iphone_15 is sold by default/older, which is Selling"),
        ({"stored_state": "paused"}, "iphone_15 is sold by default/older, which is Paused"),
        (
            {"stored_state": "closed", "accepted": 5, "outbox_length": 1},
            f"{NOT_RECORDED}: its outbox has 1 event",
        ),
        (
            {"stored_state": "closed", "accepted": 6},
            f"{NOT_RECORDED}: 5 of 6 accepted units",
        ),
        (
            {"stored_state": "closed", "accepted": 4},
            "default/older sold iphone_15 before and waits for its rebuild: Redis lost 1 unit",
        ),
        (
            {"stored_state": "closed", "accepted": 5, "released": 1},
            f"{NOT_RECORDED}: 0 of 1 released units",
        ),
        (
            {"stored_state": "closed", "accepted": 5, "held": 2},
            f"{NOT_RECORDED}: it has open holds of 2 units",
        ),
    ],
)
def test_an_item_of_another_sale_is_a_conflict(changes: dict[str, Any], message: str) -> None:
    others = (a_row(OTHER, accepted=5),)
    found = decide(SPEC, observed(sale=a_sale(OTHER, **changes), others=others))
    assert found == Done(SaleState.ITEM_CONFLICT, Reason.ITEM_CONFLICT, message)


def test_an_unfinished_sale_that_redis_lost_is_still_a_conflict() -> None:
    for sale in (None, a_sale(replace(OTHER, sale_id="default/third"), stored_state="closed")):
        found = decide(SPEC, observed(sale=sale, others=(a_row(OTHER),)))
        assert outcome(found) == (SaleState.ITEM_CONFLICT, Reason.ITEM_CONFLICT)


def test_a_finished_sale_with_open_holds_keeps_its_item_also_without_keys() -> None:
    others = (a_row(OTHER, accepted=5, held=2, closed=True),)
    for seen in (observed(others=others), observed(others=others, row=a_row(closed=True))):
        assert decide(SPEC, seen) == Done(
            SaleState.ITEM_CONFLICT,
            Reason.ITEM_CONFLICT,
            "default/older sold iphone_15 before and has open holds: 2 units",
        )
    unfinished = observed(others=others, row=a_row())
    assert decide(SPEC, unfinished) == Rebuild(a_row()), "the item is its own already"


def test_a_finished_and_recorded_sale_is_replaced() -> None:
    others = (a_row(OTHER, accepted=5, released=1, closed=True),)
    closed = a_sale(OTHER, stored_state="closed", accepted=5, released=1)
    seen = observed(sale=closed, others=others)
    assert decide(SPEC, seen) == WriteRow(others)
    assert decide(SPEC, replace(seen, row=a_row(), written=1)) == Apply(
        a_row(), seed_until_ms=SOON, replaces=Predecessor("default/older", 5, 1)
    )
    assert decide(SPEC, replace(seen, row=a_row())) == Rebuild(
        a_row(), Predecessor("default/older", 5, 1)
    )


def test_a_finished_sale_keeps_its_item_from_other_namespaces_until_it_is_freed() -> None:
    elsewhere = replace(OTHER, sale_id="yard/older")
    others = (a_row(elsewhere, accepted=5, closed=True),)
    seen = observed(sale=a_sale(elsewhere, stored_state="closed", accepted=5), others=others)
    assert decide(SPEC, seen) == Done(
        SaleState.ITEM_CONFLICT,
        Reason.ITEM_CONFLICT,
        "yard/older sold iphone_15 before: another namespace may sell it once the keys of that "
        "sale are freed",
    )
    assert decide(replace(SPEC, sale_id="yard/newer"), seen) == WriteRow(others)
    assert decide(SPEC, replace(seen, sale=None)) == WriteRow(others)


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
    ),
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
