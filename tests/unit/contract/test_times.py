"""Times in Unix milliseconds."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from flashsale.sale import ms_of_time, rfc3339_of_ms, utc_of_ms

LAST_MS = ms_of_time(datetime(2999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC))


@given(st.integers(0, LAST_MS))
def test_every_millisecond_keeps_its_value(ms: int) -> None:
    assert ms_of_time(utc_of_ms(ms)) == ms
    assert ms_of_time(datetime.fromisoformat(rfc3339_of_ms(ms))) == ms


def test_every_millisecond_of_a_second_after_2242_keeps_its_value() -> None:
    texts = [f"2243-11-28T10:11:12.{ms:03d}Z" for ms in range(1000)]
    assert [rfc3339_of_ms(ms_of_time(datetime.fromisoformat(each))) for each in texts] == texts
