"""The status that follows from what a reconcile found."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from flashsale.errors import (
    ContractViolation,
    FlashsaleError,
    LedgerUnavailable,
    RedisUnavailable,
)
from flashsale.inventory import Applied
from flashsale.sale import Sale, SaleState
from flashsale_operator.kubernetes import status as statuses
from flashsale_operator.kubernetes.status import SAMPLE_SECONDS, Counts, Found, Obstacle, Status
from flashsale_operator.sales.decision import Kept, Reason
from flashsale_operator.sales.offsets import KafkaUnavailable
from flashsale_operator.sales.reconciler import Report
from tests.support.observations import OTHER, SPEC, a_row, a_sale

NOW = datetime(2026, 11, 27, 9, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)
SELLING = Found(SaleState.SELLING, True, Reason.APPLIED, "fine", "open", Counts(100, 0, 100))
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


NEVER = Status()
SALE = a_sale()


def a_status(found: Found = SELLING, before: Status = NEVER, now: datetime = NOW) -> Status:
    return statuses.next_status(before, found, sale_id="default/iphone-15", generation=1, now=now)


def a_report(
    state: SaleState = SaleState.SELLING, reason: Reason = Reason.APPLIED, sale: Sale = SALE
) -> Report:
    return Report(
        sale_id=SPEC.sale_id,
        item_id=SPEC.item_id,
        state=state,
        reason=reason,
        message="words",
        applied=Applied.UNCHANGED,
        sale=sale,
        row=a_row(),
    )


def since(status: Status) -> dict[str, str]:
    return {condition.type: condition.since for condition in status.conditions}


@pytest.mark.parametrize("state", SaleState)
def test_open_has_the_state_as_its_reason(state: SaleState) -> None:
    opened = a_status(replace(SELLING, state=state)).condition("Open")
    assert opened is not None
    assert (opened.status, opened.reason) == (OPEN[state], state)


@pytest.mark.parametrize("reason", Reason)
def test_ready_is_true_for_what_is_as_the_spec_asks(reason: Reason) -> None:
    found = statuses.found_of(a_report(reason=reason))
    ready = a_status(found).condition("Ready")
    assert ready is not None
    as_asked = reason in (Reason.APPLIED, Reason.CLOSED)
    assert (ready.status, ready.reason) == (str(as_asked), reason)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RedisUnavailable("Redis is away"), Obstacle.REDIS_UNAVAILABLE),
        (LedgerUnavailable("the ledger is away"), Obstacle.LEDGER_UNAVAILABLE),
        (KafkaUnavailable("Kafka is away"), Obstacle.KAFKA_UNAVAILABLE),
        (ContractViolation("another format"), Obstacle.UNREADABLE),
    ],
)
def test_ready_names_the_server_that_is_away(error: FlashsaleError, reason: Obstacle) -> None:
    status = a_status(statuses.found_of_error(error))
    ready, opened = status.condition("Ready"), status.condition("Open")
    assert ready is not None
    assert opened is not None
    assert (ready.status, ready.reason, ready.message) == ("False", reason, str(error))
    assert (opened.status, opened.reason) == ("Unknown", "Unknown")


def test_what_redis_does_is_told_while_the_ledger_is_away() -> None:
    seen = (SaleState.SELLING, a_sale(accepted=3))
    found = statuses.found_of_error(LedgerUnavailable("the ledger is away"), seen)
    assert (found.ready, found.state, found.counts) == (
        False,
        SaleState.SELLING,
        Counts(100, 3, 97),
    )


def test_a_rebuild_without_kafka_names_kafka() -> None:
    kept = Kept(("Kafka is away",), without_kafka=True)
    found = statuses.found_of(replace(a_report(SaleState.FENCED, Reason.FENCED), kept=kept))
    assert (found.reason, found.state) == (Obstacle.KAFKA_UNAVAILABLE, SaleState.FENCED)


def test_another_sale_s_numbers_are_not_told() -> None:
    conflict = a_report(SaleState.ITEM_CONFLICT, Reason.ITEM_CONFLICT, sale=a_sale(OTHER))
    assert statuses.found_of(conflict).counts is None


def test_a_transition_time_moves_with_the_status_of_its_condition_alone() -> None:
    first = a_status()
    assert set(since(first).values()) == {"2026-11-27T09:00:00Z"}
    unready = replace(SELLING, ready=False, reason=Reason.STOCK_BELOW_HELD, message="below")
    second = a_status(unready, first, LATER)
    assert since(second) == since(first) | {"Ready": "2026-11-27T09:01:00Z"}
    third = a_status(replace(unready, reason=Reason.UNSETTLED), second, LATER + timedelta(hours=1))
    assert since(third) == since(second)


def test_numbers_that_are_not_known_now_stay() -> None:
    status = a_status(statuses.found_of_error(RedisUnavailable("away")), a_status())
    assert status.counts == Counts(100, 0, 100)


@pytest.mark.parametrize(("available", "status"), [(1, "False"), (0, "True"), (-1, "True")])
def test_sold_out_means_nothing_available(available: int, status: str) -> None:
    sold_out = a_status(replace(SELLING, counts=Counts(9, 9, available))).condition("SoldOut")
    assert sold_out is not None
    assert sold_out.status == status


def test_a_status_survives_the_kube_apiserver() -> None:
    status = a_status()
    assert Status.parse(status.json()) == status
    given = {
        key: value
        for key, value in a_status(statuses.found_of_error(RedisUnavailable("away"))).json().items()
        if value is not None
    }
    assert Status.parse(given).counts is None
    assert Status.parse({}) == Status()


def test_an_unchanged_status_is_not_written() -> None:
    status = a_status()
    assert not statuses.worth_writing(status, a_status(before=status, now=LATER), 1e9)


def test_numbers_and_words_alone_are_written_every_few_seconds_at_most() -> None:
    before = a_status()
    for found in (replace(SELLING, counts=Counts(100, 1, 99)), replace(SELLING, told="other")):
        after = a_status(found, before, LATER)
        assert not statuses.worth_writing(before, after, SAMPLE_SECONDS - 0.1)
        assert statuses.worth_writing(before, after, SAMPLE_SECONDS)


@pytest.mark.parametrize(
    "found",
    [
        replace(SELLING, state=SaleState.PAUSED),
        replace(SELLING, ready=False, reason=Reason.FENCED),
        replace(SELLING, counts=Counts(100, 100, 0)),
    ],
    ids=["state", "readiness", "sold_out"],
)
def test_a_changed_condition_is_written_at_once(found: Found) -> None:
    before = a_status()
    assert statuses.worth_writing(before, a_status(found, before), 0)


def test_a_new_generation_is_written_at_once() -> None:
    before = a_status()
    after = statuses.next_status(
        before, SELLING, sale_id="default/iphone-15", generation=2, now=LATER
    )
    assert statuses.worth_writing(before, after, 0)


def test_a_message_is_no_longer_than_a_person_reads() -> None:
    status = a_status(replace(SELLING, message="x" * 5000))
    assert max(len(condition.message) for condition in status.conditions) == 1024
