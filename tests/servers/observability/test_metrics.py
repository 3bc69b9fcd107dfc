"""What the processes tell Prometheus, and what docs/metrics.md says that they tell."""

from itertools import pairwise

import pytest

from tests.servers.observability.conftest import Shop
from tests.servers.observability.documented import documented, exposed
from tests.support.eventually import eventually

pytestmark = pytest.mark.slow


def test_the_page_lists_what_the_processes_expose_and_nothing_else(shop: Shop) -> None:
    eventually(lambda: "flashsale_consumer_lag{" in shop.exposed()["consumer"])
    assert sorted(exposed(shop.exposed())) == sorted(documented())


def test_a_sale_is_counted_under_its_item_and_no_other_name_makes_a_series(shop: Shop) -> None:
    text = shop.exposed()["api"]
    assert f'flashsale_api_requests_total{{item="{shop.item}",outcome="accepted"}} 40.0' in text
    assert 'flashsale_api_requests_total{item="",outcome="invalid_field"}' in text
    assert "user-" not in text


def test_answers_are_resolved_between_1_and_50_ms(shop: Shop) -> None:
    text = shop.exposed()["api"]
    bounds = {
        float(line.partition('le="')[2].partition('"')[0])
        for line in text.splitlines()
        if line.startswith("flashsale_api_request_seconds_bucket")
    }
    between = sorted(bound for bound in bounds if 0.001 <= bound <= 0.05)
    assert between[0] == 0.001
    assert between[-1] == 0.05
    assert all(after <= 2 * before for before, after in pairwise(between))


def test_what_the_operator_tells_of_a_sale(shop: Shop) -> None:
    sale = f'item="{shop.item}",sale="{shop.world.namespace}/phone"'
    eventually(lambda: f"flashsale_sale_recorded_units{{{sale}}} 40.0" in shop.exposed()["operator"])
    text = shop.exposed()["operator"]
    for line in (
        f'flashsale_sale_state{{{sale},state="SoldOut"}} 1.0',
        f"flashsale_sale_ready{{{sale}}} 1.0",
        f"flashsale_sale_accepted_units{{{sale}}} 40.0",
        f"flashsale_sale_available_units{{{sale}}} 0.0",
        f"flashsale_sale_unrecorded_seconds{{{sale}}} 0.0",
    ):
        assert line in text
