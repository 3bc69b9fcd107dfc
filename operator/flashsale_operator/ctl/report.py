"""Summarize a sale from the ledger, during the sale or after it.

PostgreSQL adds everything up. So the report of a sale with a million reservations needs no more
memory than that of a small one.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import msgspec

from flashsale import ledger
from flashsale.ledger import SaleRow
from flashsale.sale import rfc3339
from flashsale_operator.sales.reconciler import UnknownSale

if TYPE_CHECKING:
    import asyncpg

FIRST_SECONDS: Final = 60
"""The report counts each second of the first minute, and then each minute."""
MAX_BARS: Final = 120
"""A longer sale has bars of several minutes."""
STATES: Final = ("confirmed", "held", "expired", "cancelled", "refused")

_STATES: Final = """
SELECT state, count(*) AS reservations, sum(quantity)::bigint AS units,
       min(accepted_at) AS first, max(accepted_at) AS last
FROM reservations WHERE sale_id = $1 GROUP BY state
"""
# A subquery that groups is faster than count(DISTINCT), which sorts.
_BUYERS: Final = """
SELECT count(*) AS users, count(*) FILTER (WHERE has) AS buyers FROM (
  SELECT bool_or(state IN ('held', 'confirmed')) AS has
  FROM reservations WHERE sale_id = $1 AND state <> 'refused' GROUP BY user_id
) users
"""
_TAKEN: Final = """
SELECT min(time) FROM (
  SELECT {time} AS time, sum(quantity) OVER (ORDER BY {time}) AS units
  FROM reservations WHERE sale_id = $1 AND {condition}
) taken WHERE units >= $2
"""
_ALL_RESERVED: Final = _TAKEN.format(time="accepted_at", condition="state <> 'refused'")
_ALL_CONFIRMED: Final = _TAKEN.format(time="confirmed_at", condition="state = 'confirmed'")
_RATE: Final = """
SELECT bar, count(*) AS reservations FROM (
  SELECT CASE
    WHEN age < $3::float THEN floor(age)
    ELSE $3::float + floor((age - $3::float) / $4::float)
  END::int AS bar
  FROM (
    SELECT greatest(extract(epoch FROM accepted_at - $2), 0)::float AS age
    FROM reservations WHERE sale_id = $1 AND state <> 'refused'
  ) ages
) bars GROUP BY bar
"""
# A later change of a reservation overwrites the time of its row.
_TO_ROW: Final = """
SELECT count(*) AS rows,
       percentile_disc(ARRAY[0.5, 0.95, 0.99, 1]) WITHIN GROUP (
         ORDER BY 1000 * extract(epoch FROM recorded_at - accepted_at)::float
       ) AS percentiles
FROM reservations WHERE sale_id = $1 AND state <> 'refused' AND version = 1
"""
_VERSIONS: Final = """
SELECT current_setting('server_version') AS postgresql,
       (SELECT max(version) FROM flashsale_migrations) AS ledger
"""


class Count(msgspec.Struct, frozen=True, rename="camel"):
    """Reservations in one state, and their units."""

    reservations: int = 0
    units: int = 0


class Rate(msgspec.Struct, frozen=True, rename="camel"):
    """Reservations per second of the first minute, and then per `bar_seconds`."""

    begins_at: str
    first_minute: list[int]
    later_begins_at: str
    bar_seconds: int
    later: list[int]


class ToRow(msgspec.Struct, frozen=True, rename="camel"):
    """Milliseconds from Redis' acceptance to the row, of the `rows` that never changed since."""

    rows: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


class AuditResult(msgspec.Struct, frozen=True, rename="camel"):
    """The audit's verdict and the reasons, or `not audited` with the reason."""

    verdict: str
    notes: list[str]
    at: str


