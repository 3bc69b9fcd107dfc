"""The slots of a Redis Cluster: the slot of a key, and the view that a node has of their owners."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self

from redis.crc import key_slot


@lru_cache(maxsize=10_000)
def slot_of(key: str) -> int:
    """Returns the slot of a key. The API asks for those of the same items again and again."""
    return key_slot(key.encode())


class View(NamedTuple):
    """A node's answer to CLUSTER SLOTS."""

    ranges: list[tuple[int, int, str, int]]
    """The first and the last slot of each range, and the host and port of its primary."""
    ids: frozenset[str]
    """The ids of all primaries and replicas."""

    @classmethod
    def of(cls, entries: Sequence[Sequence[Any]], own_host: str) -> Self:
        """Parses the answer. A node that does not know its own host leaves it out."""
        return cls(
            [
                (first, last, primary[0] or own_host, primary[1])
                for first, last, primary, *_ in entries
            ],
            frozenset(node[2] for _, _, *nodes in entries for node in nodes),
        )

    @property
    def covered(self) -> int:
        """The number of slots that have a primary."""
        return sum(last - first + 1 for first, last, *_ in self.ranges)
