"""Show the sales in the ledger and in Redis, as a table, JSON, YAML or a description."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from flashsale.clocks import ServerTime
from flashsale.ledger import SaleRow
from flashsale.sale import Sale, SaleSpec, SaleState, rfc3339_of_ms
from flashsale_operator.ctl.tables import aligned, json_of, table
from flashsale_operator.sales import documents
from flashsale_operator.sales.decision import counted, spec_of, state_of


class SaleView(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A sale. Counts are units. A count is None if its store does not have the sale.

    `accepted`, `available` and `outbox` are in Redis, `recorded` and `lost` in the ledger.
    While a sale is fenced, Redis may lack units. `accepted` and `available` are then None, and
    `held` and `released` are the ledger's.
    `declared_by` is the uid of the FlashSale that declares the sale.
    """

    item_id: str
    sale_id: str
    display_name: str | None
    state: str
    allocated: int | None
    available: int | None
    held: int | None
    accepted: int | None
    released: int | None
    recorded: int | None
    lost: int | None
    outbox: int | None
    max_per_user: int
    hold_seconds: int | None
    starts_at: str | None
    ends_at: str | None
    paused: bool | None
    closed: bool | None
    revision: int
    declared_by: str | None


def views(
    rows: Sequence[SaleRow],
    holders: Mapping[str, Sale],
    servers: Mapping[str, ServerTime],
    last: Container[str],
) -> list[SaleView]:
    """Returns the sales of the ledger, then those that only Redis has, sorted by item.

    `holders` and `servers` have the sale and the server of each item in Redis. Items without a
    server cannot be read now. `last` has the ids of the sales that had their item last.
    """
    recorded = {row.sale_id for row in rows}
    return [
        *(
            _view(
                row,
                holders.get(row.item_id),
                servers.get(row.item_id),
                last=row.sale_id in last,
            )
            for row in sorted(rows, key=lambda row: (row.item_id, row.sale_id))
        ),
        *(
            _view(None, sale, servers[item_id])
            for item_id, sale in sorted(holders.items())
            if sale.sale_id not in recorded
        ),
    ]


def _view(
    row: SaleRow | None, holder: Sale | None, server: ServerTime | None, *, last: bool = False
) -> SaleView:
    sale = None if holder and row and holder.sale_id != row.sale_id else holder
    known: Sale | SaleSpec | None = sale or (spec_of(row) if row else None)
    stored = sale or row
    if known is None or stored is None:
        raise ValueError("neither the ledger nor Redis has the sale")
    if sale is not None:
        hold_seconds = sale.hold_ms // 1000 or None
    else:
        hold_seconds = row.hold_seconds if row else None
    state = state_of(row, holder, server, last=last) if server else SaleState.UNKNOWN
    trusted = None if state is SaleState.FENCED else sale
    recorded = trusted or row
    return SaleView(
        item_id=known.item_id,
        sale_id=known.sale_id,
        display_name=known.display_name,
        state=state,
        allocated=stored.allocated,
        available=trusted.available if trusted else None,
        held=recorded.held if recorded else None,
        accepted=trusted.accepted if trusted else None,
        released=recorded.released if recorded else None,
        recorded=row.accepted if row else None,
        lost=row.lost if row else None,
        outbox=sale.outbox_length if sale else None,
        max_per_user=known.max_per_user,
        hold_seconds=hold_seconds,
        starts_at=None if known.starts_ms is None else rfc3339_of_ms(known.starts_ms),
        ends_at=None if known.ends_ms is None else rfc3339_of_ms(known.ends_ms),
        paused=row.paused if row else None,
        closed=row.closed if row else None,
        revision=stored.revision,
        declared_by=row.resource_uid if row else None,
    )


# Each column's head and value.
_Column = tuple[str, Callable[[SaleView], object]]
COLUMNS: Final[tuple[_Column, ...]] = (
    ("ITEM", lambda sale: sale.item_id),
    ("SALE", lambda sale: sale.sale_id),
    ("STATE", lambda sale: sale.state),
    ("ALLOCATED", lambda sale: sale.allocated),
    ("AVAILABLE", lambda sale: sale.available),
    ("HELD", lambda sale: sale.held),
    ("ACCEPTED", lambda sale: sale.accepted),
    ("RECORDED", lambda sale: sale.recorded),
    ("STARTS", lambda sale: sale.starts_at),
    ("ENDS", lambda sale: sale.ends_at),
)
WIDE: Final[tuple[_Column, ...]] = (
    *COLUMNS,
    ("RELEASED", lambda sale: sale.released),
    ("LOST", lambda sale: sale.lost),
    ("OUTBOX", lambda sale: sale.outbox),
    ("MAXPERUSER", lambda sale: sale.max_per_user),
    ("HOLDSECONDS", lambda sale: sale.hold_seconds),
    ("REVISION", lambda sale: sale.revision),
    ("FLASHSALE", lambda sale: "yes" if sale.declared_by else "no"),
)


