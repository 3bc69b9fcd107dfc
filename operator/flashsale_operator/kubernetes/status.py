"""A FlashSale's status: pure functions of a reconcile's result and the status before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final, Self

import msgspec

from flashsale.sale import Sale, SaleState, rfc3339_of_ms
from flashsale_operator.sales.decision import counted
from flashsale_operator.sales.reconciler import Refused, Result

SAMPLE_SECONDS: Final = 5.0
"""Shortest time between two writes of a status in which only counts or messages changed."""
MAX_MESSAGE: Final = 1024
DELETED_MESSAGE: Final = "the FlashSale was deleted: no reservation is accepted"


@dataclass(frozen=True, slots=True)
class Counts:
    """Units of a sale in Redis."""

    allocated: int
    accepted: int
    available: int
    held: int = 0
    confirmed: int = 0

    @classmethod
    def of(cls, sale: Sale) -> Self:
        return cls(sale.allocated, sale.accepted, sale.available, sale.held, sale.confirmed)

    @property
    def released(self) -> int:
        return self.accepted + self.available - self.allocated


class Condition(msgspec.Struct, frozen=True, rename="camel"):
    """One condition of a status. `since` is its lastTransitionTime.

    Another controller's condition can be without `observed_generation`.
    """

    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""
    observed_generation: int | msgspec.UnsetType = msgspec.UNSET
    since: str = msgspec.field(default="", name="lastTransitionTime")


@dataclass(frozen=True, slots=True)
class Status:
    """A FlashSale's status. It is empty before the first reconcile.

    `engine` is the id of the engine that serves the FlashSale. `hold_expired`: a hold of the sale
    has expired.
    """

    observed_generation: int | None = None
    sale_id: str | None = None
    engine: str | None = None
    conditions: tuple[Condition, ...] = ()
    counts: Counts | None = None
    hold_expired: bool = False

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """Reads a status from a FlashSale of the kube-apiserver."""
        # The previous version wrote no held and confirmed units.
        known = {"held": 0, "confirmed": 0} | dict(given)
        numbers = [known[field.name] for field in fields(Counts) if field.name in known]
        return cls(
            observed_generation=given.get("observedGeneration"),
            sale_id=given.get("saleId"),
            engine=given.get("engine"),
            conditions=msgspec.convert(given.get("conditions") or (), tuple[Condition, ...]),
            counts=Counts(*numbers) if len(numbers) == 5 else None,
            hold_expired=given.get("holdExpired") is True,
        )

    def json(self) -> dict[str, object]:
        """Returns the whole status as a merge patch."""
        counts = self.counts
        return {
            "observedGeneration": self.observed_generation,
            "saleId": self.sale_id,
            "engine": self.engine,
            "conditions": msgspec.to_builtins(self.conditions),
            "allocated": None if counts is None else counts.allocated,
            "accepted": None if counts is None else counts.accepted,
            "available": None if counts is None else counts.available,
            "held": None if counts is None else counts.held,
            "confirmed": None if counts is None else counts.confirmed,
            "holdExpired": self.hold_expired or None,
        }

    def condition(self, kind: str) -> Condition | None:
        """Returns the condition of that type."""
        return next((each for each in self.conditions if each.type == kind), None)


def next_status(before: Status, result: Result, *, generation: int, now: datetime) -> Status:
    """Returns the status after `result`.

    A lastTransitionTime changes only with the status of its condition. Counts that are not known
    now, or that a fenced sale may lack, stay as they were, and so do the conditions of others.
    """
    sale = result.trusted_sale
    message = "the ledger and Redis match the spec" if result.ready else result.message
    conditions = {
        "Ready": (str(result.ready), result.reason, message),
        "Open": _open(result),
        "SoldOut": _sold_out(before, result),
        "Refused": _refused(before, result),
    }
    at = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    after = []
    for kind, (status, reason, words) in conditions.items():
        old = before.condition(kind)
        since = old.since if old is not None and old.status == status and old.since else at
        after.append(Condition(kind, status, str(reason), words[:MAX_MESSAGE], generation, since))
    after += [each for each in before.conditions if each.type not in conditions]
    counts = before.counts if sale is None else Counts.of(sale)
    hold_expired = before.hold_expired or result.hold_expired
    return Status(generation, result.sale_id, before.engine, tuple(after), counts, hold_expired)


def worth_writing(before: Status, after: Status, seconds_since_written: float) -> bool:
    """Whether to write a status.

    A changed condition or generation is written at once. Changes of only counts or messages are
    written every `SAMPLE_SECONDS` at most.
    """
    if before == after:
        return False
    return _outline(before) != _outline(after) or seconds_since_written >= SAMPLE_SECONDS


def _outline(status: Status) -> Sequence[object]:
    return [
        status.observed_generation,
        status.sale_id,
        status.hold_expired,
        *((c.type, c.status, c.reason, c.observed_generation) for c in status.conditions),
    ]


def _open(result: Result) -> tuple[str, str, str]:
    known = result.state is not SaleState.UNKNOWN
    status = str(result.state is SaleState.SELLING) if known else "Unknown"
    return status, result.state, open_message(result)


def _sold_out(before: Status, result: Result) -> tuple[str, str, str]:
    sale, old = result.trusted_sale, before.condition("SoldOut")
    if result.state is SaleState.FENCED and old is not None:
        return old.status, old.reason, old.message
    if sale is None:
        return "Unknown", "Unknown", "Redis has no counts of this sale"
    if sale.available <= 0:
        held = f": {counted(sale.held, 'unit')} held, which may come back" if sale.held else ""
        return "True", "SoldOut", f"no units are available{held}"
    return "False", "Available", "units are available"


def _refused(before: Status, result: Result) -> tuple[str, str, str]:
    if result.refused is None:
        old = before.condition("Refused")
        if old is not None:
            return old.status, old.reason, old.message
        return "Unknown", "Unknown", "the ledger was not asked"
    if not result.refused.reservations:
        return "False", "NoneRefused", "the ledger has refused no reservation"
    return "True", "Refused", refused_message(result.refused)


def refused_message(refused: Refused) -> str:
    """Returns the message of the Refused condition, and of the Event."""
    return (
        f"the ledger has refused {counted(refused.reservations, 'reservation')} "
        f"({counted(refused.units, 'unit')}), because the sale had no units for them: their buyers "
        "hold a 202 and get nothing"
    )


def open_message(result: Result) -> str:  # noqa: PLR0911 - one message per state
    """Returns the message of the Open condition, and of Events about the state."""
    sale, message = result.own_sale, result.message
    starts_ms = None if sale is None else sale.starts_ms
    ends_ms = None if sale is None else sale.ends_ms
    match result.state:
        case SaleState.SCHEDULED if starts_ms is not None:
            return f"the sale opens at {rfc3339_of_ms(starts_ms)}"
        case SaleState.SELLING if ends_ms is not None:
            return f"reservations are accepted until {rfc3339_of_ms(ends_ms)}"
        case SaleState.SELLING:
            return "reservations are accepted"
        case SaleState.SOLD_OUT if sale is not None and sale.held:
            held = counted(sale.held, "held unit")
            return f"all units are sold or held: {held} may come back"
        case SaleState.SOLD_OUT if sale is not None and sale.hold_ms:
            # Kafka may not have acknowledged yet that a hold has ended.
            return (
                "all units are sold: a larger spec.stock or a hold that has just ended opens the "
                "sale again"
            )
        case SaleState.SOLD_OUT:
            return "all units are sold: a larger spec.stock opens the sale again"
        case SaleState.PAUSED:
            return "spec.paused is true: no reservation is accepted"
        case SaleState.CLOSING:
            return DELETED_MESSAGE
        case SaleState.ENDED if ends_ms is not None:
            return f"the sale ended at {rfc3339_of_ms(ends_ms)}"
        case SaleState.FENCED:
            return f"Redis restarted or lost keys, so no reservation is accepted: {message}"
        case _:
            return message
