"""The size of the API's metrics. docs/metrics.md states the limits."""

from prometheus_client import generate_latest

from flashsale.inventory import Holds
from flashsale_api.metrics import Metrics


def test_two_thousand_busy_sales_are_a_scrape_below_2_mb() -> None:
    metrics = Metrics()
    items = [f"iphone-17-{number:04}-black" for number in range(2_000)]
    metrics.set_items(items)
    metrics.set_holds(
        dict.fromkeys(items, Holds(open=25, overdue=1, first_due_ms=1)), dict.fromkeys(items, 1_500)
    )
    for item_id in items:
        for outcome in ("accepted", "sold_out", "limit_reached"):
            metrics.outcomes(item_id)[outcome].inc(1_234)
        for verb in ("confirm", "cancel", "expire"):
            metrics.transitions.labels(item_id, verb, "changed").inc()
        metrics.outbox_length.labels(item_id).set(1_234)
        metrics.outbox_age.labels(item_id).set(0.125)
    text = generate_latest(metrics.registry)
    assert f'requests_total{{item="{items[-1]}",outcome="accepted"}} 1234.0'.encode() in text
    assert len(text) < 2_000_000
