"""Every Redis key of the engine. No other module builds a key.

The keys of an item share a hash tag, so that a sale lives in one slot of a Redis Cluster.
"""

from dataclasses import dataclass
from typing import Final

ITEMS: Final = "flashsale:items"
"""Set of the items that have keys. The sweeper and the operator walk it."""

PODS: Final = "flashsale:pods"
"""Set of the API pods that have sent a heartbeat and are not known to be dead."""


def heartbeat(pod_id: str) -> str:
    """Returns the key of an API pod's heartbeat. It expires when the heartbeats stop."""
    return f"flashsale:pod:{pod_id}"


@dataclass(frozen=True, slots=True)
class ItemKeys:
    """The keys of an item."""

    sale: str
    buyers: str
    reservations: str
    outbox: str
    sweeper: str

    @classmethod
    def of(cls, item_id: str) -> "ItemKeys":
        tag = f"flashsale:{{{item_id}}}"
        return cls(
            sale=f"{tag}:sale",
            buyers=f"{tag}:buyers",
            reservations=f"{tag}:reservations",
            outbox=f"{tag}:outbox",
            sweeper=f"{tag}:sweeper",
        )

    @property
    def four(self) -> tuple[str, str, str, str]:
        """The KEYS of every script that reads a sale."""
        return self.sale, self.buyers, self.reservations, self.outbox
