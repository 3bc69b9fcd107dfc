"""A sale: the manifest's values, the record in Redis, and the state derived from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Final, NamedTuple

from flashsale.errors import ContractViolation

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_YEAR_10000_MS: Final = 253_402_300_800_000


class SaleState(StrEnum):
    """The state of a sale in HTTP answers, `flashsalectl get` and the FlashSale's Open condition.

    The last two need the ledger: only the operator and `flashsalectl` report them.
    """

    SCHEDULED = "Scheduled"
    SELLING = "Selling"
    SOLD_OUT = "SoldOut"
    PAUSED = "Paused"
    ENDED = "Ended"
    CLOSING = "Closing"
    FENCED = "Fenced"
    ITEM_CONFLICT = "ItemConflict"
    UNKNOWN = "Unknown"


class Predecessor(NamedTuple):
    """A finished sale that a new sale of the same item replaces in Redis.

    The ledger has recorded all its reservations: `accepted` and `released` units, and no hold.
    """

    sale_id: str
    accepted: int
    released: int = 0


@dataclass(frozen=True, slots=True)
class SaleSpec:
    """The values of a manifest. Times are Unix milliseconds, and None means no bound.

    A reservation is held for `hold_seconds`, or confirmed at once if that is None.
    """

    sale_id: str
    item_id: str
    stock: int
    max_per_user: int = 1
    display_name: str | None = None
    starts_ms: int | None = None
    ends_ms: int | None = None
    paused: bool = False
    hold_seconds: int | None = None
    max_expired_holds: int = 3

    def arguments(self, revision: int, *, closed: bool = False) -> tuple[str | int, ...]:
        """Returns the first ten ARGV of `apply.lua` and `fence.lua`."""
        state = "paused" if self.paused else "open"
        return (
            self.sale_id,
            revision,
            self.stock,
            self.max_per_user,
            "" if self.starts_ms is None else self.starts_ms,
            "" if self.ends_ms is None else self.ends_ms,
            "closed" if closed else state,
            self.display_name or "",
            1000 * (self.hold_seconds or 0),
            self.max_expired_holds,
        )


@dataclass(frozen=True, slots=True)
class Sale:
    """A sale as Redis stores it. Counts are units, times are Unix milliseconds.

    `torn` means that units were accepted or held and one of the sale's other keys is missing.
    `engine` is the id of the sale's engine, or empty if the previous version applied the sale.
    `held` are the units of reservations that are not confirmed yet.
    `rebuilt` is the revision of the last rebuild that wrote the keys, or 0. It is None if the
    previous version wrote them.
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
    engine: str = ""
    held: int = 0
    hold_ms: int = 0
    max_expired_holds: int = 3
    rebuilt: int | None = None

    @property
    def taken(self) -> int:
        """Units that buyers have, held or confirmed."""
        return self.accepted - self.released

    @property
    def confirmed(self) -> int:
        """Units that buyers have and that cannot expire.

        A unit whose hold has just ended counts until Kafka has the event.
        """
        return self.taken - self.held

    @property
    def available(self) -> int:
        """Units that can still be accepted. This is derived and never stored."""
        return self.allocated - self.taken

    def state(self, now_ms: int, server_run_id: str) -> SaleState:
        """Returns the state at a time of Redis' clock, by the rules of `reserve.lua` in order."""
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
        """Whether the sale accepts nothing more unless its manifest is applied again."""
        return self.stored_state in ("closed", "ended") or (
            self.ends_ms is not None and max(now_ms, self.last_now_ms) >= self.ends_ms
        )


def parse_sale(
    item_id: str, fields: Mapping[str, str], outbox_length: int, parts: int, holds: int
) -> Sale:
    """Returns a sale from the fields of its hash.

    `parts` of its three other keys exist, and `holds` reservations are open. Raises
    `ContractViolation` if a field is missing or wrong.
    """
    if fields.get("format") != "1":
        raise ContractViolation(f"{item_id}: format {fields.get('format')!r} is not supported")
    try:
        accepted, held = int(fields["accepted"]), int(fields.get("held") or 0)
        return Sale(
            item_id=item_id,
            sale_id=fields["sale_id"],
            run_id=fields["run_id"],
            revision=int(fields["revision"]),
            stored_state=fields["state"],
            allocated=int(fields["allocated"]),
            accepted=accepted,
            released=int(fields["released"]),
            max_per_user=int(fields["max_per_user"]),
            display_name=fields.get("display_name") or None,
            starts_ms=ms_of_text(fields["starts_ms"]) if fields["starts_ms"] else None,
            ends_ms=ms_of_text(fields["ends_ms"]) if fields["ends_ms"] else None,
            last_now_ms=ms_of_text(fields["last_now_ms"]),
            outbox_length=outbox_length,
            torn=(accepted > 0 and parts < 3) or (held > 0 and not holds),
            engine=fields.get("engine", ""),
            held=held,
            hold_ms=int(fields.get("hold_ms") or 0),
            max_expired_holds=int(fields.get("max_expired_holds") or 3),
            rebuilt=int(fields["rebuilt"]) if fields.get("rebuilt") else None,
        )
    except (KeyError, ValueError) as error:
        raise ContractViolation(f"{item_id}: the sale cannot be read: {error}") from error


def ms_of_text(text: str) -> int:
    """Parses Unix milliseconds. Raises ValueError if no `datetime` has that time."""
    ms = int(text)
    if not 0 <= ms < _YEAR_10000_MS:
        raise ValueError(f"{text} ms is no time of the years 1970 to 9999")
    return ms


@lru_cache(maxsize=1024)  # all reservations of a batch have the same time
def utc_of_ms(ms: int) -> datetime:
    """Returns Unix milliseconds as an aware UTC time."""
    # A float of seconds has no exact milliseconds after the year 2242.
    return _EPOCH + ms * _MILLISECOND


def ms_of_time(time: datetime) -> int:
    """Returns an aware time in Unix milliseconds, rounded down."""
    return (time - _EPOCH) // _MILLISECOND


def rfc3339(time: datetime) -> str:
    """Returns an aware time in RFC 3339, in UTC with milliseconds: `2026-11-27T09:00:00.000Z`."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@lru_cache(maxsize=1024)
def rfc3339_of_ms(ms: int) -> str:
    """Returns Unix milliseconds in RFC 3339, as in HTTP answers."""
    return rfc3339(utc_of_ms(ms))
