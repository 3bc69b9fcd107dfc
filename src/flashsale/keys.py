"""Every Redis key of the engine. No other module builds a key.

The engine's name is the prefix of each key, so that several engines can share a Redis. The keys of
an item share a hash tag, so that a sale lives in one slot of a Redis Cluster.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

DEFAULT_ENGINE: Final = "flashsale"
"""The name of an engine that FLASHSALE_ENGINE does not name."""


def engine_id(engine: str) -> str:
    """Returns the key of the id of the engine that this Redis serves.

    It is in the slot of the items, so that a Redis Cluster loses both or neither.
    """
    return f"{engine}:{{{items(engine)}}}:engine"


def items(engine: str) -> str:
    """Returns the key of the set of items that should have keys.

    The sweeper and the operator walk it.
    """
    return f"{engine}:items"


def claimed_run(engine: str) -> str:
    """Returns the key of the server's run in which this Redis was claimed last.

    It is in the slot of the items.
    """
    return f"{engine}:{{{items(engine)}}}:run"


def pods(engine: str) -> str:
    """Returns the key of the set of API pods. Pods of the previous version look only here."""
    return f"{engine}:pods"


def heartbeat(engine: str, pod_id: str) -> str:
    """Returns the key of an API pod's heartbeat over all items, for the previous version."""
    return f"{engine}:pod:{pod_id}"


@dataclass(frozen=True, slots=True)
class ItemKeys:
    """The keys of an item."""

    sale: str
    buyers: str
    reservations: str
    outbox: str
    holds: str
    sweeper: str
    expiry: str
    pods: str

    @classmethod
    @lru_cache(maxsize=10_000)
    def of(cls, item_id: str, engine: str = DEFAULT_ENGINE) -> "ItemKeys":
        tag = f"{engine}:{{{item_id}}}"
        return cls(
            sale=f"{tag}:sale",
            buyers=f"{tag}:buyers",
            reservations=f"{tag}:reservations",
            outbox=f"{tag}:outbox",
            holds=f"{tag}:holds",
            sweeper=f"{tag}:sweeper",
            expiry=f"{tag}:expiry",
            pods=f"{tag}:pods",
        )

    @property
    def sold(self) -> tuple[str, str, str, str, str]:
        """The keys with a sale's state, in the order of every script's KEYS."""
        return self.sale, self.buyers, self.reservations, self.outbox, self.holds
