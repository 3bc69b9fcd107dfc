"""The status that follows from a reconcile's result."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from flashsale.sale import SaleState
from flashsale_operator.kubernetes import status as statuses
from flashsale_operator.kubernetes.status import SAMPLE_SECONDS, Counts, Status
from flashsale_operator.sales.decision import Reason
from flashsale_operator.sales.reconciler import Refused, Result
from tests.support.observations import OTHER, SPEC, a_row, a_sale

NOW = datetime(2026, 11, 27, 9, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)
SELLING = Result(
    sale_id=SPEC.sale_id,
    item_id=SPEC.item_id,
    state=SaleState.SELLING,
    reason=Reason.APPLIED,
    message="100 of 100 available",
    sale=a_sale(),
    row=a_row(),
)
AWAY = replace(
    SELLING,
    state=SaleState.UNKNOWN,
    reason=Reason.REDIS_UNAVAILABLE,
    message="Redis is away",
    sale=None,
    row=None,
)
NEVER = Status()
OPEN = {
    SaleState.SELLING: "True",
    SaleState.SCHEDULED: "False",
    SaleState.SOLD_OUT: "False",
    SaleState.PAUSED: "False",
    SaleState.ENDED: "False",
    SaleState.CLOSING: "False",
    SaleState.ITEM_CONFLICT: "False",
    SaleState.FENCED: "False",
    SaleState.UNKNOWN: "Unknown",
}


def a_status(result: Result = SELLING, before: Status = NEVER, now: datetime = NOW) -> Status:
    return statuses.next_status(before, result, generation=1, now=now)


def since(status: Status) -> dict[str, str]:
    return {condition.type: condition.since for condition in status.conditions}


@pytest.mark.parametrize("state", SaleState)
def test_the_open_condition_has_the_state_as_its_reason(state: SaleState) -> None:
    opened = a_status(replace(SELLING, state=state)).condition("Open")
    assert opened is not None
    assert (opened.status, opened.reason) == (OPEN[state], state)


@pytest.mark.parametrize("reason", Reason)
def test_the_ready_condition_is_true_if_the_spec_is_applied_or_closed(reason: Reason) -> None:
    ready = a_status(replace(SELLING, reason=reason)).condition("Ready")
    assert ready is not None
    as_asked = reason in (Reason.APPLIED, Reason.CLOSED)
    assert (ready.status, ready.reason) == (str(as_asked), reason)


def test_an_outage_is_reported_in_ready_and_open() -> None:
    status = a_status(AWAY)
    ready, opened = status.condition("Ready"), status.condition("Open")
    assert ready is not None
    assert opened is not None
    assert (ready.status, ready.message) == ("False", "Redis is away")
    assert (opened.status, opened.reason, opened.message) == ("Unknown", "Unknown", "Redis is away")


def test_the_counts_of_another_sale_are_not_reported() -> None:
    conflict = replace(SELLING, state=SaleState.ITEM_CONFLICT, sale=a_sale(OTHER))
    assert a_status(conflict).counts is None


def test_a_transition_time_changes_only_with_the_status_of_its_condition() -> None:
    first = a_status()
    assert set(since(first).values()) == {"2026-11-27T09:00:00Z"}
    unready = replace(SELLING, reason=Reason.STOCK_BELOW_HELD, message="below")
    second = a_status(unready, first, LATER)
    assert since(second) == since(first) | {"Ready": "2026-11-27T09:01:00Z"}
    again = replace(unready, reason=Reason.NOT_CONVERGED)
    third = a_status(again, second, LATER + timedelta(hours=1))
    assert since(third) == since(second)


def test_counts_stay_as_they_were_during_an_outage() -> None:
    assert a_status(AWAY, a_status()).counts == Counts(100, 0, 100, 0, 0)


@pytest.mark.parametrize(("accepted", "status"), [(8, "False"), (9, "True"), (10, "True")])
def test_sold_out_means_that_no_unit_is_available(accepted: int, status: str) -> None:
    sale = a_sale(allocated=9, accepted=accepted)
    sold_out = a_status(replace(SELLING, sale=sale)).condition("SoldOut")
    assert sold_out is not None
    assert sold_out.status == status


def test_a_sold_out_sale_with_open_holds_tells_that_units_may_come_back() -> None:
    sale = a_sale(allocated=9, accepted=12, released=3, held=2)
    status = a_status(replace(SELLING, state=SaleState.SOLD_OUT, sale=sale))
    sold_out, opened = status.condition("SoldOut"), status.condition("Open")
    assert sold_out is not None
    assert opened is not None
    assert (sold_out.status, sold_out.message) == (
        "True",
        "no units are available: 2 units held, which may come back",
    )
    assert opened.message == "all units are sold or held: 2 held units may come back"
    assert status.counts == Counts(9, 12, 0, 2, 7)


def test_a_sold_out_sale_without_open_holds_is_final() -> None:
    sale = a_sale(allocated=9, accepted=9)
    status = a_status(replace(SELLING, state=SaleState.SOLD_OUT, sale=sale))
    opened = status.condition("Open")
    assert opened is not None
    assert opened.message == "all units are sold: a larger spec.stock opens the sale again"


def test_a_status_remembers_that_a_hold_expired() -> None:
    status = a_status(replace(SELLING, hold_expired=True))
    assert statuses.worth_writing(a_status(), status, 0)
    later = a_status(SELLING, Status.parse(status.json()))
    assert later.hold_expired
    assert not a_status().hold_expired


def test_the_counts_of_the_previous_version_are_read() -> None:
    counts = {"allocated": 9, "accepted": 5, "available": 4}
    assert Status.parse(counts).counts == Counts(9, 5, 4, 0, 0)


def test_refused_reservations_are_a_condition_that_an_outage_does_not_change() -> None:
    def condition(status: Status) -> tuple[str, str, str]:
        found = status.condition("Refused")
        assert found is not None
        return found.status, found.reason, found.message

    assert condition(a_status(AWAY))[0] == "Unknown"
    fine = a_status(replace(SELLING, refused=Refused(0, 0)))
    assert condition(fine)[:2] == ("False", "NoneRefused")
    refused = a_status(replace(SELLING, refused=Refused(1, 2)), fine)
    assert condition(refused)[:2] == ("True", "Refused")
    assert "1 reservation (2 units)" in condition(refused)[2]
    assert statuses.worth_writing(fine, refused, 0)
    assert condition(a_status(AWAY, refused)) == condition(refused)


def test_a_status_survives_the_kube_apiserver() -> None:
    status = a_status()
    assert Status.parse(status.json()) == status
    given = {key: value for key, value in a_status(AWAY).json().items() if value is not None}
    assert Status.parse(given).counts is None
    assert Status.parse({}) == Status()


def test_conditions_of_others_stay() -> None:
    other = {
        "type": "Approved",
        "status": "True",
        "lastTransitionTime": "2026-11-26T00:00:00Z",
        "reason": "ByTheShop",
        "message": "",
    }
    own = msgspec.to_builtins(a_status().conditions)
    before = Status.parse({"conditions": [other, *own]})
    after = a_status(AWAY, before, LATER)
    assert msgspec.to_builtins(after.conditions[-1]) == other
    assert [each.type for each in after.conditions].count("Ready") == 1
    assert not statuses.worth_writing(after, a_status(AWAY, after, LATER), 1e9)


def test_an_unchanged_status_is_not_written() -> None:
    status = a_status()
    assert not statuses.worth_writing(status, a_status(before=status, now=LATER), 1e9)


def test_changes_of_only_counts_or_messages_are_written_every_few_seconds() -> None:
    before = a_status()
    for sale in (a_sale(accepted=1), a_sale(replace(SPEC, ends_ms=2_000_000_000_000))):
        after = a_status(replace(SELLING, sale=sale), before, LATER)
        assert not statuses.worth_writing(before, after, SAMPLE_SECONDS - 0.1)
        assert statuses.worth_writing(before, after, SAMPLE_SECONDS)


@pytest.mark.parametrize(
    "result",
    [
        replace(SELLING, state=SaleState.PAUSED),
        replace(SELLING, reason=Reason.FENCED),
        replace(SELLING, sale=a_sale(accepted=100)),
    ],
    ids=["state", "readiness", "sold_out"],
)
def test_a_changed_condition_is_written_at_once(result: Result) -> None:
    before = a_status()
    assert statuses.worth_writing(before, a_status(result, before), 0)


def test_a_new_generation_is_written_at_once() -> None:
    before = a_status()
    after = statuses.next_status(before, SELLING, generation=2, now=LATER)
    assert statuses.worth_writing(before, after, 0)


def test_messages_are_cut_to_their_maximum_length() -> None:
    status = a_status(replace(AWAY, message="x" * 5000))
    assert max(len(condition.message) for condition in status.conditions) == 1024
