"""Every Redis key of the engine; nothing else spells one.

The keys of one item share a hash tag, so that a sale lives in one slot of a Redis Cluster.
"""

from dataclasses import dataclass
from typing import Final

ITEMS: Final = "flashsale:items"
"""Set of the items that have keys: the index that sweeps walk."""

PODS: Final = "flashsale:pods"
"""Set of the API pods that have beaten their heart and were not yet found dead."""


def heartbeat(pod_id: str) -> str:
    """Key of one API pod's heartbeat; it expires when the pod stops beating."""
    return f"flashsale:pod:{pod_id}"


@dataclass(frozen=True, slots=True)
class ItemKeys:
    """The keys of one item."""

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
        """KEYS of the scripts that read a sale."""
        return self.sale, self.buyers, self.reservations, self.outbox
