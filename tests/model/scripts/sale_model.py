"""The model of the scripts that change a whole sale: `apply`, `close`, `free` and `page`."""

from dataclasses import replace

from flashsale.inventory import Applied, Closed, Freed
from flashsale.reservations import Outcome
from tests.model.scripts.item import Hash, Item, Manifest


def apply(item: Item, manifest: Manifest) -> Applied:  # noqa: PLR0911 - a list of rules
    sale = item.read()
    if sale is None:
        if not manifest.may_seed or item.others or item.holds:
            return Applied.MISSING
        return _seed(item, manifest)
    if sale.foreign(manifest.engine):
        return Applied.OTHER_ENGINE
    if sale.manifest.sale_id != manifest.sale_id:
        if not item.replaceable(manifest.replaces):
            return Applied.CONFLICT
        return _seed(item, manifest) if manifest.may_seed else Applied.MISSING
    if manifest.revision < sale.manifest.revision:
        return Applied.STALE
    if item.fenced:
        return Applied.FENCED
    if sale.state == "ended" or (sale.state != "closed" and sale.finished):
        sale.state = "ended"
        return Applied.ENDED
    allocated = max(manifest.stock, sale.accepted - sale.released)
    engine = manifest.engine or sale.manifest.engine
    if (manifest.revision, manifest.state, manifest.declared, allocated, engine) == (
        sale.manifest.revision,
        sale.state,
        sale.stock,
        sale.allocated,
        sale.manifest.engine,
    ):
        return Applied.UNCHANGED
    sale.manifest = replace(manifest, engine=engine)
    sale.state, sale.stock, sale.allocated = manifest.state, manifest.declared, allocated
    return Applied.CHANGED


def _seed(item: Item, manifest: Manifest) -> Applied:
    item.clear()
    item.sale = Hash.of(manifest)
    item.ledger, item.recorded_sale, item.forgotten = {}, manifest.sale_id, False
    return Applied.SEEDED


def close(item: Item, sale_id: str, revision: int, engine: str) -> Closed:
    sale = item.read()
    if sale is None or sale.manifest.sale_id != sale_id:
        return Closed.UNKNOWN
    if sale.foreign(engine):
        return Closed.OTHER_ENGINE
    if revision < sale.manifest.revision:
        return Closed.STALE
    state = "ended" if sale.finished and sale.state != "closed" else "closed"
    if (sale.state, sale.manifest.revision) == (state, revision):
        return Closed.UNCHANGED
    sale.state, sale.manifest = state, replace(sale.manifest, revision=revision)
    return Closed.CLOSED


def free(
    item: Item, sale_id: str, revision: int, accepted: int, released: int, engine: str
) -> Freed:
    sale = item.read()
    if sale is None or sale.manifest.sale_id != sale_id:
        return Freed.UNKNOWN
    if sale.foreign(engine):
        return Freed.OTHER_ENGINE
    if sale.state not in {"closed", "ended"} or sale.manifest.revision != revision:
        return Freed.OPEN
    if not item.recorded(accepted, released):
        return Freed.UNRECORDED
    item.clear()
    item.ledger, item.forgotten = {}, False
    return Freed.FREED


def page(item: Item) -> Outcome | set[str]:
    """Returns the ids of all reservations."""
    if item.read() is None:
        return Outcome.UNKNOWN
    return Outcome.FENCED if item.fenced else {*(item.reservations or ())}
