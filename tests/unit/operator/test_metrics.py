"""How long accepted units wait for the ledger, in the operator's metrics, and their size."""

import time
from dataclasses import replace

from flashsale.sale import SaleState
from flashsale_operator.kubernetes.metrics import Backlog, Metrics
from flashsale_operator.sales.decision import Reason
from flashsale_operator.sales.reconciler import Result
from tests.support.observations import a_row, a_sale


def test_a_unit_that_is_recorded_by_the_next_sample_has_not_waited() -> None:
    backlog = Backlog()
    backlog.sample(0, accepted=5, recorded=4)
    backlog.sample(5, accepted=9, recorded=8)
    assert backlog.seconds == 0
    backlog.sample(10, accepted=9, recorded=9)
    assert backlog.seconds == 0


def test_the_oldest_unrecorded_unit_counts() -> None:
    backlog = Backlog()
    for second in range(0, 50, 5):
        backlog.sample(second, accepted=10 + second, recorded=10)
    assert backlog.seconds == 40
    backlog.sample(50, accepted=100, recorded=40)
    assert backlog.seconds == 15
    backlog.sample(55, accepted=100, recorded=100)
    assert backlog.seconds == 0


def test_units_wait_also_while_the_ledger_is_away() -> None:
    backlog = Backlog()
    backlog.sample(0, accepted=5, recorded=5)
    backlog.sample(60, accepted=5, recorded=None)
    assert backlog.seconds == 0
    backlog.sample(65, accepted=6, recorded=None)
    backlog.sample(95, accepted=6, recorded=None)
    assert backlog.seconds == 30


def test_units_that_redis_lost_do_not_count() -> None:
    backlog = Backlog()
    backlog.sample(0, accepted=5, recorded=3)
    backlog.sample(5, accepted=3, recorded=3)
    assert backlog.seconds == 0
    backlog.sample(60, accepted=4, recorded=3)
    backlog.sample(70, accepted=4, recorded=3)
    assert backlog.seconds == 10


def test_a_sale_without_its_item_has_no_recorded_units() -> None:
    """Next to the counts of its successor, they would look like the successor's."""
    metrics, other = Metrics(), replace(a_sale(), sale_id="shop/other")
    result = Result(
        "shop/phones", other.item_id, SaleState.ENDED, Reason.APPLIED, "", sale=other, row=a_row()
    )
    metrics.sales.update(("shop", "phones"), result)
    assert "flashsale_sale_recorded_units{" not in metrics.text().decode()
    assert "flashsale_sale_lost_units{" in metrics.text().decode()


def waited(metrics: Metrics) -> str:
    [line] = [
        line
        for line in metrics.text().decode().splitlines()
        if line.startswith("flashsale_sale_unrecorded_seconds{")
    ]
    return line


def test_no_unit_is_said_to_wait_longer_while_the_kube_apiserver_is_away() -> None:
    """Nothing is reconciled then, although the consumers record."""
    metrics, sale = Metrics(), replace(a_sale(), accepted=7)
    selling = Result(sale.sale_id, sale.item_id, SaleState.SELLING, Reason.APPLIED, "", sale=sale)
    metrics.sales.update(("shop", "phones"), selling)
    before = waited(metrics)
    time.sleep(0.01)
    assert waited(metrics) == before


def test_a_fenced_sale_keeps_its_counts() -> None:
    """Redis may have a mark of its rebuild, with the whole stock and without units."""
    metrics, sale = Metrics(), replace(a_sale(), accepted=7)
    selling = Result(sale.sale_id, sale.item_id, SaleState.SELLING, Reason.APPLIED, "", sale=sale)
    mark = replace(sale, accepted=0)
    metrics.sales.update(("shop", "phones"), selling)
    metrics.sales.update(("shop", "phones"), replace(selling, state=SaleState.FENCED, sale=mark))
    labels = f'{{item="{sale.item_id}",sale="shop/phones"}}'
    assert f"flashsale_sale_accepted_units{labels} 7.0" in metrics.text().decode()
    metrics.sales.update(("shop", "phones"), replace(selling, sale=mark))
    assert f"flashsale_sale_accepted_units{labels} 0.0" in metrics.text().decode()


def test_two_thousand_sales_are_a_scrape_below_2_mb() -> None:
    metrics = Metrics()
    for number in range(2_000):
        name, item_id = f"iphone-17-{number:04}", f"iphone-17-{number:04}-black"
        sale = replace(a_sale(), sale_id=f"shop/{name}", item_id=item_id)
        result = Result(
            sale.sale_id, item_id, SaleState.SELLING, Reason.APPLIED, "", sale=sale, row=a_row()
        )
        metrics.sales.update(("shop", name), result)
    text = metrics.text()
    assert b'flashsale_sale_recorded_units{item="iphone-17-1999-black",' in text
    assert len(text) < 2_000_000
