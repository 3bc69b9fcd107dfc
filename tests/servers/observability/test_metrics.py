"""The metrics of real processes, compared with docs/metrics.md."""

from itertools import pairwise

import pytest

from tests.support.eventually import eventually
from tests.support.observability import ObservedEngine, documented, exposed

pytestmark = pytest.mark.slow


def test_the_page_lists_exactly_the_metrics_of_the_processes(engine: ObservedEngine) -> None:
    eventually(lambda: "flashsale_consumer_lag{" in engine.metrics()["consumer"])
    assert sorted(exposed(engine.metrics())) == sorted(documented())


def test_only_items_with_a_sale_have_series(engine: ObservedEngine) -> None:
    text = engine.metrics()["api"]
    assert f'flashsale_api_requests_total{{item="{engine.item}",outcome="accepted"}} 40.0' in text
    assert 'flashsale_api_requests_total{item="",outcome="invalid_field"}' in text
    assert "user-" not in text


def test_buckets_resolve_answers_between_1_and_50_ms(engine: ObservedEngine) -> None:
    text = engine.metrics()["api"]
    bounds = {
        float(line.partition('le="')[2].partition('"')[0])
        for line in text.splitlines()
        if line.startswith("flashsale_api_request_seconds_bucket")
    }
    between = sorted(bound for bound in bounds if 0.001 <= bound <= 0.05)
    assert between[0] == 0.001
    assert between[-1] == 0.05
    assert all(after <= 2 * before for before, after in pairwise(between))


def test_the_operator_reports_a_sale(engine: ObservedEngine) -> None:
    sale = f'item="{engine.item}",sale="{engine.world.namespace}/phone"'
    eventually(
        lambda: f"flashsale_sale_recorded_units{{{sale}}} 40.0" in engine.metrics()["operator"]
    )
    text = engine.metrics()["operator"]
    for line in (
        f'flashsale_sale_state{{{sale},state="SoldOut"}} 1.0',
        f"flashsale_sale_ready{{{sale}}} 1.0",
        f"flashsale_sale_accepted_units{{{sale}}} 40.0",
        f"flashsale_sale_available_units{{{sale}}} 0.0",
        f"flashsale_sale_unrecorded_seconds{{{sale}}} 0.0",
    ):
        assert line in text
