"""A real API process that receives malformed and hostile requests. Needs Redis."""

from collections.abc import AsyncIterator

import pytest

from dev.services import ApiServer
from flashsale.inventory import Inventory
from flashsale.sale import Sale
from tests.support.api import OpenSale


@pytest.fixture
async def untouched(
    api: ApiServer, inventory: Inventory, open_sale: OpenSale, item: str
) -> AsyncIterator[Sale]:
    """A sale that the test must not change. The API must not log a traceback."""
    await open_sale(item, 5, max_per_user=5)
    before = (await inventory.sales([item]))[item]
    logged = api.log.stat().st_size
    yield before
    assert (await inventory.sales([item]))[item] == before
    with api.log.open("rb") as log:
        log.seek(logged)
        assert b"Traceback" not in log.read()
