"""`make load` declares the sale that its script expects."""

import pytest

from dev.load import sale_settings, sales_of


@pytest.mark.parametrize("stock", ["", "5", "abc"])
def test_an_empty_setting_is_the_default_and_the_smoke_test_has_no_stock(stock: str) -> None:
    given = {"STOCK": stock, "HOLD": ""}
    assert sale_settings("stampede.js", given) == {"STOCK": stock or "100", "HOLD": "3s"}
    assert sale_settings("soak.js", given)["STOCK"] == (stock or "1000000")
    assert sale_settings("smoke.js", given)["STOCK"] == "3"


@pytest.mark.parametrize(("hold", "seconds"), [("", 3), ("90s", 90), ("5m", 300), ("1h", 3600)])
def test_the_holds_of_a_checkout_are_as_long_as_the_script_expects(hold: str, seconds: int) -> None:
    settings = sale_settings("checkout.js", {"HOLD": hold})
    assert sales_of("checkout.js", settings) == {"": {"holdSeconds": seconds}}
    assert sales_of("stampede.js", settings) == {"": {}}
