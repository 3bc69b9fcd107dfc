"""The model of the scripts that rebuild a sale: `fence`, and `restore` with `trust`."""

from dataclasses import replace

from flashsale.reservations import FINAL, Record, State
from flashsale_operator.sales.recovery import Fenced, Step
from tests.model.scripts.item import THIS_RUN, Hash, Item, Manifest, buyers_of, due_ms, units


def fence(  # noqa: PLR0911 - a list of rules
    item: Item,
    manifest: Manifest,
    claim: int,
    step: Step,
    *,
    accepted: int,
    held: int,
    rebuilt: int,
    closed: bool,
    same_run: bool,
    leased: bool,
) -> Fenced:
    """`accepted` and `held` are the ledger's units, and `rebuilt` is its last rebuild.

    `same_run`: as when the rebuild began.
    """
    sale, mine = item.read(), f"rebuild:{claim}"
    if sale is not None and sale.foreign(manifest.engine):
        return Fenced.OTHER_ENGINE
    if not same_run or (step != "fence" and (sale is None or sale.run != mine)):
        return Fenced.SUPERSEDED
    marker = Hash.of(replace(manifest, revision=claim))
    marker.run, marker.leased, marker.rebuilt = mine, leased, claim
    if closed:
        marker.state = "closed"
    if step == "begin" and sale is not None:
        if sale.manifest.revision > claim:
            return Fenced.SUPERSEDED
        if item.outbox:
            return Fenced.UNDRAINED
        item.buyers = item.reservations = None
        item.holds = {}
        marker.last_hour = sale.last_hour
        if sale.state == "ended":
            marker.state = "ended"
        _mark(item, marker)
        return Fenced.BEGUN
    if sale is not None and sale.manifest.sale_id != manifest.sale_id:
        if not item.replaceable(manifest.replaces):
            return Fenced.CONFLICT
        item.clear()
        sale = None
    if sale is None:
        _mark(item, marker)
        return Fenced.FENCED
    if (
        not item.fenced
        and sale.accepted >= accepted
        and sale.rebuilt >= rebuilt
        and sale.accepted - sale.held >= accepted - held
    ):
        return Fenced.TRUSTED
    other = int(sale.run.removeprefix("rebuild:")) if sale.run.startswith("rebuild:") else 0
    if other > claim and sale.leased:
        return Fenced.REBUILDING
    sale.run, sale.leased = mine, leased
    return Fenced.FENCED


def _mark(item: Item, marker: Hash) -> None:
    item.sale = marker
    if marker.manifest.sale_id != item.recorded_sale:
        item.recorded_sale, item.ledger, item.forgotten = marker.manifest.sale_id, {}, False


def rebuild(item: Item, claim: int, ledger: dict[str, Record]) -> None:
    """Rebuilds a fenced sale, whose outbox is empty, from the ledger's records."""
    sale = item.sale
    if sale is None:
        raise ValueError("without the hash there is no ledger row")
    sale.manifest, sale.rebuilt = replace(sale.manifest, revision=claim), claim
    if sale.state not in {"closed", "ended"}:
        sale.state = sale.manifest.state
    records = ledger.values()
    sale.accepted = units(records, *State)
    sale.released = units(records, *FINAL)
    sale.held = units(records, State.HELD)
    sale.stock = sale.manifest.declared
    sale.allocated = max(sale.manifest.stock, sale.accepted - sale.released)
    sale.run, sale.leased = THIS_RUN, None
    item.reservations = dict(ledger) or None
    item.buyers = buyers_of(records) or None
    item.holds = {own_id: due_ms(r) for own_id, r in ledger.items() if r.state is State.HELD}
    item.outbox, item.ledger, item.forgotten = {}, dict(ledger), False
