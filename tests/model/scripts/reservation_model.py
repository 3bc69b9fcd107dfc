"""The model of the scripts that change reservations: `reserve`, `confirm`, `cancel`, `expire` and
`settle`. `now_ms` is the time in the server's answer.
"""

from collections.abc import Sequence
from typing import Literal

from flashsale.reservations import FINAL, OrderCall, Outcome, Record, Request, State, Transition
from tests.model.scripts.item import Hash, Item

Verb = Literal["confirm", "cancel"]
Change = tuple[str, Record]
"""A reservation's id, and its record after the change."""


def reserve(
    item: Item, batch: Sequence[Request], engine: str, now_ms: int
) -> Outcome | list[Outcome]:
    """Returns the outcomes. The caller adds accepted requests to the outbox."""
    sale = item.read()
    if sale is None:
        return Outcome.UNKNOWN
    if item.fenced:
        return Outcome.FENCED
    if sale.foreign(engine):
        return Outcome.OTHER_ENGINE
    answers: list[Outcome] = []
    for request in batch:
        entries = len(item.outbox or {}) + answers.count(Outcome.ACCEPTED)
        answers.append(_decide(item, sale, request, entries))
        if answers[-1] is Outcome.ACCEPTED:
            _accept(item, sale, request, now_ms)
    if Outcome.ACCEPTED not in answers and sale.finished and sale.state != "closed":
        sale.state = "ended"
    return answers


def _decide(  # noqa: PLR0911 - a list of rules
    item: Item, sale: Hash, request: Request, entries: int
) -> Outcome:
    known = (item.reservations or {}).get(request.reservation_id)
    if known is not None:
        same = known.quantity == request.quantity
        return Outcome.REPLAYED if same else Outcome.KEY_REUSED
    if sale.finished:
        return Outcome.ENDED
    if sale.state == "paused":
        return Outcome.PAUSED
    if sale.last_hour < (sale.manifest.starts_hour or 0):
        return Outcome.NOT_OPEN
    taken, expired = (item.buyers or {}).get(request.user_id, (0, 0))
    if taken + request.quantity > sale.manifest.max_per_user:
        return Outcome.LIMIT_REACHED
    if sale.manifest.hold_seconds and expired >= sale.manifest.max_expired_holds:
        return Outcome.TOO_MANY_HOLDS
    if sale.available <= 0:
        return Outcome.SOLD_OUT
    if request.quantity > sale.available:
        return Outcome.NOT_ENOUGH_LEFT
    if entries >= item.outbox_limit:
        return Outcome.OUTBOX_FULL
    return Outcome.ACCEPTED


def _accept(item: Item, sale: Hash, request: Request, now_ms: int) -> None:
    hold_ms = 1000 * sale.manifest.hold_seconds
    record = Record(
        State.HELD if hold_ms else State.CONFIRMED,
        sale.next_version(),
        request.quantity,
        now_ms,
        request.user_id,
        request.request_key,
        now_ms + hold_ms if hold_ms else None,
        None if hold_ms else now_ms,
    )
    item.store(request.reservation_id, record)
    taken, expired = (item.buyers or {}).get(request.user_id, (0, 0))
    item.buyers = (item.buyers or {}) | {request.user_id: (taken + request.quantity, expired)}
    sale.accepted += request.quantity
    sale.held += request.quantity if hold_ms else 0


def change(
    item: Item, verb: Verb, calls: Sequence[OrderCall], engine: str, now_ms: int
) -> Transition | list[tuple[Transition, Record | None]]:
    """Returns the answers. The caller adds changes to the outbox."""
    sale = item.read()
    if sale is None:
        return Transition.UNKNOWN
    if item.fenced:
        return Transition.FENCED
    if sale.foreign(engine):
        return Transition.OTHER_ENGINE
    answers: list[tuple[Transition, Record | None]] = []
    for call in calls:
        if call.sale_id not in ("", sale.manifest.sale_id):
            answers.append((Transition.OTHER_SALE, None))
            continue
        record = (item.reservations or {}).get(call.reservation_id)
        if record is None:
            answers.append((Transition.UNKNOWN_RESERVATION, None))
            continue
        answer = (_confirm if verb == "confirm" else _cancel)(record, call.order_ref)
        if answer is Transition.CHANGED:
            state = State.CONFIRMED if verb == "confirm" else State.CANCELLED
            record = _changed(sale, record, state)
            if state is State.CONFIRMED and record.confirmed_ms is None:
                record = record._replace(confirmed_ms=now_ms)
            record = record._replace(order_ref=call.order_ref)
            item.store(call.reservation_id, record)
        shown = answer in {Transition.CHANGED, Transition.REPLAYED}
        answers.append((answer, record if shown else None))
    return answers


def _confirm(record: Record, order_ref: str) -> Transition:
    if record.state is State.EXPIRED:
        return Transition.HOLD_EXPIRED
    if record.state is State.CANCELLED:
        return Transition.CANCELLED
    if record.state is State.HELD or not record.order_ref:
        return Transition.CHANGED
    return Transition.REPLAYED if record.order_ref == order_ref else Transition.OTHER_ORDER


def _cancel(record: Record, order_ref: str) -> Transition:
    if record.state in FINAL:
        return Transition.REPLAYED
    if record.order_ref not in ("", order_ref):
        return Transition.OTHER_ORDER
    return Transition.CHANGED


def expire(item: Item, limit: int, engine: str, now_ms: int) -> Transition | list[Change]:
    """Returns the expired holds. The caller adds them to the outbox."""
    sale = item.read()
    if sale is None:
        return Transition.UNKNOWN
    if item.fenced:
        return Transition.FENCED
    if sale.foreign(engine):
        return Transition.OTHER_ENGINE
    due = sorted((at_ms, own_id) for own_id, at_ms in item.holds.items() if at_ms <= now_ms)
    changes = []
    for _, own_id in due[:limit]:
        record = _changed(sale, (item.reservations or {})[own_id], State.EXPIRED)
        item.store(own_id, record)
        changes.append((own_id, record))
    return changes


def _changed(sale: Hash, record: Record, state: State) -> Record:
    if record.state is State.HELD:
        sale.held -= record.quantity
    return record._replace(state=state, version=sale.next_version(record.version))


def settle(item: Item, acknowledged: Sequence[tuple[str, str, int]]) -> int:
    """Returns the number of deleted entries. Releases count in a trusted sale only."""
    outbox, deleted, releases = item.outbox or {}, 0, []
    for entry_id, own_id, version in acknowledged:
        found = outbox.get(entry_id)
        if found is not None and (found[0], found[1].version) == (own_id, version):
            del outbox[entry_id]
            deleted += 1
            if found[1].state in FINAL:
                releases.append(found[1])
    sale = item.read() if releases else None
    if sale is None or item.fenced:
        item.forgotten = item.forgotten or bool(releases)
        return deleted
    for record in releases:
        taken, expired = (item.buyers or {})[record.user_id]
        counted = (taken - record.quantity, expired + (record.state is State.EXPIRED))
        item.buyers = (item.buyers or {}) | {record.user_id: counted}
        sale.released += record.quantity
        if sale.stock == sale.manifest.declared:
            least = max(sale.manifest.stock, sale.accepted - sale.released)
            sale.allocated = min(sale.allocated, least)
    return deleted
