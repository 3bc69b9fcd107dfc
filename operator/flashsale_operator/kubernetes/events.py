"""The Kubernetes Events of a sale: pure functions of its known state and a new result.

The operator creates an Event before it writes the status that reports the same change. The Event's
name follows from the change. If the operator dies between the two writes, or if two operators see
the change, the kube-apiserver refuses the second Event of that name. So each change gets one Event.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

from flashsale.sale import SaleState
from flashsale_operator.kubernetes.status import (
    DELETED_MESSAGE,
    Status,
    open_message,
    refused_message,
)
from flashsale_operator.sales.decision import counted
from flashsale_operator.sales.manifest import API_VERSION, KIND
from flashsale_operator.sales.reconciler import Result

COMPONENT: Final = "flashsale-operator"
MAX_NAME: Final = 253
_STATES: Final = frozenset(state.value for state in SaleState)


@dataclass(frozen=True, slots=True)
class Known:
    """The last known state of a sale, from its status.

    The state `Unknown` carries no information, so callers pass the last known state instead.
    Otherwise every short outage would report the sale as opened again.
    """

    state: SaleState | None = None
    sold_out: bool = False
    allocated: int | None = None
    released: int | None = None
    hold_expired: bool = False
    refused: bool = False
    mark: str = ""

    @classmethod
    def of(cls, status: Status) -> "Known":
        opened, sold_out = status.condition("Open"), status.condition("SoldOut")
        refused = status.condition("Refused")
        known = opened is not None and opened.reason in _STATES
        return cls(
            state=SaleState(opened.reason) if opened is not None and known else None,
            sold_out=sold_out is not None and sold_out.status == "True",
            allocated=None if status.counts is None else status.counts.allocated,
            released=None if status.counts is None else status.counts.released,
            hold_expired=status.hold_expired,
            refused=refused is not None and refused.status == "True",
            mark="" if opened is None else f"{status.observed_generation} {opened.since}",
        )


@dataclass(frozen=True, slots=True)
class SaleEvent:
    """An Event about a sale. `warning` marks an Event that may need a person's attention.

    `occasion` distinguishes this change from another one of the same kind. Without it, the time of
    the change does.
    """

    reason: str
    message: str
    warning: bool = False
    occasion: str = ""


_ONCE: Final = frozenset({"Closed", "HoldExpired"})
"""Reasons that a FlashSale has once, whatever else changes."""
HOLD_EXPIRED: Final = SaleEvent(
    "HoldExpired", "a hold expired before it was confirmed: its units are for sale again"
)
_NEVER_SOLD: Final = (
    " and accepted no reservation: check spec.endsAt. An ended sale stays ended, and a new sale "
    "needs a new name"
)
CLOSED: Final = SaleEvent("Closed", DELETED_MESSAGE)


def other_engine(owner: str, own: str) -> SaleEvent:
    """Returns the Event about a FlashSale that the engine `owner` serves, and not `own`."""
    message = (
        f"engine {owner} serves this FlashSale, so the operator of engine {own} leaves it alone: "
        "to move it to another engine, delete it and apply it again"
    )
    return SaleEvent("OtherEngine", message, warning=True)


def sale_events(before: Known, result: Result) -> list[SaleEvent]:
    """Returns the Events for the change from `before` to `result`."""
    return [*_changes(before, result), *_of_state(before, result)]


def _changes(before: Known, result: Result) -> Iterator[SaleEvent]:
    """Yields the Events that do not depend on the state."""
    rebuilt = result.rebuilt
    if rebuilt is not None and rebuilt.changed:
        occasion = f"revision {rebuilt.revision}"
        yield SaleEvent("Rebuilt", str(rebuilt), rebuilt.lost > 0, occasion)
    sale, allocated = result.trusted_sale, before.allocated
    if sale is not None and allocated is not None and sale.allocated > allocated:
        raised = f"allocated units raised from {allocated} to {sale.allocated}"
        yield SaleEvent("Restocked", raised)
    if result.hold_expired and not before.hold_expired:
        yield HOLD_EXPIRED
    if result.refused is not None and result.refused.reservations and not before.refused:
        yield SaleEvent("Refused", refused_message(result.refused), warning=True)


def _of_state(before: Known, result: Result) -> Iterator[SaleEvent]:
    """Yields the Event about another state."""
    state, was, sale = result.state, before.state, result.own_sale
    message = open_message(result)
    # Holds that expire let a sale sell out many times, but each stock gets the Events once.
    stock = "" if sale is None else f"stock {sale.allocated}"
    # The operator restarted during an outage: it cannot tell whether the state has changed.
    forgotten = was is SaleState.UNKNOWN and before.allocated is not None
    if state is was or state is SaleState.UNKNOWN or forgotten:
        return
    match state:
        case SaleState.SELLING if was is SaleState.PAUSED:
            yield SaleEvent("Resumed", message)
        case SaleState.SELLING if was is not SaleState.SOLD_OUT:
            yield SaleEvent("Opened", message)
        case SaleState.SELLING if sale is not None and before.released is not None:
            if (returned := sale.released - before.released) > 0:
                units = counted(returned, "unit")
                again = f"{units} came back: {message}"
                yield SaleEvent("SellingAgain", again, occasion=stock)
        case SaleState.SOLD_OUT if not before.sold_out:
            yield SaleEvent("SoldOut", message, occasion=stock)
        case SaleState.ENDED if _never_sold(was, result):
            yield SaleEvent("Ended", f"{message}{_NEVER_SOLD}", warning=True)
        case SaleState.PAUSED | SaleState.ENDED:
            yield SaleEvent(state.value, message)
        case SaleState.CLOSING:
            yield SaleEvent("Closed", message)
        case SaleState.FENCED:
            yield SaleEvent("Fenced", message, warning=True, occasion=_fence_of(result))
        case SaleState.ITEM_CONFLICT:
            yield SaleEvent("ItemConflict", message, warning=True)


def _fence_of(result: Result) -> str:
    """Returns the sale's revision, which every rebuild raises.

    The time of the last change does not distinguish two failovers of a sale that does not sell: its
    condition Open stays False.
    """
    stored = result.own_sale or result.row
    return "" if stored is None else f"revision {stored.revision}"


def _never_sold(was: SaleState | None, result: Result) -> bool:
    """Whether a sale has ended without a buyer and, as far as is known, without having been open.

    Then the FlashSale's `endsAt` has probably a wrong date.
    """
    sale = result.own_sale
    accepted = (0 if sale is None else sale.accepted) + (result.recorded or 0)
    return was in (None, SaleState.UNKNOWN, SaleState.SCHEDULED) and not accepted


def event_object(
    event: SaleEvent, metadata: Mapping[str, Any], mark: str, now: datetime
) -> dict[str, object]:
    """Returns the Event as a Kubernetes object. `metadata` is the FlashSale's.

    `mark` distinguishes this change from another one of the same kind, unless the Event has an
    occasion or is made only once.
    """
    uid = metadata["uid"]
    change = "" if event.reason in _ONCE else event.occasion or mark
    digest = sha256(f"{uid} {event.reason} {change}".encode()).hexdigest()[:16]
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
        "type": "Warning" if event.warning else "Normal",
        "reason": event.reason,
        "message": event.message[:1024],
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": "",
    }