def _head_of(columns: Sequence[_Column]) -> list[str]:
    return [head for head, _ in columns]


def _rows_of(sales: Iterable[SaleView], columns: Sequence[_Column]) -> list[list[object]]:
    return [[value(sale) for _, value in columns] for sale in sales]


def _table_of(sales: Iterable[SaleView], columns: Sequence[_Column]) -> str:
    return table(" ".join(_head_of(columns)), _rows_of(sales, columns))


def _yaml_of(sales: SaleView | Sequence[SaleView]) -> str:
    return documents.yaml_of(msgspec.to_builtins(sales))


# JSON and YAML are a list, also of one sale.
FORMATS: Final[dict[str, Callable[[Sequence[SaleView]], str]]] = {
    "table": lambda sales: _table_of(sales, COLUMNS),
    "wide": lambda sales: _table_of(sales, WIDE),
    "json": json_of,
    "yaml": _yaml_of,
}


class Changes:
    """Formats the sales that changed since the last call, for `--watch`.

    A table has its head once. JSON has one object per line, and YAML one document per sale.
    """

    def __init__(self, output: str) -> None:
        self._output = output
        self._columns = {"table": COLUMNS, "wide": WIDE}.get(output)
        self.shown: dict[str, SaleView] = {}
        """The sales at the last call, by id."""
        self._widths: list[int] = []
        """The widths of the columns, which never shrink. Empty until the head is written."""

    def lines(self, sales: Sequence[SaleView]) -> list[str]:
        changed = [sale for sale in sales if self.shown.get(sale.sale_id) != sale]
        self.shown = {sale.sale_id: sale for sale in sales}
        if self._columns is None:
            return [self._document(sale) for sale in changed]
        if not changed:
            return []
        rows: list[Sequence[object]] = [*_rows_of(changed, self._columns)]
        if not self._widths:
            rows.insert(0, _head_of(self._columns))
        lines, self._widths = aligned(rows, self._widths)
        return lines

    def _document(self, sale: SaleView) -> str:
        if self._output == "json":
            return msgspec.json.encode(sale).decode()
        return f"---\n{_yaml_of(sale)}"


def description(sale: SaleView, reservations: Mapping[str, int]) -> str:
    """Returns a sale as lines for a person. `reservations` are the ledger's, by state."""
    namespace, _, name = sale.sale_id.partition("/")
    window = f"{sale.starts_at or 'now'} to {sale.ends_at or 'its close'}"
    holds = f"{sale.hold_seconds} s" if sale.hold_seconds else "none: confirmed at once"
    declared = f"the FlashSale {name} in {namespace}" if sale.declared_by else "flashsalectl apply"
    states = ", ".join(f"{count} {state}" for state, count in sorted(reservations.items()))
    values: list[tuple[str, object]] = [
        ("Sale", sale.sale_id),
        ("Item", sale.item_id),
        ("Display name", sale.display_name),
        ("State", sale.state),
        ("Open", "always" if not (sale.starts_at or sale.ends_at) else window),
        ("Paused", None if sale.paused is None else "yes" if sale.paused else "no"),
        ("Limit", f"{counted(sale.max_per_user, 'unit')} per user"),
        ("Holds", holds),
        ("Declared by", declared),
        ("Allocated", sale.allocated),
        ("Available", sale.available),
        ("Held", sale.held),
        ("Accepted", sale.accepted),
        ("Released", sale.released),
        ("Recorded", sale.recorded),
        ("Lost", sale.lost),
        ("Outbox", sale.outbox),
        ("Revision", sale.revision),
        ("Reservations", states or "none in the ledger"),
    ]
    if sale.state == SaleState.FENCED:
        values.append(("Next", f"flashsalectl rebuild {sale.item_id}"))
    elif sale.declared_by:
        values.append(("Next", f"kubectl -n {namespace} describe flashsale {name}"))
    return "\n".join(f"{f'{name}:':16}{'-' if value is None else value}" for name, value in values)
