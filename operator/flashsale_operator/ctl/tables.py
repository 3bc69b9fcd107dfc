"""The lines and tables that `flashsalectl` prints."""

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from flashsale import requirements
from flashsale.inventory import Freed
from flashsale.reservations import Transition, Verb
from flashsale_operator.sales.audit import Audit, SaleFinding
from flashsale_operator.sales.decision import Reason, StillFenced, counted
from flashsale_operator.sales.rebuild import Rebuilt
from flashsale_operator.sales.reconciler import Result

_REBUILD: Final = (
    "nothing is accepted until it is rebuilt from the ledger: apply it again, or run "
    "`flashsalectl rebuild {item}`"
)
_CHANGES: Final[dict[tuple[Verb, Transition], str]] = {
    ("confirm", Transition.CHANGED): "is confirmed for order {order}",
    ("confirm", Transition.REPLAYED): "was confirmed for order {order} before",
    ("cancel", Transition.CHANGED): "is cancelled, and its units are for sale again",
    ("cancel", Transition.REPLAYED): "was cancelled or had expired before",
}
_REFUSALS: Final = {
    Transition.HOLD_EXPIRED: "has expired, so it cannot be confirmed",
    Transition.CANCELLED: "was cancelled, so it cannot be confirmed",
    Transition.OTHER_ORDER: "is confirmed for another order than {order}",
    Transition.UNKNOWN_RESERVATION: "is no reservation of this item in Redis",
}
_NEXT: Final = {
    Reason.FENCED: _REBUILD,
    Reason.KAFKA_UNAVAILABLE: _REBUILD,
    Reason.ITEM_CONFLICT: "apply it again when that sale is closed (`flashsalectl close {item}`) "
    "and recorded",
    Reason.SUPERSEDED: "apply it again if this manifest must win",
}

LOST_KEYS: Final = (
    "Redis restarted or lost keys of the sale: run `flashsalectl rebuild {item}`, and delete the "
    "sale again"
)
OPEN_HOLDS: Final = (
    "it has open holds of {units}: confirm or cancel them, or delete the sale again after they "
    "expire"
)
REFUSED: Final = (
    "the ledger refused {reservations}, so it never has all units of Redis. The buyers got a 202 "
    "and have no unit: see FlashsaleRefused in docs/runbooks.md"
)


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


def line_of_delete(sale_id: str, freed: Freed, obstacle: str = "") -> str:
    """Returns the line about a sale that was closed and whose keys were to be freed.

    `obstacle` says why the keys of an unrecorded sale stay until a person acts.
    """
    match freed:
        case Freed.FREED:
            return f"sale {sale_id} deleted: its keys are freed, and the ledger keeps its rows"
        case Freed.UNKNOWN:
            return f"sale {sale_id} closed: Redis had no keys of it"
        case Freed.UNRECORDED if obstacle:
            return f"sale {sale_id} closed: its keys stay, because {obstacle}"
        case Freed.UNRECORDED:
            return f"sale {sale_id} closed: its keys stay until the ledger has all its events"
        case Freed.OPEN:
            return f"sale {sale_id} is open: its manifest was applied again at the same time"
        case _:
            return f"sale {sale_id} closed: its keys stay, because another process changed it"


def line_of_rebuild(sale_id: str, done: Rebuilt | StillFenced) -> str:
    """Returns one line about a rebuild: its counts, or why the sale stays fenced."""
    if isinstance(done, StillFenced):
        return f"sale {sale_id} stays fenced: {done}; try again"
    if not (done.changed or done.seconds):
        return f"sale {sale_id} needs no rebuild: {counted(done.accepted, 'accepted unit')}"
    return f"sale {sale_id} rebuilt in {done.seconds:.1f} s: {done}"


def line_of_change(
    reservation_id: str, verb: Verb, outcome: Transition, order_ref: str | None
) -> tuple[str, bool]:
    """Returns a sentence about a confirmation or cancellation, and whether it succeeded."""
    sentence = _CHANGES.get((verb, outcome)) or _REFUSALS[outcome]
    if outcome is Transition.OTHER_ORDER and order_ref is None:
        sentence = "is confirmed: name its order with --order-ref"
    line = f"{reservation_id} {sentence.format(order=order_ref)}"
    return line, outcome in (Transition.CHANGED, Transition.REPLAYED)


def of_audit(found: Audit) -> str:
    """Returns a table with one line per sale, and one line per fault of the topic."""
    audited = table(
        "SALE ITEM STATE ALLOCATED ACCEPTED HELD RECORDED OUTBOX LAG VERDICT",
        [
            (
                finding.sale_id,
                finding.item_id,
                finding.state,
                finding.allocated,
                finding.accepted,
                finding.held,
                finding.recorded,
                finding.outbox,
                finding.lag,
                _verdict(finding),
            )
            for finding in found.findings
        ],
    )
    faults = [f"topic {found.topic} DISAGREES: {fault}" for fault in found.topic_faults]
    return "\n".join([audited, *faults])


def of_findings(found: Sequence[requirements.Finding]) -> str:
    """Returns a table with one line per check."""
    return table("VERDICT SERVER CHECK", [(each.verdict, each.server, each.text) for each in found])


def _verdict(finding: SaleFinding) -> str:
    return f"{finding.verdict}: {'; '.join(finding.notes)}" if finding.notes else finding.verdict


def table(head: str, lines: Iterable[Sequence[object]]) -> str:
    """Returns lines of aligned columns. A value that is None is shown as `-`."""
    return "\n".join(aligned([head.split(), *lines])[0])


def aligned(
    lines: Iterable[Sequence[object]], least: Sequence[int] = ()
) -> tuple[list[str], list[int]]:
    """Returns lines of aligned columns, and the columns' widths, which are at least `least`."""
    rows = [["-" if word is None else str(word) for word in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths = list(map(max, widths, least or widths))
    return ["   ".join(map(str.ljust, row, widths)).rstrip() for row in rows], widths


def json_of(found: object) -> str:
    """Returns structs or dataclasses as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode()
