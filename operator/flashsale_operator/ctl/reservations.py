"""Write the reservations of an item, page by page, as a table, CSV or JSON."""

import csv
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TextIO

import asyncpg
import msgspec

from flashsale import ledger
from flashsale.sale import rfc3339
from flashsale_operator.ctl.tables import table

PAGE: Final = 1_000
FORMULA: Final = ("=", "+", "-", "@")
"""The first characters of a formula that a userId or an orderRef may have."""

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


async def pages(pool: ledger.Pool, item_id: str) -> AsyncGenerator[list[Reservation]]:
    """Yields the reservations of an item's sales. Raises `LedgerUnavailable`."""
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


class Writer(Protocol):
    """Writes pages in one format. The last page may be empty."""

    def __init__(self, out: TextIO) -> None: ...

    def page(self, page: Sequence[Reservation]) -> None: ...

    def end(self) -> None: ...


@dataclass
class _Table:
    """Aligns each page for itself, so that no page waits for the next ones."""

    out: TextIO
    begun: bool = False

    def page(self, page: Sequence[Reservation]) -> None:
        head = "RESERVATION SALE USER QUANTITY STATE ACCEPTED EXPIRES CONFIRMED ORDER"
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
        text = table(head, lines)
        if self.begun:
            text = text.partition("\n")[2]
        if text:
            print(text, file=self.out)
        self.begun = True

    def end(self) -> None:
        pass


@dataclass
class _Csv:
    """Writes a header, and then a line per reservation. New columns come last.

    A spreadsheet runs a value that begins with one of `FORMULA` as a formula, so it gets an
    apostrophe in front.
    """

    out: TextIO
    begun: bool = False

    def page(self, page: Sequence[Reservation]) -> None:
        writer = csv.writer(self.out, lineterminator="\n")
        if not self.begun:
            writer.writerow(field.encode_name for field in msgspec.structs.fields(Reservation))
        writer.writerows(map(_harmless, msgspec.structs.astuple(each)) for each in page)
        self.begun = True

    def end(self) -> None:
        pass


@dataclass
class _Json:
    """Writes one array, with a reservation per line."""

    out: TextIO
    begun: bool = False

    def page(self, page: Sequence[Reservation]) -> None:
        for each in page:
            self.out.write(",\n" if self.begun else "[\n")
            self.out.write(msgspec.json.encode(each).decode())
            self.begun = True

    def end(self) -> None:
        self.out.write("\n]\n" if self.begun else "[]\n")


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


WRITERS: Final[dict[str, type[Writer]]] = {"table": _Table, "csv": _Csv, "json": _Json}
