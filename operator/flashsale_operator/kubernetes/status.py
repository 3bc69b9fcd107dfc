"""A FlashSale's status: pure, from what a reconcile found and the status before it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Self

from flashsale.errors import FlashsaleError, LedgerUnavailable, RedisUnavailable
from flashsale.sale import Sale, SaleState, rfc3339_of_ms
from flashsale_operator.sales.decision import Reason
from flashsale_operator.sales.offsets import KafkaUnavailable
from flashsale_operator.sales.rebuild import Rebuilt
from flashsale_operator.sales.reconciler import Report

SAMPLE_SECONDS: Final = 5.0
"""How often, at most, a status is written in which only numbers or words changed."""
MAX_MESSAGE: Final = 1024


class Obstacle(StrEnum):
    """Ready's reasons for what kept a reconcile from its end; `Reason` has the others."""

    REDIS_UNAVAILABLE = "RedisUnavailable"
    LEDGER_UNAVAILABLE = "LedgerUnavailable"
    KAFKA_UNAVAILABLE = "KafkaUnavailable"
    UNREADABLE = "Unreadable"
    INVALID_SPEC = "InvalidSpec"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True)
class Counts:
    """Units of a sale as Redis has them."""

    allocated: int
    accepted: int
    available: int

    @classmethod
    def of(cls, sale: Sale) -> Self:
        return cls(sale.allocated, sale.accepted, sale.available)


@dataclass(frozen=True, slots=True)
class Found:
    """What a reconcile found. `reason` and `message` are Ready's, `told` is Open's message;
    no `counts`: they are not known, or Redis has none of this sale. `recorded` is the accepted
    units that the ledger has, if that is known; `rebuilt` what came back of a fenced sale.
    """

    state: SaleState
    ready: bool
    reason: Reason | Obstacle
    message: str
    told: str
    counts: Counts | None = None
    recorded: int | None = None
    rebuilt: Rebuilt | None = None


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of a status; `since` is its lastTransitionTime."""

    type: str
    status: str
    reason: str
    message: str
    observed_generation: int | None
    since: str

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        return cls(
            type=given.get("type", ""),
            status=given.get("status", ""),
            reason=given.get("reason", ""),
            message=given.get("message", ""),
            observed_generation=given.get("observedGeneration"),
            since=given.get("lastTransitionTime", ""),
        )

    def json(self) -> dict[str, object]:
        return {
            "type": self.type,
            "status": self.status,
            "observedGeneration": self.observed_generation,
            "lastTransitionTime": self.since,
            "reason": self.reason,
            "message": self.message,
        }


@dataclass(frozen=True, slots=True)
class Status:
    """A FlashSale's status; an empty one is that of a FlashSale that was never reconciled."""

    observed_generation: int | None = None
    sale_id: str | None = None
    conditions: tuple[Condition, ...] = ()
    counts: Counts | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """A status as the kube-apiserver gives it."""
        numbers = [given[name] for name in ("allocated", "accepted", "available") if name in given]
        return cls(
            observed_generation=given.get("observedGeneration"),
            sale_id=given.get("saleId"),
            conditions=tuple(Condition.parse(each) for each in given.get("conditions") or ()),
            counts=Counts(*numbers) if len(numbers) == 3 else None,
        )

    def json(self) -> dict[str, object]:
        """The whole status as a merge patch."""
        counts = self.counts
        return {
            "observedGeneration": self.observed_generation,
            "saleId": self.sale_id,
            "conditions": [condition.json() for condition in self.conditions],
            "allocated": None if counts is None else counts.allocated,
            "accepted": None if counts is None else counts.accepted,
            "available": None if counts is None else counts.available,
        }

    def condition(self, kind: str) -> Condition | None:
        """The condition of that type."""
        return next((each for each in self.conditions if each.type == kind), None)


