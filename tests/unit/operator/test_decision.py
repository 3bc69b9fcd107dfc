"""`decide` for sales that Redis has, new sales, and items of another sale."""

from dataclasses import replace
from typing import Any

import pytest

from flashsale.sale import Predecessor, SaleState, utc_of_ms
from flashsale_operator.sales.decision import (
    SEED_MS,
    Apply,
    Done,
    Reason,
    Rebuild,
    WriteRow,
    decide,
)
from tests.support.observations import (
    NOW_MS,
    OTHER,
    PAST,
    SPEC,
    STILL_FENCED,
    a_row,
    a_sale,
    observed,
    outcome,
)

NOT_RECORDED = "default/older sold iphone_15 before and is not fully recorded yet"
SOON = NOW_MS + SEED_MS


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
