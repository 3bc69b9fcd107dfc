"""The lines and tables that `flashsalectl` prints."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from flashsale.inventory import ServerTime
from flashsale.ledger import SaleRow
from flashsale.sale import Sale, SaleSpec, rfc3339_of_ms
from flashsale_operator.sales.audit import Audit, Finding
from flashsale_operator.sales.decision import Reason, StillFenced, counted, spec_of, state_of
from flashsale_operator.sales.rebuild import Rebuilt
from flashsale_operator.sales.reconciler import Result

_REBUILD: Final = (
    "nothing is accepted until it is rebuilt from the ledger: apply it again, or run "
    "`flashsalectl rebuild {item}`"
)
_NEXT: Final = {
    Reason.FENCED: _REBUILD,
    Reason.KAFKA_UNAVAILABLE: _REBUILD,
    Reason.ITEM_CONFLICT: "apply it again when that sale is closed (`flashsalectl close {item}`) "
    "and recorded",
    Reason.SUPERSEDED: "apply it again if this manifest must win",
}


def line_of(result: Result) -> str:
    """Returns one line about a sale. If it does not match its manifest, adds the next step."""
    reason = result.reason
    implied = reason is Reason.KAFKA_UNAVAILABLE or reason.value == result.state.value
    state = result.state if result.ready or implied else f"{result.state} ({reason})"
    change = result.applied if result.rebuilt is None else "rebuilt"
    line = f"sale {result.sale_id} {change}: {state}, {result.message}"
    if result.rebuilt is not None:
        line += f"; {result.rebuilt}"
    if result.ready or reason not in _NEXT:
        return line
    return f"{line}; {_NEXT[reason].format(item=result.item_id)}"


def line_of_rebuild(sale_id: str, done: Rebuilt | StillFenced) -> str:
    """Returns one line about a rebuild: its counts, or why the sale stays fenced."""
    if isinstance(done, StillFenced):
        return f"sale {sale_id} stays fenced: {done}; try again"
    if not done.changed:
        return f"sale {sale_id} needs no rebuild: {counted(done.accepted, 'accepted unit')}"
    return f"sale {sale_id} rebuilt in {done.seconds:.1f} s: {done}"


def of_sales(rows: Sequence[SaleRow], held: Mapping[str, Sale], server: ServerTime) -> str:
    """Returns a table of the sales in the ledger or Redis, sorted by item."""
    lines = [
        _line_of_sale(row, held.get(row.item_id), server)
        for row in sorted(rows, key=lambda row: (row.item_id, row.sale_id))
    ]
    recorded = {row.sale_id for row in rows}
    lines += [
        _line_of_sale(None, sale, server)
        for _, sale in sorted(held.items())
        if sale.sale_id not in recorded
    ]
    head = "ITEM SALE STATE ALLOCATED AVAILABLE ACCEPTED RECORDED STARTS ENDS"
    return _table(head, lines)


def of_audit(found: Audit) -> str:
    """Returns a table with one line per sale, and one line per fault of the topic."""
    table = _table(
        "SALE ITEM STATE ALLOCATED ACCEPTED RECORDED OUTBOX LAG VERDICT",
        [
            (
                finding.sale_id,
                finding.item_id,
                finding.state,
                finding.allocated,
                finding.accepted,
                finding.recorded,
                finding.outbox,
                finding.lag,
                _verdict(finding),
            )
            for finding in found.findings
        ],
    )
    faults = [f"topic {found.topic} DISAGREES: {fault}" for fault in found.topic_faults]
    return "\n".join([table, *faults])


def _line_of_sale(row: SaleRow | None, holder: Sale | None, server: ServerTime) -> list[object]:
    sale = None if holder and row and holder.sale_id != row.sale_id else holder
    known: Sale | SaleSpec | None = sale or (spec_of(row) if row else None)
    if known is None:
        raise ValueError("neither the ledger nor Redis has the sale")
    return [
        known.item_id,
        known.sale_id,
        state_of(row, holder, server),
        sale.allocated if sale else row and row.allocated,
        sale.available if sale else None,
        sale.accepted if sale else None,
        row.accepted if row else None,
        None if known.starts_ms is None else rfc3339_of_ms(known.starts_ms),
        None if known.ends_ms is None else rfc3339_of_ms(known.ends_ms),
    ]


def _verdict(finding: Finding) -> str:
    return f"{finding.verdict}: {'; '.join(finding.notes)}" if finding.notes else finding.verdict


def _table(head: str, lines: Iterable[Sequence[object]]) -> str:
    table = [
        head.split(),
        *(["-" if word is None else str(word) for word in line] for line in lines),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "   ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )
