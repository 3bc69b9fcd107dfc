"""A real API process on a real Redis. Kafka is not there: the API must not care."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from dev.services import Addresses, ApiServer
from dev.stack.ports import free_port
from dev.stack.servers import RedisServer
from flashsale.inventory import Applied, Inventory
from flashsale.sale import SaleSpec


@pytest.fixture(scope="session")
def without_kafka(redis_server: RedisServer) -> Addresses:
    return Addresses(redis_server.url, f"127.0.0.1:{free_port()}", "")


@pytest.fixture(scope="module")
def api(without_kafka: Addresses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("api"), without_kafka) as server:
        yield server
        server.kill()  # a graceful end would wait for Kafka


@pytest.fixture
async def http(api: ApiServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as client:
        yield client


@pytest.fixture
def open_sale(stock: Inventory) -> Callable[..., Any]:
    """Seeds a sale of an item: `await open_sale(item, 10, max_per_user=2)`."""

    async def seed(item: str, units: int = 100, **changes: object) -> SaleSpec:
        spec = replace(SaleSpec(f"default/{item.lower()}", item, units), **changes)  # type: ignore[arg-type]
        assert await stock.apply(spec, 1, seed_until_ms=2**53) is Applied.SEEDED
        return spec

    return seed
