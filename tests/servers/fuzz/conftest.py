"""A real API process that is sent what nobody should send."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from dev.services import ApiServer
from flashsale.inventory import Inventory
from flashsale.sale import Sale
from tests.servers.api.conftest import api, http, open_sale, without_kafka
from tests.servers.api.test_outages import own_api, own_http, own_redis, own_stock, proxy

__all__ = [
    "api",
    "http",
    "open_sale",
    "own_api",
    "own_http",
    "own_redis",
    "own_stock",
    "proxy",
    "without_kafka",
]


@pytest.fixture
async def untouched(
    api: ApiServer, stock: Inventory, open_sale: Callable[..., Any], item: str
) -> AsyncIterator[Sale]:
    """A sale that must be as it was after the test, and an API that has nothing to explain."""
    await open_sale(item, 5, max_per_user=5)
    before = (await stock.sales([item]))[item]
    said = api.log.stat().st_size
    yield before
    assert (await stock.sales([item]))[item] == before
    with api.log.open("rb") as log:
        log.seek(said)
        assert b"Traceback" not in log.read()
