"""Reservation ids: equal only for the same key of the same user and item."""

from itertools import combinations
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from flashsale.fields import USER_ID_PATTERN
from flashsale_api.reservation_ids import reservation_id

words = st.from_regex(USER_ID_PATTERN)
triples = st.tuples(words, words, words)


@given(st.lists(triples, unique=True, min_size=2, max_size=5))
def test_a_key_gives_one_id_per_user_and_item(asked: list[tuple[str, str, str]]) -> None:
    for one, other in combinations(asked, 2):
        assert reservation_id(*one) != reservation_id(*other)
        assert reservation_id(*one) == reservation_id(*one)
        assert UUID(reservation_id(*one)).version == 8
        assert UUID(reservation_id(*one)).variant == "specified in RFC 4122"


def test_every_request_without_a_key_gets_a_new_id() -> None:
    made = [reservation_id("phone", "ann", "") for _ in range(10_000)]
    assert len(set(made)) == len(made)
    assert {UUID(one).version for one in made} == {7}
    assert {UUID(one).variant for one in made} == {"specified in RFC 4122"}


def test_ids_do_not_change_between_versions() -> None:
    # A retry may reach a pod of another version, so this value is part of the contract.
    assert reservation_id("iphone_15", "user1", "k-1") == "27eb0d48-e628-8657-bb90-356f20ed8a71"
