"""Records to decide on: a row and a sale after the first apply of a spec."""

from dataclasses import replace
from typing import Any

from flashsale.clocks import ServerTime
from flashsale.ledger import SaleRow
from flashsale.sale import Sale, SaleSpec, SaleState, utc_of_ms
from flashsale_operator.sales.decision import Action, Done, Observed, Reason, StillFenced

NOW_MS = 1_795_770_000_000
SERVER = ServerTime(NOW_MS, "run-1")
SPEC = SaleSpec("default/iphone-15", "iphone_15", 100)
PAST = replace(SPEC, ends_ms=NOW_MS - 1)
OTHER = SaleSpec("default/older", "iphone_15", 50)
STILL_FENCED = StillFenced(("one", "two"))


def a_row(spec: SaleSpec = SPEC, **changes: Any) -> SaleRow:  # noqa: ANN401 - any field
    row = SaleRow(
        sale_id=spec.sale_id,
        item_id=spec.item_id,
        display_name=spec.display_name,
        allocated=spec.stock,
        max_per_user=spec.max_per_user,
        starts_at=None if spec.starts_ms is None else utc_of_ms(spec.starts_ms),
        ends_at=None if spec.ends_ms is None else utc_of_ms(spec.ends_ms),
        paused=spec.paused,
        closed=False,
        revision=1,
        capacity=spec.stock,
        accepted=0,
        released=0,
        hold_seconds=spec.hold_seconds,
        max_expired_holds=spec.max_expired_holds,
    )
    return replace(row, **changes)


def a_sale(spec: SaleSpec = SPEC, **changes: Any) -> Sale:  # noqa: ANN401 - any field
    sale = Sale(
        item_id=spec.item_id,
        sale_id=spec.sale_id,
        run_id=SERVER.run_id,
        revision=1,
        stored_state="paused" if spec.paused else "open",
        allocated=spec.stock,
        accepted=0,
        released=0,
        max_per_user=spec.max_per_user,
        display_name=spec.display_name,
        starts_ms=spec.starts_ms,
        ends_ms=spec.ends_ms,
        last_now_ms=NOW_MS - 1_000,
        outbox_length=0,
        torn=False,
        hold_ms=1000 * (spec.hold_seconds or 0),
        max_expired_holds=spec.max_expired_holds,
    )
    return replace(sale, **changes)


def observed(**changes: Any) -> Observed:  # noqa: ANN401 - any field
    return Observed(server=SERVER, **changes)


def outcome(action: Action) -> tuple[SaleState, Reason]:
    assert isinstance(action, Done), action
    return action.state, action.reason
