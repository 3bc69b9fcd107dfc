"""GET /sales and the paths below it, the probes, and the metrics."""

from collections.abc import Callable

import httpx
from redis.asyncio import Redis

from dev.services import ApiServer
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys, items
from flashsale.sale import rfc3339_of_ms
from tests.support.api import UNKNOWN_ID, OpenSale, problem, reserve
from tests.support.eventually import until


async def test_a_sale_shows_its_window_and_available_units(
    http: httpx.AsyncClient, open_sale: OpenSale, inventory: Inventory, item: str
) -> None:
    now_ms = (await inventory.server()).now_ms
    await open_sale(
        item, 7, display_name="iPhone 15", starts_ms=now_ms - 1_000, ends_ms=now_ms + 60_000
    )
    await reserve(http, item)
    answer = await http.get(f"/sales/{item}")
    assert answer.headers["cache-control"] == "max-age=1"
    assert answer.json() == {
        "itemId": item,
        "saleId": f"default/{item}",
        "displayName": "iPhone 15",
        "state": "Selling",
        "allocated": 7,
        "available": 6,
        "maxPerUser": 1,
        "startsAt": rfc3339_of_ms(now_ms - 1_000),
        "endsAt": rfc3339_of_ms(now_ms + 60_000),
    }

    async def listed() -> bool:
        return answer.json() in (await http.get("/sales")).json()["sales"]

    await until(listed)


async def test_an_unreadable_sale_does_not_hide_the_others(
    http: httpx.AsyncClient, open_sale: OpenSale, redis: Redis, new_item: Callable[[], str]
) -> None:
    good, bad = new_item(), new_item()
    await open_sale(good)
    await open_sale(bad)
    await redis.hset(ItemKeys.of(bad).sale, "allocated", "many")

    async def listed() -> set[str]:
        items = {sale["itemId"] for sale in (await http.get("/sales")).json()["sales"]}
        return items if good in items else set()

    assert bad not in await until(listed)
    problem(await http.get(f"/sales/{bad}"), 503, "fenced")


async def test_unknown_items_and_reservations_get_404(
    http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    problem(await http.get(f"/sales/{item}"), 404, "unknown-item")
    problem(await http.get("/sales/bad:item"), 404, "unknown-item")
    problem(await http.get(f"/sales/{item}/reservations/x"), 404, "unknown-item")
    await open_sale(item)
    for identity in ("x", UNKNOWN_ID):
        answer = await http.get(f"/sales/{item}/reservations/{identity}")
        problem(answer, 404, "unknown-reservation")


async def test_the_process_is_alive_and_ready(http: httpx.AsyncClient) -> None:
    assert (await http.get("/healthz")).status_code == 200
    assert (await http.get("/readyz")).status_code == 200


async def test_metrics_are_served_on_their_own_port(
    api: ApiServer, http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 1)
    await reserve(http, item)
    async with httpx.AsyncClient() as scraper:
        text = (await scraper.get(api.metrics_url)).text
    for name in (
        f'flashsale_api_requests_total{{item="{item}",outcome="accepted"}} 1.0',
        "flashsale_api_request_seconds_bucket",
        "flashsale_api_batch_size_count",
        "flashsale_api_script_seconds_count",
        f'flashsale_api_outbox_entries{{item="{item}"}} 1.0',
        "flashsale_api_unacknowledged_events",
        "flashsale_api_events_published_total",
    ):
        assert name in text


async def test_only_items_with_a_sale_are_labels(
    api: ApiServer, http: httpx.AsyncClient, open_sale: OpenSale, redis: Redis, item: str
) -> None:
    async def metrics() -> str:
        async with httpx.AsyncClient() as scraper:
            return (await scraper.get(api.metrics_url)).text

    await open_sale(item, 1)
    await reserve(http, item)
    for number in range(20):
        problem(await reserve(http, f"unknown-{number}"), 404, "unknown-item")
    text = await metrics()
    assert f'item="{item}",outcome="accepted"' in text
    assert 'flashsale_api_requests_total{item="",outcome="unknown"}' in text
    assert "unknown-" not in text

    async def swept() -> bool:
        return f'flashsale_api_outbox_age_seconds{{item="{item}"}}' in await metrics()

    async def removed() -> bool:
        return f'item="{item}"' not in await metrics()

    await until(swept)
    # Freeing a sale deletes its keys, too.
    await redis.delete(*ItemKeys.of(item).four)
    await redis.srem(items("flashsale"), item)
    await until(removed)
    # The pod remembers the sale, which was not closed, and takes the keys for lost.
    problem(await reserve(http, item), 503, "fenced")
    assert f'item="{item}"' not in await metrics()
