"""How long a pod remembers the items that had keys."""

from flashsale_api.known_items import LOOKS, KnownItems


def test_an_item_is_forgotten_after_enough_looks_that_missed_it() -> None:
    known = KnownItems()
    known.looked(["a", "b"], claimed=True)
    for _ in range(LOOKS - 1):
        known.looked(["b"], claimed=True)
        assert "a" in known
    known.looked(["b"], claimed=True)
    assert "a" not in known
    assert "b" in known


def test_an_item_that_answered_a_call_is_known_until_the_looks_miss_it() -> None:
    known = KnownItems()
    assert "a" not in known
    known.note("a")
    for _ in range(LOOKS - 1):
        known.looked([], claimed=True)
    assert "a" in known
    known.looked([], claimed=True)
    assert "a" not in known


def test_a_look_at_a_redis_that_has_lost_the_engine_id_does_not_count() -> None:
    known = KnownItems()
    known.looked(["a"], claimed=True)
    assert known.complete
    for _ in range(LOOKS + 1):
        known.looked([], claimed=False)
        assert "a" in known
        assert not known.complete
