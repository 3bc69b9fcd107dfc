"""How long a pod remembers the items that had keys."""

from flashsale_api.known_items import LOOKS, KnownItems


def test_an_item_is_forgotten_after_enough_looks_that_missed_it() -> None:
    known = KnownItems()
    known.looked(["a", "b"])
    for _ in range(LOOKS - 1):
        known.looked(["b"])
        assert "a" in known
    known.looked(["b"])
    assert "a" not in known
    assert "b" in known


def test_an_item_that_answered_a_call_is_known_until_the_looks_miss_it() -> None:
    known = KnownItems()
    assert "a" not in known
    known.note("a")
    for _ in range(LOOKS - 1):
        known.looked([])
    assert "a" in known
    known.looked([])
    assert "a" not in known
