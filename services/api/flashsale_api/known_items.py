"""The items that Redis' index had lately. If one has no sale now, Redis may have lost it.

See docs/adr/0026-the-index-tells-lost-from-unknown.md.
"""

from collections.abc import Iterable, Iterator
from typing import Final

LOOKS: Final = 60
"""How many looks at the index a pod remembers an item that is not in it any more.

There is a look per second while Redis answers and its run is claimed. Looks are counted instead of
seconds, because Redis can come back empty after a long outage. A sale that was freed is remembered
as long.
"""


class KnownItems:
    """The sweep notes all items of the index once per second. A script call notes its own item.

    Made-up names are never noted, so they take no memory.
    """

    def __init__(self) -> None:
        self.complete = False
        """Whether the run of Redis was claimed at the last look. If not, the index lacks items."""
        self.looks = 0
        """How many looks found the run claimed. Before the first one, any item may be missing."""
        self._seen: dict[str, int] = {}

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._seen

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen)

    def note(self, item_id: str) -> None:
        """Notes an item that has a sale."""
        self._seen[item_id] = self.looks

    def looked(self, item_ids: Iterable[str], *, claimed: bool) -> None:
        """Notes the items of the index, and forgets those that the last `LOOKS` looks missed.

        `claimed` says whether the run of Redis was claimed at that moment. Otherwise the look does
        not count, and no item is forgotten.
        """
        self.complete = claimed
        if claimed:
            self.looks += 1
            oldest = self.looks - LOOKS
            self._seen = {item_id: seen for item_id, seen in self._seen.items() if seen > oldest}
        self._seen |= dict.fromkeys(item_ids, self.looks)
