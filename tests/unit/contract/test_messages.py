"""Any record value either decodes to a valid event or is refused with a reason (Hypothesis)."""

import json

from hypothesis import given
from hypothesis import strategies as st

from flashsale import events
from flashsale.errors import ContractViolation
from tests.support.consumer import accepted

GOOD = events.encode(accepted())
FIELDS = sorted(json.loads(GOOD))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def check_decoding(value: bytes | None) -> None:
    try:
        event = events.decode(value)
    except ContractViolation as error:
        reason = str(error)
    else:
        assert events.decode(events.encode(event)) == event
        assert 1 <= event.quantity <= 1_000
        assert event.version >= 1
        return
    assert 0 < len(reason) < 2_000


@given(st.none() | st.binary(max_size=300))
def test_random_bytes_are_refused_or_valid(value: bytes | None) -> None:
    check_decoding(value)


@given(JSON)
def test_random_json_is_refused_or_valid(value: object) -> None:
    check_decoding(json.dumps(value).encode())


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=4))
def test_an_event_with_changed_values_is_refused_or_valid(changes: dict[str, object]) -> None:
    check_decoding(json.dumps(json.loads(GOOD) | changes).encode())


@given(st.sets(st.sampled_from(FIELDS), min_size=1))
def test_an_event_without_some_fields_is_refused_or_valid(missing: set[str]) -> None:
    left = {name: value for name, value in json.loads(GOOD).items() if name not in missing}
    check_decoding(json.dumps(left).encode())


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=8))
def test_an_event_with_changed_bytes_is_refused_or_valid(changes: list[tuple[int, int]]) -> None:
    changed = bytearray(GOOD)
    for place, byte in changes:
        changed[place] = byte
    check_decoding(bytes(changed))


@given(st.integers(0, len(GOOD)))
def test_a_truncated_event_is_refused_or_valid(length: int) -> None:
    check_decoding(GOOD[:length])
