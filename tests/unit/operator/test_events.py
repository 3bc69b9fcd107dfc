"""The Events that follow from a change: each once."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from flashsale.sale import SaleState
from flashsale_operator.kubernetes import status
from flashsale_operator.kubernetes.events import Announcement, Known, announcements, event
from flashsale_operator.kubernetes.status import Counts, Found, Status
from flashsale_operator.sales.decision import Reason

NOW = datetime(2026, 11, 27, 9, tzinfo=UTC)
METADATA = {"name": "iphone-15", "namespace": "shop", "uid": "uid-1"}


def found(state: SaleState, available: int = 5, allocated: int = 10) -> Found:
    counts = None
    if state not in (SaleState.UNKNOWN, SaleState.ITEM_CONFLICT):
        counts = Counts(allocated, allocated - available, available)
    return Found(state, True, Reason.APPLIED, "fine", "told", counts)


class Teller:
    """What a life of reconciles tells, as `Rounds` does it."""

    def __init__(self) -> None:
        self.status = Status()
        self.remembered: Known | None = None
        self.told: list[str] = []

    def sees(self, *seen: Found) -> list[str]:
        for each in seen:
            known = Known.of(self.status)
            if known.state is SaleState.UNKNOWN:
                known = self.remembered or known
            else:
                self.remembered = known
            self.told += [told.reason for told in announcements(known, each)]
            self.status = status.next_status(
                self.status, each, sale_id="shop/iphone-15", generation=1, now=NOW
            )
        return self.told

    def restarts(self) -> None:
        self.remembered = None


SELLING, SCHEDULED = found(SaleState.SELLING), found(SaleState.SCHEDULED)
SOLD_OUT, UNKNOWN = found(SaleState.SOLD_OUT, 0), found(SaleState.UNKNOWN)


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        ([SELLING], ["Opened"]),
        ([SCHEDULED, SELLING], ["Opened"]),
        ([SELLING, SOLD_OUT], ["Opened", "SoldOut"]),
        ([SELLING, SOLD_OUT, found(SaleState.SELLING, 5, 20)], ["Opened", "SoldOut", "Restocked"]),
        ([SELLING, found(SaleState.SELLING, 15, 20)], ["Opened", "Restocked"]),
        ([SELLING, found(SaleState.SELLING, 1, 6)], ["Opened"]),
        ([SELLING, found(SaleState.PAUSED), SELLING], ["Opened", "Paused", "Resumed"]),
        (
            [SOLD_OUT, found(SaleState.PAUSED, 0), SOLD_OUT],
            ["SoldOut", "Paused"],
        ),
        ([SELLING, found(SaleState.ENDED)], ["Opened", "Ended"]),
        ([SELLING, found(SaleState.CLOSING)], ["Opened", "Closed"]),
        ([found(SaleState.ITEM_CONFLICT), SELLING], ["ItemConflict", "Opened"]),
        ([SELLING, found(SaleState.FENCED), SELLING], ["Opened", "Fenced", "Opened"]),
        ([UNKNOWN, SELLING], ["Opened"]),
    ],
)
def test_a_change_is_told(seen: list[Found], told: list[str]) -> None:
    assert Teller().sees(*seen) == told


@pytest.mark.parametrize("state", SaleState)
def test_nothing_is_told_again(state: SaleState) -> None:
    teller = Teller()
    first = list(teller.sees(found(state)))
    assert teller.sees(found(state), UNKNOWN, found(state), UNKNOWN, found(state)) == first
    teller.restarts()
    assert teller.sees(found(state)) == first


def test_an_operator_that_restarts_in_an_outage_opens_nothing_again() -> None:
    teller = Teller()
    teller.sees(SELLING, UNKNOWN)
    teller.restarts()
    assert teller.sees(SELLING) == ["Opened"]


def test_an_event_of_the_same_change_has_the_same_name() -> None:
    told = Announcement("Paused", "spec.paused is true")
    one = event(told, METADATA, "1 2026-11-27T09:00:00Z", NOW)
    again = event(told, METADATA, "1 2026-11-27T09:00:00Z", NOW.replace(hour=10))
    later = event(told, METADATA, "3 2026-11-27T09:00:00Z", NOW)
    assert one["metadata"] == again["metadata"] != later["metadata"]


def test_a_closing_is_told_once_by_whoever_closed() -> None:
    closed = Announcement("Closed", "deleted")
    names = {str(event(closed, METADATA, mark, NOW)["metadata"]) for mark in ("", "1 x")}
    assert len(names) == 1
    other = event(closed, METADATA | {"uid": "uid-2"}, "", NOW)
    assert str(other["metadata"]) not in names


def test_the_longest_name_makes_an_event_of_a_valid_name() -> None:
    made = event(Announcement("Opened", "m" * 5000), METADATA | {"name": "a" * 253}, "", NOW)
    metadata = made["metadata"]
    assert isinstance(metadata, dict)
    assert len(metadata["name"]) == 253
    assert made["message"] == "m" * 1024


@pytest.mark.parametrize("state", [SaleState.FENCED, SaleState.ITEM_CONFLICT])
def test_what_a_person_may_have_to_look_at_is_a_warning(state: SaleState) -> None:
    (told,) = announcements(Known(), replace(found(state), told="told"))
    assert told.warning
