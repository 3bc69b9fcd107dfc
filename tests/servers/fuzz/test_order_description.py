"""The order port's OpenAPI document describes exactly its real answers. Needs Redis and Kafka."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from dev.services import Addresses, ApiServer
from dev.stack.ports import free_port
from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.keys import DEFAULT_ENGINE, engine_id
from flashsale_api.responses import Problem
from tests.support.api import OWN_SALE, UNKNOWN_ID
from tests.support.description import Description, Seen
from tests.support.eventually import until
from tests.support.orders import TOKENS, Shop, order_client
from tests.support.proxy import Proxy
from tests.support.redis_users import API, url_of

ORDERS = Description("openapi-orders.json")
PLACE = "/sales/{itemId}/reservations/{reservationId}"
GET, CONFIRM, CANCEL = f"GET {PLACE}", f"POST {PLACE}/confirm", f"POST {PLACE}/cancel"
JSON = {"Content-Type": "application/json"}


class SeenByOrders(Seen):
    """The sorts of answers to the order service, with the rules for their headers."""

    def check(self, label: str, answer: httpx.Response) -> str:
        slug = super().check(label, answer)
        assert ("retry-after" in answer.headers) == (answer.status_code in {202, 503})
        assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)
        return slug


@pytest.fixture
async def own_orders(
    tmp_path: Path, own_redis: RedisServer, proxy: Proxy, own_inventory: Inventory
) -> AsyncIterator[httpx.AsyncClient]:
    """The order port of an API that reaches its own Redis through a proxy, and no Kafka."""
    del own_inventory  # the sale exists before the API starts
    nowhere = f"127.0.0.1:{free_port()}"
    addresses = Addresses(url_of(own_redis, API, proxy.port), nowhere, "")
    server = ApiServer(tmp_path / "own", addresses, order_tokens=TOKENS[0])
    await asyncio.to_thread(server.start)
    async with order_client(server) as client:
        yield client
    server.kill()


async def test_the_described_and_the_real_answers_are_the_same(
    shop: Shop, own_orders: httpx.AsyncClient, own_redis: RedisServer, proxy: Proxy
) -> None:
    seen = SeenByOrders(ORDERS)
    await _check_decisions(seen, shop)
    await _check_requests(seen, shop)
    await _check_outages(seen, own_orders, own_redis, proxy)
    never = {Problem.INTERNAL_ERROR.value.slug}
    assert seen.sorts == {sort for sort in ORDERS.described() if sort[2] not in never}


async def _check_decisions(seen: Seen, shop: Shop) -> None:
    unknown = f"/sales/{shop.item}/reservations/{UNKNOWN_ID}"
    await _check_all(seen, shop.orders, unknown, "unknown-item")
    other_form = f"/sales/{shop.item}/reservations/{UNKNOWN_ID.upper()}"
    await _check_all(seen, shop.orders, other_form, "not-found")
    await shop.open()
    await _check_all(seen, shop.orders, unknown, "unknown-reservation")
    confirmed, cancelled, expired = [await shop.hold(user) for user in ("ann", "bob", "cid")]
    await shop.expire(expired)
    assert seen.check(GET, await shop.orders.get(confirmed)) == ""
    for path, verb, order_ref, slug in (
        (confirmed, "confirm", "o1", ""),
        (confirmed, "confirm", "o2", "other-order"),
        (confirmed, "cancel", "o2", "other-order"),
        (cancelled, "cancel", "", ""),
        (cancelled, "confirm", "o1", "cancelled"),
        (expired, "confirm", "o1", "hold-expired"),
        (expired, "cancel", "", ""),
    ):
        label = CONFIRM if verb == "confirm" else CANCEL
        assert seen.check(label, await shop.call(path, verb, order_ref)) == slug
    for label, verb in ((CONFIRM, "confirm"), (CANCEL, "cancel")):
        answer = await shop.call(confirmed, verb, "o1", "default/former")
        assert seen.check(label, answer) == "other-sale"
    for path in (confirmed, cancelled, expired):
        assert seen.check(GET, await shop.orders.get(path)) == ""
    pending = await shop.hold("dan")
    shop.kafka.pause()
    try:
        found = (
            await shop.confirm(pending, repeat=False),
            await shop.cancel(pending, "o1", repeat=False),
        )
    finally:
        shop.kafka.resume()
    for label, answer in zip((CONFIRM, CANCEL), found, strict=True):
        assert (seen.check(label, answer), answer.status_code) == ("", 202)
    await shop.redis.hset(shop.keys.sale, "format", "99")
    await _check_all(seen, shop.orders, pending, "fenced")


async def _check_requests(seen: Seen, shop: Shop) -> None:
    path = f"/sales/{shop.item}/reservations/{UNKNOWN_ID}"
    for label, verb in ((CONFIRM, "confirm"), (CANCEL, "cancel")):
        for content, headers, slug in (
            (b"{", JSON, "malformed-json"),
            (b"{}", {}, "unsupported-media-type"),
            (b" " * 20_000, JSON, "body-too-large"),
            (b"[]", JSON, "invalid-field"),
            (b'{"orderRef":""}', JSON, "invalid-field"),
            (b'{"orderRef":"o","x":1}', JSON, "invalid-field"),
            (b'{"orderRef":"o","saleId":"name"}', JSON, "invalid-field"),
        ):
            answer = await shop.orders.post(f"{path}/{verb}", content=content, headers=headers)
            assert seen.check(label, answer) == slug
    label = "GET /openapi.json"
    found = await shop.orders.get("/openapi.json")
    assert (seen.check(label, found), found.json()) == ("", ORDERS.document)
    async with order_client(shop.api, "wrong") as stranger:
        await _check_all(seen, stranger, path, "unauthorized")
        assert seen.check(label, await stranger.get("/openapi.json")) == "unauthorized"


async def _check_outages(
    seen: Seen, orders: httpx.AsyncClient, own_redis: RedisServer, proxy: Proxy
) -> None:
    path = f"/sales/{OWN_SALE.item_id}/reservations/{UNKNOWN_ID}"
    for label, verb in ((CONFIRM, "confirm"), (CANCEL, "cancel")):
        proxy.cut_replies(b"EVALSHA", 2)
        assert seen.check(label, await _call(orders, path, verb)) == "outcome-unknown"

    async def served() -> bool:
        return (await orders.get(path)).status_code == 404

    for label, verb in ((CONFIRM, "confirm"), (CANCEL, "cancel")):
        slug = ""
        async with asyncio.timeout(60):
            while slug != "too-many-waiting":  # more calls than those in flight can take
                # A pod that has been without Redis for 5 s lets no call wait for it.
                own_redis.resume()
                await until(served)
                own_redis.pause()
                found = await asyncio.gather(*(_call(orders, path, verb) for _ in range(50)))
                slug = max(seen.check(label, answer) for answer in found)
    own_redis.resume()
    own_redis.kill()

    async def away() -> bool:
        slugs = await _slugs(seen, orders, path)
        return slugs | {seen.check(GET, await orders.get(path))} == {"redis-unavailable"}

    await until(away)
    own_redis.start()
    client = redis_client.connect(own_redis.url)
    ids = itertools.count()

    async def refused() -> bool:
        # The pod keeps the first id that it reads. Every other one belongs to another engine.
        await client.set(engine_id(DEFAULT_ENGINE), f"engine-{next(ids)}")
        return await _slugs(seen, orders, path) == {"other-engine"}

    await until(refused)
    await client.aclose()


async def _slugs(seen: Seen, orders: httpx.AsyncClient, path: str) -> set[str]:
    return {
        seen.check(CONFIRM, await _call(orders, path, "confirm")),
        seen.check(CANCEL, await _call(orders, path, "cancel")),
    }


async def _check_all(seen: Seen, orders: httpx.AsyncClient, path: str, slug: str) -> None:
    assert seen.check(GET, await orders.get(path)) == slug
    for label, verb in ((CONFIRM, "confirm"), (CANCEL, "cancel")):
        assert seen.check(label, await _call(orders, path, verb)) == slug


async def _call(orders: httpx.AsyncClient, path: str, verb: str) -> httpx.Response:
    return await orders.post(f"{path}/{verb}", json={"orderRef": "o1"})