def found_of(report: Report) -> Found:
    """What a reconcile that came to its end found."""
    sale = report.sale if report.sale and report.sale.sale_id == report.sale_id else None
    reason: Reason | Obstacle = report.reason
    if report.reason is Reason.FENCED and report.kept and report.kept.without_kafka:
        reason = Obstacle.KAFKA_UNAVAILABLE
    return Found(
        state=report.state,
        ready=report.ready,
        reason=reason,
        message="ledger and Redis are as the spec asks" if report.ready else report.message,
        told=_told(report.state, report.message, sale),
        counts=None if sale is None else Counts.of(sale),
        recorded=None if report.row is None else report.row.accepted,
        rebuilt=report.rebuilt,
    )


def found_of_error(error: FlashsaleError, seen: tuple[SaleState, Sale] | None = None) -> Found:
    """What is known when a reconcile met `error`; `seen` is what Redis says all the same."""
    message = " ".join(str(error).split())
    match error:
        case RedisUnavailable():
            reason = Obstacle.REDIS_UNAVAILABLE
        case LedgerUnavailable():
            reason = Obstacle.LEDGER_UNAVAILABLE
        case KafkaUnavailable():
            reason = Obstacle.KAFKA_UNAVAILABLE
        case _:
            reason = Obstacle.UNREADABLE
    if seen is None:
        return Found(SaleState.UNKNOWN, False, reason, message, f"not known: {message}")
    state, sale = seen
    return Found(state, False, reason, message, _told(state, message, sale), Counts.of(sale))


def next_status(
    before: Status, found: Found, *, sale_id: str, generation: int, now: datetime
) -> Status:
    """The status after `found`. A lastTransitionTime moves only when the condition's status does;
    numbers that are not known now stay as they were.
    """
    counts = found.counts or before.counts
    ready = (str(found.ready), found.reason, found.message)
    kinds = {"Ready": ready, "Open": _open(found), "SoldOut": _sold_out(found)}
    at = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    conditions = []
    for kind, (status, reason, message) in kinds.items():
        old = before.condition(kind)
        since = old.since if old is not None and old.status == status and old.since else at
        conditions.append(
            Condition(kind, status, str(reason), message[:MAX_MESSAGE], generation, since)
        )
    return Status(generation, sale_id, tuple(conditions), counts)


def worth_writing(before: Status, after: Status, seconds_since_written: float) -> bool:
    """Whether to write a status: at once when a condition or the generation changed, and for
    numbers and words alone every 5 s at most.
    """
    if before == after:
        return False
    return _outline(before) != _outline(after) or seconds_since_written >= SAMPLE_SECONDS


def _outline(status: Status) -> Sequence[object]:
    return [
        status.observed_generation,
        status.sale_id,
        *((c.type, c.status, c.reason, c.observed_generation) for c in status.conditions),
    ]


def _open(found: Found) -> tuple[str, str, str]:
    if found.state is SaleState.UNKNOWN:
        return "Unknown", found.state, found.told
    return str(found.state is SaleState.SELLING), found.state, found.told


def _sold_out(found: Found) -> tuple[str, str, str]:
    counts = found.counts
    if counts is None:
        return "Unknown", "Unknown", "Redis says nothing of this sale"
    if counts.available <= 0:
        return "True", "SoldOut", "nothing is available"
    return "False", "Available", "units are available"


def _told(state: SaleState, message: str, sale: Sale | None) -> str:  # noqa: PLR0911 - a list of words
    starts_ms = None if sale is None else sale.starts_ms
    ends_ms = None if sale is None else sale.ends_ms
    match state:
        case SaleState.SCHEDULED if starts_ms is not None:
            return f"opens at {rfc3339_of_ms(starts_ms)}"
        case SaleState.SELLING if ends_ms is not None:
            return f"reservations are accepted until {rfc3339_of_ms(ends_ms)}"
        case SaleState.SELLING:
            return "reservations are accepted"
        case SaleState.SOLD_OUT:
            return "all units are held; a larger spec.stock opens it again"
        case SaleState.PAUSED:
            return "spec.paused is true: nothing is accepted"
        case SaleState.CLOSING:
            return "deleted: nothing is accepted any more"
        case SaleState.ENDED if ends_ms is not None:
            return f"it ended at {rfc3339_of_ms(ends_ms)}"
        case SaleState.FENCED:
            return f"Redis restarted or lost keys, so nothing is accepted: {message}"
        case _:
            return message
