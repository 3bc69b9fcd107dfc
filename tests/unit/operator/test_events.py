"""The Events of a change: one per change."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from flashsale.sale import SaleState
from flashsale_operator.kubernetes import status
from flashsale_operator.kubernetes.events import (
    HOLD_EXPIRED,
    Known,
    SaleEvent,
    event_object,
    other_engine,
    sale_events,
)
from flashsale_operator.kubernetes.status import Status
from flashsale_operator.sales.decision import Reason
from flashsale_operator.sales.reconciler import Refused, Result
from tests.support.observations import SPEC, a_row, a_sale

NOW = datetime(2026, 11, 27, 9, tzinfo=UTC)
METADATA = {"name": "iphone-15", "namespace": "shop", "uid": "uid-1"}


def a_result(
    state: SaleState, available: int = 5, allocated: int = 10, released: int = 0
) -> Result:
    sale = None
    if state not in (SaleState.UNKNOWN, SaleState.ITEM_CONFLICT):
        accepted = allocated - available + released
        sale = a_sale(allocated=allocated, accepted=accepted, released=released)
    return Result(SPEC.sale_id, SPEC.item_id, state, Reason.APPLIED, "fine", sale=sale)


class Operator:
    """The Events of an operator's life, created as `Controller` does it."""

    def __init__(self) -> None:
        self.status = Status()
        self.remembered: Known | None = None
        self.events: list[str] = []

    def sees(self, *results: Result) -> list[str]:
        for result in results:
            known = Known.of(self.status)
            if known.state is SaleState.UNKNOWN:
                known = self.remembered or known
            else:
                self.remembered = known
            self.events += [event.reason for event in sale_events(known, result)]
            self.status = status.next_status(self.status, result, generation=1, now=NOW)
        return self.events

    def restarts(self) -> None:
        self.remembered = None


SELLING, SCHEDULED = a_result(SaleState.SELLING), a_result(SaleState.SCHEDULED)
SOLD_OUT, UNKNOWN = a_result(SaleState.SOLD_OUT, 0), a_result(SaleState.UNKNOWN)
BACK, SOLD_AGAIN = a_result(SaleState.SELLING, 1, 10, 1), a_result(SaleState.SOLD_OUT, 0, 10, 1)
EXPIRED = replace(SELLING, hold_expired=True)


@pytest.mark.parametrize(
    ("results", "events"),
    [
        ([SELLING], ["Opened"]),
        ([SCHEDULED, SELLING], ["Opened"]),
        ([SELLING, SOLD_OUT], ["Opened", "SoldOut"]),
        (
            [SELLING, SOLD_OUT, a_result(SaleState.SELLING, 5, 20)],
            ["Opened", "SoldOut", "Restocked"],
        ),
        ([SELLING, a_result(SaleState.SELLING, 15, 20)], ["Opened", "Restocked"]),
        ([SELLING, a_result(SaleState.SELLING, 1, 6)], ["Opened"]),
        ([SELLING, a_result(SaleState.PAUSED), SELLING], ["Opened", "Paused", "Resumed"]),
        ([SOLD_OUT, a_result(SaleState.PAUSED, 0), SOLD_OUT], ["SoldOut", "Paused"]),
        ([SELLING, a_result(SaleState.ENDED)], ["Opened", "Ended"]),
        ([SELLING, a_result(SaleState.CLOSING)], ["Opened", "Closed"]),
        ([a_result(SaleState.ITEM_CONFLICT), SELLING], ["ItemConflict", "Opened"]),
        ([SELLING, a_result(SaleState.FENCED), SELLING], ["Opened", "Fenced", "Opened"]),
        ([UNKNOWN, SELLING], ["Opened"]),
        ([SOLD_OUT, BACK], ["SoldOut", "SellingAgain"]),
        ([SOLD_OUT, BACK, SOLD_AGAIN, BACK], ["SoldOut", "SellingAgain", "SoldOut"]),
        ([SOLD_OUT, UNKNOWN, BACK], ["SoldOut", "SellingAgain"]),
        (
            [SOLD_OUT, a_result(SaleState.SELLING, 11, 20, 1)],
            ["SoldOut", "Restocked", "SellingAgain"],
        ),
        ([SELLING, EXPIRED, EXPIRED, SELLING, EXPIRED], ["Opened", "HoldExpired"]),
    ],
)
def test_a_change_creates_an_event(results: list[Result], events: list[str]) -> None:
    assert Operator().sees(*results) == events


@pytest.mark.parametrize("state", SaleState)
def test_an_unchanged_state_creates_no_second_event(state: SaleState) -> None:
    operator, result = Operator(), a_result(state)
    first = list(operator.sees(result))
    assert operator.sees(result, UNKNOWN, result, UNKNOWN, result) == first
    operator.restarts()
    assert operator.sees(result) == first


def test_a_restart_during_an_outage_does_not_report_the_sale_as_opened_again() -> None:
    operator = Operator()
    operator.sees(SELLING, UNKNOWN)
    operator.restarts()
    assert operator.sees(SELLING) == ["Opened"]


