"""A sale: what its owner asks for, what Redis holds of it, and the state that follows."""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache


class SaleState(StrEnum):
    """What a sale is doing, as HTTP, `flashsalectl get` and the FlashSale's Open condition say."""

    SCHEDULED = "Scheduled"
    SELLING = "Selling"
    SOLD_OUT = "SoldOut"
    PAUSED = "Paused"
    ENDED = "Ended"
    CLOSING = "Closing"
    FENCED = "Fenced"


@dataclass(frozen=True, slots=True)
class SaleSpec:
    """What a manifest asks for. Times are Unix milliseconds; None is "no bound"."""

    sale_id: str
    item_id: str
    stock: int
    max_per_user: int = 1
    display_name: str | None = None
    starts_ms: int | None = None
    ends_ms: int | None = None
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Sale:
    """A sale as Redis holds it. Counts are units, times Unix milliseconds.

    `torn`: units were accepted, and one of the sale's other keys is gone.
    """

    item_id: str
    sale_id: str
    run_id: str
    revision: int
    stored_state: str
    allocated: int
    accepted: int
    released: int
    max_per_user: int
    display_name: str | None
    starts_ms: int | None
    ends_ms: int | None
    last_now_ms: int
    outbox_length: int
    torn: bool

    @property
    def held(self) -> int:
        """Units in the hands of buyers."""
        return self.accepted - self.released

    @property
    def available(self) -> int:
        """Units that can still be accepted; derived, never stored."""
        return self.allocated - self.held

    def state(self, now_ms: int, server_run_id: str) -> SaleState:
        """The state at a moment of Redis' clock, in the order in which `reserve.lua` decides."""
        now_ms = max(now_ms, self.last_now_ms)
        if self.torn or self.run_id != server_run_id:
            return SaleState.FENCED
        if self.stored_state == "closed":
            return SaleState.CLOSING
        if self.stored_state == "ended" or (self.ends_ms is not None and now_ms >= self.ends_ms):
            return SaleState.ENDED
        if self.stored_state == "paused":
            return SaleState.PAUSED
        if self.starts_ms is not None and now_ms < self.starts_ms:
            return SaleState.SCHEDULED
        return SaleState.SELLING if self.available > 0 else SaleState.SOLD_OUT

    def finished(self, now_ms: int) -> bool:
        """Whether the sale will accept nothing any more, unless it is applied again."""
        return self.stored_state in ("closed", "ended") or (
            self.ends_ms is not None and max(now_ms, self.last_now_ms) >= self.ends_ms
        )


@lru_cache(maxsize=1024)  # what a batch accepted has one time
def utc_of_ms(ms: int) -> datetime:
    """An aware UTC time of Unix milliseconds."""
    return datetime.fromtimestamp(ms / 1000, UTC)


@lru_cache(maxsize=1024)
def rfc3339_of_ms(ms: int) -> str:
    """RFC 3339 text of Unix milliseconds, as HTTP answers carry it: `2026-11-27T09:00:00.000Z`."""
    return utc_of_ms(ms).isoformat(timespec="milliseconds").replace("+00:00", "Z")
