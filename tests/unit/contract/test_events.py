"""Encode and decode reservation events, and refuse values that are not events."""

import ast
import json
from datetime import UTC, datetime
from itertools import chain

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flashsale import events
from flashsale.errors import ContractViolation
from flashsale.events import Event
from flashsale.fields import ITEM_ID_PATTERN, SALE_ID_PATTERN, USER_ID_PATTERN
from flashsale.reservations import Record, Snapshot, State
from flashsale.sale import ms_of_time
from tests.support.paths import ROOT

PRODUCTS = ("src/flashsale", "services/api", "services/consumer", "operator/flashsale_operator")

TIMES = st.integers(
    ms_of_time(datetime(1971, 1, 1, tzinfo=UTC)), ms_of_time(datetime(9998, 12, 31, tzinfo=UTC))
)

made = st.builds(
    Event.of,
    st.from_regex(ITEM_ID_PATTERN),
    st.uuids().map(str),
    st.builds(
        Record,
        st.sampled_from(State),
        st.integers(1, 2**53),
        st.integers(1, 1_000),
        TIMES,
        st.from_regex(USER_ID_PATTERN),
        st.one_of(st.just(""), st.from_regex(USER_ID_PATTERN)),
        st.one_of(st.none(), TIMES),
        st.one_of(st.none(), TIMES),
        st.one_of(st.just(""), st.from_regex(USER_ID_PATTERN)),
    ),
    st.builds(
        Snapshot,
        st.from_regex(SALE_ID_PATTERN),
        st.integers(0, 2**53),
        st.integers(0, 2**53),
        st.integers(1, 2**53),
        st.one_of(st.just(""), st.uuids().map(str)),
    ),
)


@given(made)
def test_decoding_an_encoded_event_returns_the_event(event: Event) -> None:
    assume(event.state != "confirmed" or event.confirmed_at is not None)
    assert events.decode(events.encode(event)) == event


def an_event(**changes: object) -> bytes:
    good: dict[str, object] = {
        "schema": 1,
        "reservationId": "01a208bd-5117-7f0d-b8d8-4e8e9760b87e",
        "saleId": "default/phone",
        "itemId": "phone",
        "userId": "ann",
        "quantity": 1,
        "state": "confirmed",
        "version": 1,
        "occurredAt": "2026-11-23T14:09:14.521Z",
        "confirmedAt": "2026-11-23T14:09:15.521Z",
        "allocated": 100,
        "capacity": 100,
        "revision": 1,
    }
    changed = {name: value for name, value in (good | changes).items() if value is not ...}
    return json.dumps(changed).encode()


def test_other_versions_can_read_the_wire_format() -> None:
    event = events.decode(an_event(requestKey="k", added_by_a_later_version=[1]))
    assert event.accepted_at == datetime(2026, 11, 23, 14, 9, 14, 521_000, UTC)
    assert event.request_key == "k"
    times = {
        "occurredAt": "2026-11-23T14:09:14.521000Z",
        "confirmedAt": "2026-11-23T14:09:15.521000Z",
    }
    written = json.loads(an_event(requestKey="k", **times))
    assert json.loads(events.encode(event)) == written


def test_an_accepted_reservation_of_the_previous_version_is_confirmed() -> None:
    former = an_event(confirmedAt=...).replace(b'"state": "confirmed"', b'"state":"accepted"')
    event = events.decode(former)
    assert (event.state, event.confirmed_at) == ("confirmed", event.accepted_at)


def test_a_pod_of_the_previous_version_publishes_no_time_of_confirmation() -> None:
    """It publishes entries of other pods too, and copies the state from the record in Redis."""
    event = events.decode(an_event(confirmedAt=...))
    assert (event.state, event.confirmed_at) == ("confirmed", event.accepted_at)
    assert events.decode(an_event(state="held", confirmedAt=...)).confirmed_at is None


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"schema": ...},
        {"reservationId": "x"},
        {"reservationId": "01A208BD-5117-7F0D-B8D8-4E8E9760B87E"},
        {"saleId": "phone"},
        {"itemId": "a:b"},
        {"userId": "nul\x00"},
        {"userId": "x" * 129},
        {"quantity": 0},
        {"quantity": -1},
        {"quantity": 1_001},
        {"quantity": "1"},
        {"state": "refused"},
        {"version": 0},
        {"version": 2**53 + 1},
        {"occurredAt": "2026-11-23T14:09:14"},
        {"occurredAt": 1},
        {"allocated": -1},
        {"capacity": 2**60},
        {"revision": 0},
        {"requestKey": ""},
        {"orderRef": "a,b"},
        {"orderRef": ""},
        {"expiresAt": "2026-11-23T14:09:14"},
        {"confirmedAt": 1},
        {"occurredAt": "1970-12-31T23:59:59.999Z"},
        {"occurredAt": "1970-01-01T00:00:00+00:01"},
        {"occurredAt": "0001-01-01T00:00:00+14:00"},
        {"expiresAt": "9999-01-01T00:00:00Z"},
        {"confirmedAt": "9999-12-31T23:59:59.999999-14:00"},
    ],
)
def test_an_invalid_event_is_refused_with_the_reason(changes: dict[str, object]) -> None:
    with pytest.raises(ContractViolation, match="not a reservation event: ") as refused:
        events.decode(an_event(**changes))
    assert next(iter(changes)) in str(refused.value) or "schema" in changes


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (b"", ""), (b"00-1", "00-1"), (b"0\xff", "0\ufffd"), (b"1" * 9_999, "1" * 9_999)],
)
def test_a_traceparent_is_text_whatever_its_header_has(value: bytes | None, text: str) -> None:
    assert events.traceparent([("schema", b"1"), ("traceparent", value)]) == text
    assert events.traceparent([("schema", value)]) == ""


@pytest.mark.parametrize("value", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_value_that_is_not_json_is_refused(value: bytes | None) -> None:
    with pytest.raises(ContractViolation):
        events.decode(value)


def test_every_producer_waits_for_all_in_sync_replicas() -> None:
    """Otherwise an acknowledged event can be lost with the broker that leads its partition."""
    sources = chain.from_iterable((ROOT / part).rglob("*.py") for part in PRODUCTS)
    calls = [
        call
        for source in sources
        for call in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "AIOKafkaProducer"
    ]
    assert len(calls) >= 5
    for call in calls:
        assert {"acks='all'"} <= {ast.unparse(keyword) for keyword in call.keywords}
