"""GET /sales and below, and the process's own endpoints."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
from redis.asyncio import Redis

from dev.services import ApiServer
from flashsale.inventory import Inventory
from flashsale.keys import ITEMS, ItemKeys
from flashsale.sale import rfc3339_of_ms
from tests.servers.api.test_reserve import problem, reserve

OpenSale = Callable[..., Any]


async def test_a_sale_shows_its_window_and_what_is_left(
    http: httpx.AsyncClient, open_sale: OpenSale, stock: Inventory, item: str
) -> None:
    now_ms = (await stock.server()).now_ms
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
    listed: list[object] = []
    async with asyncio.timeout(20):
        while answer.json() not in listed:  # what the pod has read may be a quarter of a second old
            listed = (await http.get("/sales")).json()["sales"]


async def test_one_sale_that_cannot_be_read_does_not_hide_the_others(
    http: httpx.AsyncClient, open_sale: OpenSale, redis: Redis, new_item: Callable[[], str]
) -> None:
    good, bad = new_item(), new_item()
    await open_sale(good)
    await open_sale(bad)
    await redis.hset(ItemKeys.of(bad).sale, "allocated", "many")
    listed: set[str] = set()
    async with asyncio.timeout(20):
        while good not in listed:  # what the pod has read may be a quarter of a second old
            listed = {sale["itemId"] for sale in (await http.get("/sales")).json()["sales"]}
    assert bad not in listed
    problem(await http.get(f"/sales/{bad}"), 503, "fenced")


async def test_what_is_not_there(http: httpx.AsyncClient, open_sale: OpenSale, item: str) -> None:
    problem(await http.get(f"/sales/{item}"), 404, "unknown-item")
    problem(await http.get("/sales/bad:item"), 404, "unknown-item")
    problem(await http.get(f"/sales/{item}/reservations/x"), 404, "unknown-item")
    await open_sale(item)
    unknown = "01a208bd-5117-7f0d-b8d8-4e8e9760b87e"
    for identity in ("x", unknown):
        answer = await http.get(f"/sales/{item}/reservations/{identity}")
        problem(answer, 404, "unknown-reservation")


async def test_the_process_is_alive_and_ready(http: httpx.AsyncClient) -> None:
    assert (await http.get("/healthz")).status_code == 200
    assert (await http.get("/readyz")).status_code == 200


async def test_metrics_have_a_port_of_their_own(
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


async def test_only_an_item_with_a_sale_is_a_label(
    api: ApiServer, http: httpx.AsyncClient, open_sale: OpenSale, redis: Redis, item: str
) -> None:
    async def metrics() -> str:
        async with httpx.AsyncClient() as scraper:
            return (await scraper.get(api.metrics_url)).text

    await open_sale(item, 1)
    await reserve(http, item)
    for number in range(20):
        problem(await reserve(http, f"ghost-{number}"), 404, "unknown-item")
    text = await metrics()
    assert f'item="{item}",outcome="accepted"' in text
    assert 'flashsale_api_requests_total{item="",outcome="unknown"}' in text
    assert "ghost" not in text
    # What freeing a sale does.
    keys = ItemKeys.of(item)
    async with asyncio.timeout(20):
        while f'flashsale_api_outbox_age_seconds{{item="{item}"}}' not in await metrics():
            await asyncio.sleep(0.05)
        await redis.delete(*keys.four)
        await redis.srem(ITEMS, item)
        while f'item="{item}"' in await metrics():
            await asyncio.sleep(0.05)
    # To this pod the sale is lost, until it has forgotten it: it was never closed.
    problem(await reserve(http, item), 503, "fenced")
    assert f'item="{item}"' not in await metrics()