class Report(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A sale in the ledger at one moment. `lost` and `stock` are units.

    `users` have reserved at least once, and `buyers` have units now. The sale opened at `opened_at`
    or, without a start, with its first reservation. `all_reserved_seconds` is the time until the
    reservations first added up to the stock. Some of them may have expired since.
    `all_confirmed_seconds` is the time until the confirmed ones did.
    """

    sale_id: str
    item_id: str
    display_name: str | None
    stock: int
    max_per_user: int
    hold_seconds: int | None
    starts_at: str | None
    ends_at: str | None
    closed: bool
    counts: dict[str, Count]
    lost: int
    users: int
    buyers: int
    opened_at: str | None
    first_reserved_at: str | None
    last_reserved_at: str | None
    all_reserved_seconds: float | None
    all_confirmed_seconds: float | None
    rate: Rate | None
    to_row: ToRow | None
    audit: AuditResult
    versions: dict[str, str]
    made_at: str


async def report(
    pool: ledger.Pool, sale_id: str, audit: AuditResult, versions: Mapping[str, str]
) -> Report:
    """Reports one sale. `versions` names those of other servers.

    Raises `UnknownSale` if the ledger has no row of the sale, and `LedgerUnavailable`.
    """
    async with ledger.transaction(pool, snapshot=True) as connection:
        row = await ledger.sale(connection, sale_id)
        if row is None:
            raise UnknownSale(f"{sale_id}: the ledger has no such sale")
        return await _report(connection, row, audit, versions)


async def _report(
    connection: ledger.Connection,
    row: SaleRow,
    audit: AuditResult,
    versions: Mapping[str, str],
) -> Report:
    async def query(sql: str, *arguments: object) -> "list[asyncpg.Record]":
        return await connection.fetch(sql, row.sale_id, *arguments, timeout=ledger.SUM_SECONDS)

    states = {record["state"]: record for record in await query(_STATES)}
    [people] = await query(_BUYERS)
    [of_servers] = await connection.fetch(_VERSIONS)
    counted = [record for state, record in states.items() if state != "refused"]
    first = min((record["first"] for record in counted), default=None)
    last = max((record["last"] for record in counted), default=None)
    opened = first
    rate = to_row = all_reserved = all_confirmed = None
    if first is not None and last is not None:
        opened = row.starts_at if row.starts_at and row.starts_at <= first else first
        [[all_reserved]] = await query(_ALL_RESERVED, row.allocated)
        [[all_confirmed]] = await query(_ALL_CONFIRMED, row.allocated)
        width = _bar_seconds((last - opened).total_seconds())
        bars = {
            record["bar"]: record["reservations"]
            for record in await query(_RATE, opened, FIRST_SECONDS, width)
        }
        rate = _rate(bars, opened, width)
        to_row = _to_row(*await query(_TO_ROW))
    return Report(
        sale_id=row.sale_id,
        item_id=row.item_id,
        display_name=row.display_name,
        stock=row.allocated,
        max_per_user=row.max_per_user,
        hold_seconds=row.hold_seconds,
        starts_at=rfc3339(row.starts_at) if row.starts_at else None,
        ends_at=rfc3339(row.ends_at) if row.ends_at else None,
        closed=row.closed,
        counts={
            state: Count(states[state]["reservations"], states[state]["units"])
            if state in states
            else Count()
            for state in STATES
        },
        lost=row.lost,
        users=people["users"],
        buyers=people["buyers"],
        opened_at=opened and rfc3339(opened),
        first_reserved_at=first and rfc3339(first),
        last_reserved_at=last and rfc3339(last),
        all_reserved_seconds=_seconds(opened, all_reserved),
        all_confirmed_seconds=_seconds(opened, all_confirmed),
        rate=rate,
        to_row=to_row,
        audit=audit,
        versions={
            **versions,
            "postgresql": of_servers["postgresql"].split()[0],
            "ledger": str(of_servers["ledger"]),
        },
        made_at=rfc3339(datetime.now(UTC)),
    )


def _bar_seconds(seconds: float) -> int:
    """Returns whole minutes, so that no more than `MAX_BARS` follow the first minute."""
    return 60 * max(1, math.ceil((seconds - FIRST_SECONDS) / 60 / MAX_BARS))


def _rate(bars: Mapping[int, int], opened: datetime, width: int) -> Rate:
    number = max(bars) + 1
    return Rate(
        begins_at=rfc3339(opened),
        first_minute=[bars.get(bar, 0) for bar in range(min(number, FIRST_SECONDS))],
        later_begins_at=rfc3339(opened + timedelta(seconds=FIRST_SECONDS)),
        bar_seconds=width,
        later=[bars.get(bar, 0) for bar in range(FIRST_SECONDS, number)],
    )


def _to_row(found: "asyncpg.Record") -> ToRow | None:
    if not found["rows"]:
        return None
    return ToRow(found["rows"], *(round(each, 1) for each in found["percentiles"]))


def _seconds(begin: datetime | None, end: datetime | None) -> float | None:
    if begin is None or end is None:
        return None
    return round((end - begin).total_seconds(), 3)
