"""Write the reservations of an item, page by page, as a table, CSV or JSON."""

import csv
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from typing import Final, TextIO, TypeAlias

import asyncpg
import msgspec

from flashsale import ledger
from flashsale.sale import rfc3339
from flashsale_operator.ctl.tables import table

PAGE: Final = 1_000
FORMULA: Final = ("=", "+", "-", "@")
"""The first characters of a formula that a userId or an orderRef may have."""
_HEAD: Final = "RESERVATION SALE USER QUANTITY STATE ACCEPTED EXPIRES CONFIRMED ORDER"

# In the order of the primary key, so that the first page needs no sort.
_RESERVATIONS: Final = """
SELECT r.reservation_id::text AS id, sale_id, r.user_id, r.quantity, r.state, r.version,
       r.accepted_at, r.expires_at, r.confirmed_at, r.order_ref
FROM reservations r JOIN sales s USING (sale_id)
WHERE s.item_id = $1 ORDER BY r.sale_id, r.reservation_id
"""


class Reservation(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A reservation in the ledger. Times are RFC 3339."""

    reservation_id: str
    sale_id: str
    user_id: str
    quantity: int
    state: str
    version: int
    accepted_at: str
    expires_at: str | None = None
    confirmed_at: str | None = None
    order_ref: str | None = None

    @classmethod
    def of(cls, record: "asyncpg.Record") -> "Reservation":
        return cls(
            reservation_id=record["id"],
            sale_id=record["sale_id"],
            user_id=record["user_id"],
            quantity=record["quantity"],
            state=record["state"],
            version=record["version"],
            accepted_at=rfc3339(record["accepted_at"]),
            expires_at=record["expires_at"] and rfc3339(record["expires_at"]),
            confirmed_at=record["confirmed_at"] and rfc3339(record["confirmed_at"]),
            order_ref=record["order_ref"],
        )


Pages: TypeAlias = AsyncIterable[list[Reservation]]
"""The reservations of an item. There is at least one page, and the last one may be empty."""


async def pages(pool: ledger.Pool, item_id: str) -> AsyncGenerator[list[Reservation]]:
    """Yields the reservations of an item's sales, as `Pages`. Raises `LedgerUnavailable`."""
    page: list[Reservation] = []
    async with (
        ledger.translated(),
        pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        async for record in connection.cursor(_RESERVATIONS, item_id, prefetch=PAGE):
            page.append(Reservation.of(record))
            if len(page) == PAGE:
                yield page
                page = []
    yield page


async def write_table(out: TextIO, pages: Pages) -> None:
    """Writes a table. Each page is aligned for itself, so that none waits for the next ones."""
    first = True
    async for page in pages:
        lines = [
            (
                each.reservation_id,
                each.sale_id,
                each.user_id,
                each.quantity,
                each.state,
                each.accepted_at,
                each.expires_at,
                each.confirmed_at,
                each.order_ref,
            )
            for each in page
        ]
        head, _, rows = table(_HEAD, lines).partition("\n")
        if first:
            print(head, file=out)
        if rows:
            print(rows, file=out)
        first = False


async def write_csv(out: TextIO, pages: Pages) -> None:
    """Writes a header, and then a line per reservation. New columns come last.

    A spreadsheet runs a value that begins with one of `FORMULA` as a formula, so it gets an
    apostrophe in front.
    """
    writer = csv.writer(out, lineterminator="\n")
    first = True
    async for page in pages:
        if first:
            writer.writerow(field.encode_name for field in msgspec.structs.fields(Reservation))
        writer.writerows(map(_harmless, msgspec.structs.astuple(each)) for each in page)
        first = False


async def write_json(out: TextIO, pages: Pages) -> None:
    """Writes one array, with a reservation per line."""
    before = "[\n"
    async for page in pages:
        for each in page:
            out.write(f"{before}{msgspec.json.encode(each).decode()}")
            before = ",\n"
    out.write("[]\n" if before == "[\n" else "\n]\n")


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


WRITERS: Final[dict[str, Callable[[TextIO, Pages], Awaitable[None]]]] = {
    "table": write_table,
    "csv": write_csv,
    "json": write_json,
}
