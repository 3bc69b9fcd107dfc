"""`decide` for sales that Redis has lost or may have lost: the fence and the rebuild."""

from dataclasses import replace
from typing import Any

import pytest

from flashsale.ledger import SaleRow
from flashsale.sale import Sale, SaleState, utc_of_ms
from flashsale_operator.sales.decision import (
    Apply,
    Done,
    Reason,
    Rebuild,
    StillFenced,
    WriteRow,
    decide,
    last_of_items,
    needs_rebuild,
    state_of,
)
from tests.support.observations import (
    NOW_MS,
    OTHER,
    PAST,
    SERVER,
    SPEC,
    STILL_FENCED,
    a_row,
    a_sale,
    observed,
    outcome,
)


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
        whole = a_sale(accepted=3, held=1, stored_state="closed" if row.closed else "open")
        assert not needs_rebuild(row, whole, SERVER)
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


def test_a_closed_sale_from_before_its_last_rebuild_needs_a_rebuild() -> None:
    row = a_row(closed=True, accepted=3, rebuilt_revision=4)
    former = a_sale(stored_state="closed", accepted=3, rebuilt=0)
    assert needs_rebuild(row, former, SERVER)
    assert not needs_rebuild(row, replace(former, rebuilt=4), SERVER)
    assert not needs_rebuild(row, replace(former, rebuilt=None), SERVER)


def test_a_sale_that_only_the_ledger_has_closed_is_closed_by_a_rebuild() -> None:
    row = a_row(closed=True, accepted=3)
    assert needs_rebuild(row, a_sale(accepted=3), SERVER)
    assert not needs_rebuild(row, a_sale(accepted=3, stored_state="ended"), SERVER)
    assert not needs_rebuild(row, a_sale(accepted=3, run_id="run-0"), SERVER)
