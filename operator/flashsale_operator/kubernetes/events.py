"""The Kubernetes Events of a sale: pure, from what was known of it and what was found now.

An Event is made before the status that tells of the same change is written, under a name that
follows from the change. So an operator that dies between the two, or another operator beside it,
makes the same name again, which the kube-apiserver refuses: each change is told once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

from flashsale.sale import SaleState
from flashsale_operator.kubernetes.status import Found, Status
from flashsale_operator.sales.manifest import API_VERSION, KIND

COMPONENT: Final = "flashsale-operator"
MAX_NAME: Final = 253
_STATES: Final = frozenset(state.value for state in SaleState)


@dataclass(frozen=True, slots=True)
class Known:
    """What was last known of a sale, from its status.

    A state of Unknown tells nothing, so whoever remembers more passes that: a server that comes
    and goes must not open the sale again each time.
    """

    state: SaleState | None = None
    sold_out: bool = False
    allocated: int | None = None
    mark: str = ""

    @classmethod
    def of(cls, status: Status) -> "Known":
        opened, sold_out = status.condition("Open"), status.condition("SoldOut")
        known = opened is not None and opened.reason in _STATES
        return cls(
            state=SaleState(opened.reason) if opened is not None and known else None,
            sold_out=sold_out is not None and sold_out.status == "True",
            allocated=None if status.counts is None else status.counts.allocated,
            mark="" if opened is None else f"{status.observed_generation} {opened.since}",
        )


@dataclass(frozen=True, slots=True)
class Announcement:
    """An Event to be. `warning` is for what a person may have to look at."""

    reason: str
    message: str
    warning: bool = False


def announcements(before: Known, found: Found) -> list[Announcement]:
    """What is to be told of the change from `before` to `found`."""
    state, was, counts = found.state, before.state, found.counts
    told: list[Announcement] = []
    if found.rebuilt is not None and found.rebuilt.brought:
        told.append(Announcement("Rebuilt", str(found.rebuilt), warning=found.rebuilt.lost > 0))
    # A sale that was known once and is not remembered: what changed meanwhile is not known.
    lost = was is SaleState.UNKNOWN and before.allocated is not None
    if counts is not None and before.allocated is not None and counts.allocated > before.allocated:
        told.append(
            Announcement("Restocked", f"{before.allocated} to {counts.allocated} units allocated")
        )
    if state is was or state is SaleState.UNKNOWN or lost:
        return told
    match state:
        case SaleState.SELLING if was is SaleState.PAUSED:
            told.append(Announcement("Resumed", found.told))
        case SaleState.SELLING if was is not SaleState.SOLD_OUT:
            told.append(Announcement("Opened", found.told))
        case SaleState.SOLD_OUT if not before.sold_out:
            told.append(Announcement("SoldOut", found.told))
        case SaleState.PAUSED:
            told.append(Announcement("Paused", found.told))
        case SaleState.ENDED:
            told.append(Announcement("Ended", found.told))
        case SaleState.CLOSING:
            told.append(Announcement("Closed", found.told))
        case SaleState.ITEM_CONFLICT:
            told.append(Announcement("ItemConflict", found.message, warning=True))
        case SaleState.FENCED:
            told.append(Announcement("Fenced", found.told, warning=True))
    return told


def event(
    announcement: Announcement, metadata: Mapping[str, Any], mark: str, now: datetime
) -> dict[str, object]:
    """The Event of one announcement about the FlashSale of this metadata.

    `mark` tells this change from another of the same kind; a sale is closed once.
    """
    uid = metadata["uid"]
    what = "" if announcement.reason == "Closed" else mark
    digest = sha256(f"{uid} {announcement.reason} {what}".encode()).hexdigest()[:16]
    at = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{metadata['name'][: MAX_NAME - 17]}.{digest}",
            "namespace": metadata["namespace"],
        },
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": uid,
        },
        "type": "Warning" if announcement.warning else "Normal",
        "reason": announcement.reason,
        "message": announcement.message[:1024],
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": "",
    }
