"""The items that had keys in Redis lately. If one has none now, Redis may have lost them."""

from collections.abc import Iterable
from typing import Final

LOOKS: Final = 60
"""How many looks at the index of items a pod remembers an item that is no longer in it.

There is a look per second while Redis answers. Looks are counted instead of seconds, because Redis
can come back empty after a long outage.
"""


class KnownItems:
    """The sweep notes all items at each look, and a call notes an item whose sale has answered.

    Only items that have keys are noted, so made-up names take no memory.
    """

    def __init__(self) -> None:
        self._looks = 0
        self._seen: dict[str, int] = {}

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._seen

    def note(self, item_id: str) -> None:
        """Notes an item that has keys."""
        self._seen[item_id] = self._looks

    def looked(self, item_ids: Iterable[str]) -> None:
        """Notes all items that have keys, and forgets those that the last `LOOKS` looks missed."""
        self._looks += 1
        oldest = self._looks - LOOKS
        self._seen = {item_id: seen for item_id, seen in self._seen.items() if seen > oldest}
        self._seen |= dict.fromkeys(item_ids, self._looks)
