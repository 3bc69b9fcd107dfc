"""API processes on a real Redis, and requests to them. Kafka is absent: the API must not need it.

The fixtures `api`, `http` and `open_sale` use the session's Redis. The `own_` fixtures have a Redis
that a test may stop, behind a proxy that can cut replies.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import httpx
import pytest

from dev.services import Addresses, ApiServer
from dev.stack.ports import free_port
from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.inventory import Applied, Inventory
from flashsale.keys import DEFAULT_ENGINE
from flashsale.sale import SaleSpec
from tests.support import redis_users
from tests.support.eventually import eventually
from tests.support.proxy import Proxy
from tests.support.redis_users import API, url_of

OpenSale: TypeAlias = Callable[..., Any]

UNKNOWN_ID: Final = "01a208bd-5117-7f0d-b8d8-4e8e9760b87e"
"""A reservation id that the API never makes."""

OWN_SALE: Final = SaleSpec("default/phone", "phone", 1_000, max_per_user=1_000)
"""The sale in `own_redis`."""


def problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """Assert that an answer is a problem of this kind (RFC 9457). Return its members."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["type"] == f"urn:flashsale:problem:{kind}"
    assert body["status"] == status
    assert body["title"]
    return body


async def reserve(
    http: httpx.AsyncClient, item: str, user: str = "ann", quantity: int = 1, key: str = ""
) -> httpx.Response:
    headers = {"Idempotency-Key": key} if key else {}
    body = {"userId": user, "itemId": item, "quantity": quantity}
    return await http.post("/reserve", json=body, headers=headers)


async def accepted(inventory: Inventory, item: str) -> int:
    return (await inventory.sales([item]))[item].accepted


async def claim(redis_url: str, engine: str = DEFAULT_ENGINE) -> None:
    """Claim Redis, as the operator does. Until then, an API takes unknown items for lost ones.

    Another test may have claimed it already, or may have wiped or restarted it since.
    """
    client = redis_client.connect(redis_url)
    inventory = Inventory(client, engine)
    await inventory.index.claim(await inventory.index.engine_id() or str(uuid.uuid4()))
    await client.aclose()


def until_known(api: ApiServer) -> None:
    """Wait until the API has seen that Redis is claimed."""
    eventually(lambda: httpx.get(f"{api.url}/sales/unknown-{uuid.uuid4()}").status_code == 404)


@pytest.fixture(scope="session")
def without_kafka(redis_server: RedisServer) -> Addresses:
    return Addresses(url_of(redis_server, API), f"127.0.0.1:{free_port()}", "")


@pytest.fixture(scope="module")
def api(
    redis_server: RedisServer, without_kafka: Addresses, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiServer]:
    asyncio.run(claim(redis_server.url))
    with ApiServer(tmp_path_factory.mktemp("api"), without_kafka) as server:
        until_known(server)
        yield server
        server.kill()  # a graceful stop would wait for Kafka


@pytest.fixture
async def http(api: ApiServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as client:
        yield client


@pytest.fixture
def open_sale(inventory: Inventory) -> OpenSale:
    """A function that seeds a sale: `await open_sale(item, 10, max_per_user=2)`."""

    async def seed(item: str, units: int = 100, **changes: object) -> SaleSpec:
        spec = replace(SaleSpec(f"default/{item.lower()}", item, units), **changes)  # type: ignore[arg-type]
        assert await inventory.apply(spec, 1, seed_until_ms=2**53) is Applied.SEEDED
        return spec

    return seed


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    options = redis_users.options()
    with RedisServer(tmp_path / "redis", appendfsync="always", options=options) as server:
        yield server


@pytest.fixture
async def own_inventory(own_redis: RedisServer) -> AsyncIterator[Inventory]:
    client = redis_client.connect(own_redis.url)
    inventory = Inventory(client)
    await inventory.index.claim(str(uuid.uuid4()))
    assert await inventory.apply(OWN_SALE, 1, seed_until_ms=2**53) is Applied.SEEDED
    yield inventory
    await client.aclose()


@pytest.fixture
async def proxy(own_redis: RedisServer) -> AsyncIterator[Proxy]:
    async with Proxy(own_redis.port).serve() as proxy:
        yield proxy


@pytest.fixture
async def own_api(
    tmp_path: Path, own_redis: RedisServer, proxy: Proxy, own_inventory: Inventory
) -> AsyncIterator[ApiServer]:
    """An API that reaches its Redis through the proxy."""
    del own_inventory  # the sale exists before the API starts
    nowhere = f"127.0.0.1:{free_port()}"
    through_proxy = url_of(own_redis, API, proxy.port)
    server = ApiServer(tmp_path / "api", Addresses(through_proxy, nowhere, ""))
    await asyncio.to_thread(server.start)
    yield server
    server.kill()


@pytest.fixture
async def own_http(own_api: ApiServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=own_api.url, timeout=30) as client:
        yield client