def test_two_events_of_the_same_change_have_the_same_name() -> None:
    paused = SaleEvent("Paused", "spec.paused is true")
    one = event_object(paused, METADATA, "1 2026-11-27T09:00:00Z", NOW)
    again = event_object(paused, METADATA, "1 2026-11-27T09:00:00Z", NOW.replace(hour=10))
    later = event_object(paused, METADATA, "3 2026-11-27T09:00:00Z", NOW)
    assert one["metadata"] == again["metadata"] != later["metadata"]


def test_the_event_of_returned_units_tells_how_many() -> None:
    before = Known.of(status.next_status(Status(), SOLD_OUT, generation=1, now=NOW))
    (event,) = sale_events(before, a_result(SaleState.SELLING, 2, 10, 2))
    assert not event.warning
    assert event.message == "2 units came back: reservations are accepted"


def test_the_first_expired_hold_creates_one_event_for_all_operators() -> None:
    marks = ("1 2026-11-27T09:00:00Z", "2 2026-11-27T10:00:00Z")
    made = [event_object(HOLD_EXPIRED, METADATA, mark, NOW) for mark in marks]
    assert made[0]["metadata"] == made[1]["metadata"]
    assert (made[0]["type"], made[0]["reason"]) == ("Normal", "HoldExpired")


def test_units_that_come_back_one_by_one_create_one_event_of_each_kind_per_stock() -> None:
    names: dict[str, list[str]] = {"SoldOut": [], "SellingAgain": []}
    before = Known()
    for number in range(1, 4):
        for result in (
            a_result(SaleState.SOLD_OUT, 0, 10, number - 1),
            a_result(SaleState.SELLING, 1, 10, number),
            a_result(SaleState.SELLING, 11, 20, number),
            a_result(SaleState.SOLD_OUT, 0, 20, number),
        ):
            mark = f"{number} {result.state}"
            for event in sale_events(before, result):
                made = event_object(event, METADATA, mark, NOW)
                names.get(event.reason, []).append(str(made["metadata"]))
            before = Known.of(status.next_status(Status(), result, generation=1, now=NOW))
        before = Known()
    assert {reason: (len(made), len({*made})) for reason, made in names.items()} == {
        "SoldOut": (6, 2),
        "SellingAgain": (3, 1),
    }


def test_a_close_creates_one_event_by_either_way() -> None:
    closed = SaleEvent("Closed", "deleted")
    names = {str(event_object(closed, METADATA, mark, NOW)["metadata"]) for mark in ("", "1 x")}
    assert len(names) == 1
    other = event_object(closed, METADATA | {"uid": "uid-2"}, "", NOW)
    assert str(other["metadata"]) not in names


def test_another_engine_causes_one_warning_per_pair_of_engines() -> None:
    event = other_engine("one", "two")
    made = [event_object(event, METADATA, "one two", NOW.replace(hour=hour)) for hour in (9, 10)]
    assert made[0]["metadata"] == made[1]["metadata"]
    assert (made[0]["type"], made[0]["reason"]) == ("Warning", "OtherEngine")


def test_the_longest_flashsale_name_gives_a_valid_event_name() -> None:
    opened = SaleEvent("Opened", "m" * 5000)
    made = event_object(opened, METADATA | {"name": "a" * 253}, "", NOW)
    metadata = made["metadata"]
    assert isinstance(metadata, dict)
    assert len(metadata["name"]) == 253
    assert made["message"] == "m" * 1024


@pytest.mark.parametrize("state", [SaleState.FENCED, SaleState.ITEM_CONFLICT])
def test_an_event_that_may_need_attention_is_a_warning(state: SaleState) -> None:
    (event,) = sale_events(Known(), a_result(state))
    assert event.warning


UNSOLD = a_result(SaleState.ENDED, available=10)


@pytest.mark.parametrize(
    ("was", "result", "warning"),
    [
        (None, UNSOLD, True),
        (SaleState.UNKNOWN, UNSOLD, True),
        (SaleState.SCHEDULED, UNSOLD, True),
        (SaleState.SELLING, UNSOLD, False),
        (SaleState.PAUSED, UNSOLD, False),
        (None, a_result(SaleState.ENDED, available=9), False),
        (None, replace(UNSOLD, sale=None, row=a_row(accepted=1)), False),
        (None, replace(UNSOLD, sale=None, row=a_row()), True),
    ],
)
def test_a_sale_that_ends_without_having_been_open_is_a_warning(
    was: SaleState | None, result: Result, warning: bool
) -> None:
    (event,) = sale_events(Known(state=was), result)
    assert (event.reason, event.warning) == ("Ended", warning)
    assert ("check spec.endsAt" in event.message) is warning


def test_refused_reservations_are_one_warning() -> None:
    operator = Operator()
    fine = replace(SELLING, refused=Refused(0, 0))
    refused = [replace(SELLING, refused=Refused(number, 2 * number)) for number in (1, 2)]
    assert operator.sees(fine, *refused) == ["Opened", "Refused"]
    operator.restarts()
    assert operator.sees(UNKNOWN, SELLING, *refused) == ["Opened", "Refused"]
    (event,) = sale_events(Known(state=SaleState.SELLING), refused[1])
    assert event.warning
    assert "2 reservations (4 units)" in event.message
