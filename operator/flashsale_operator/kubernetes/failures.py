"""The errors that a reconcile reports: their server, their reason, and whether it is retried."""

from typing import Final

from flashsale.errors import (
    ContractViolation,
    FlashsaleError,
    LedgerUnavailable,
    OtherEngine,
    RedisMoved,
    RedisUnavailable,
    UnmetRequirement,
)
from flashsale.sale import SaleSpec, SaleState
from flashsale_operator.kubernetes.client import KubeUnavailable, NoFlashSales
from flashsale_operator.sales.decision import Reason
from flashsale_operator.sales.offsets import KafkaUnavailable
from flashsale_operator.sales.reconciler import Result

SERVERS: Final[tuple[tuple[type[FlashsaleError], str], ...]] = (
    (RedisUnavailable, "redis"),
    (LedgerUnavailable, "ledger"),
    (KafkaUnavailable, "kafka"),
    (KubeUnavailable, "kubernetes"),
)
_REASONS: Final[dict[type[FlashsaleError], Reason]] = {
    RedisUnavailable: Reason.REDIS_UNAVAILABLE,
    LedgerUnavailable: Reason.LEDGER_UNAVAILABLE,
    ContractViolation: Reason.UNREADABLE,
    OtherEngine: Reason.OTHER_ENGINE,
    RedisMoved: Reason.REDIS_MOVED,
    UnmetRequirement: Reason.REQUIREMENT_UNMET,
}
REPORTED: Final = tuple(_REASONS)
"""Errors of a reconcile that the FlashSale's status reports."""
MISTAKES: Final = (OtherEngine, RedisMoved, UnmetRequirement, NoFlashSales)
"""Errors that last until a person acts."""
RETRIED: Final = frozenset(
    {*_REASONS.values(), Reason.KAFKA_UNAVAILABLE, Reason.INVALID_SPEC, Reason.FAILED}
)
"""Reasons of a reconcile that did not finish, and is retried with a back-off."""


def server_of(error: BaseException) -> str:
    """Returns the server that an error comes from, as the metrics name it."""
    return next((name for kind, name in SERVERS if isinstance(error, kind)), "other")


def result_of_bug(sale_id: str, error: Exception) -> Result:
    """Returns the result of a reconcile that an unexpected error ended."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    message = f"an unexpected error ended the reconcile, see the operator's log: {text}"
    return Result(sale_id, "", SaleState.UNKNOWN, Reason.FAILED, message)


def result_of_error(spec: SaleSpec, error: FlashsaleError) -> Result:
    """Returns the result of a reconcile that one of `REPORTED` ended, if nothing else is known."""
    message = " ".join(str(error).split())
    return Result(spec.sale_id, spec.item_id, SaleState.UNKNOWN, _REASONS[type(error)], message)
