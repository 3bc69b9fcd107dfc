"""GET /sales and the paths below it, the probes, and the metrics."""

import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from dev.crowd import Connection
from dev.services import Addresses, ApiServer
from dev.stack.ports import free_port
from dev.stack.servers import RedisServer
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys, items
from flashsale.sale import rfc3339_of_ms
from flashsale_api.limits import MAX_FIELDS
from flashsale_api.sales import MAX_READS
from tests.support.api import OWN_SALE, UNKNOWN_ID, OpenSale, problem, reserve
from tests.support.eventually import until
from tests.support.flood import open_connections
from tests.support.redis_users import API, url_of
from tests.support.wire import connection


async def test_a_sale_shows_its_window_and_available_units(
    http: httpx.AsyncClient, open_sale: OpenSale, inventory: Inventory, item: str
) -> None:
    now_ms = (await inventory.server()).now_ms
    await open_sale(
        item, 7, display_name="iPhone 15", starts_ms=now_ms - 1_000, ends_ms=now_ms + 60_000
    )
    await reserve(http, item)
    answer = await http.get(f"/sales/{item}")
    assert (
        answer.headers["cache-control"]
        == "public, max-age=1, stale-while-revalidate=5, stale-if-error=60"
    )
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


@pytest.mark.parametrize(
    ("request_line", "fields", "status"),
    [
        ("GET /sales/nothing", b"", 404),
        (f"GET /sales/nothing/reservations/{UNKNOWN_ID}", b"", 404),
        ("GET /nothing", b"", 404),
        ("DELETE /sales", b"", 405),
        ("GET /sales", b"a:\r\n" * MAX_FIELDS, 431),
        ("GET /sales", b"Transfer-Encoding: gzip\r\n", 501),
        ("GET /sales", b"Host: other\r\n", 400),
    ],
)
async def test_no_cache_repeats_an_error(
    api: ApiServer, request_line: str, fields: bytes, status: int
) -> None:
    """A CDN could give the answer to one stranger to all watchers of the sale."""
    async with connection(api) as wire:
        wire.send(f"{request_line} HTTP/1.1\r\nHost: x\r\n".encode() + fields + b"\r\n")
        head = await wire.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\ncache-control: no-store\r\n" in head


@pytest.mark.parametrize("of_all", [False, True], ids=["one sale", "all sales"])
async def test_a_client_that_has_the_answer_gets_304(
    own_http: httpx.AsyncClient, of_all: bool
) -> None:
    """The engine is the test's own, because no other sale may change the list."""
    path = "/sales" if of_all else f"/sales/{OWN_SALE.item_id}"

    async def shown() -> httpx.Response | None:
        answer = await own_http.get(path)
        return answer if f'"itemId":"{OWN_SALE.item_id}"' in answer.text else None

    answer = await until(shown)
    etag = answer.headers["etag"]
    for matching in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        again = await own_http.get(path, headers={"If-None-Match": matching})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
        assert again.headers["cache-control"] == answer.headers["cache-control"]
        assert "content-type" not in again.headers
    other = await own_http.get(path, headers={"If-None-Match": '"other"'})
    assert (other.status_code, other.content) == (200, answer.content)
    await reserve(own_http, OWN_SALE.item_id)

    async def changed() -> httpx.Response | None:
        answer = await own_http.get(path, headers={"If-None-Match": etag})
        return answer if answer.status_code == 200 else None

    after = await until(changed)
    assert after.headers["etag"] != etag
    assert f'"available":{OWN_SALE.stock - 1}' in after.text


async def looks(redis: Redis) -> int:
    """Return how often look.lua has read a sale. No other script or loop of a pod uses HGETALL."""
    statistics = await redis.info("commandstats")
    return int(statistics.get("cmdstat_hgetall", {"calls": 0})["calls"])


async def test_a_reservation_is_looked_up_in_one_call(
    own_http: httpx.AsyncClient, own_inventory: Inventory
) -> None:
    """Redis is the test's own, because holds of other tests would expire by a script call."""
    redis = own_inventory.redis
    reservation = (await reserve(own_http, OWN_SALE.item_id)).headers["location"]
    before = await looks(redis)
    for _ in range(20):
        assert (await own_http.get(reservation)).status_code == 200
    assert await looks(redis) - before == 20


async def test_reads_of_a_sale_are_answered_from_one_look_per_second(
    http: httpx.AsyncClient, redis: Redis, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 7)
    before = await looks(redis)
    for _ in range(300):
        assert (await http.get(f"/sales/{item}")).status_code == 200
    assert await looks(redis) - before < 30


async def test_head_has_the_headers_of_get_and_no_body(
    http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 7)
    reservation = (await reserve(http, item)).headers["location"]
    for path, status in (
        (f"/sales/{item}", 200),
        (reservation, 200),
        (f"/sales/{item}/reservations/{UNKNOWN_ID}", 404),
        ("/sales/unknown", 404),
    ):
        get, head = await http.get(path), await http.head(path)
        assert (head.status_code, head.content) == (status, b"")
        assert dict(head.headers) | {"date": ""} == dict(get.headers) | {"date": ""}
        assert int(head.headers["content-length"]) == len(get.content)
        matching = {"If-None-Match": get.headers.get("etag", '"none"')}
        conditional = await http.head(path, headers=matching)
        assert conditional.status_code == (304 if "etag" in get.headers else status)
    assert (await http.get(reservation)).headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("field", "value"), [("allocated", "many"), ("ends_ms", "253402300800000")]
)
async def test_an_unreadable_sale_does_not_hide_the_others(
    http: httpx.AsyncClient,
    open_sale: OpenSale,
    redis: Redis,
    new_item: Callable[[], str],
    field: str,
    value: str,
) -> None:
    good, bad = new_item(), new_item()
    await open_sale(good)
    await open_sale(bad)
    await redis.hset(ItemKeys.of(bad).sale, field, value)

    async def listed() -> set[str]:
        answer = (await http.get("/sales")).json()
        assert bad not in {sale["itemId"] for sale in answer["sales"]}
        items = {sale["itemId"] for sale in answer["sales"]}
        return set(answer["unreadable"]) if good in items else set()

    assert bad in await until(listed)
    problem(await http.get(f"/sales/{bad}"), 503, "fenced")


async def test_lost_sales_are_named_and_not_left_out(
    own_http: httpx.AsyncClient,
    own_redis: RedisServer,
    own_inventory: Inventory,
    tmp_path: Path,
) -> None:
    """A pod that starts after the loss knows no item, so it has no list."""

    async def claimed() -> bool:
        return (await own_http.get("/sales/unknown")).status_code == 404

    await until(claimed)
    await own_inventory.redis.flushall()

    async def lost() -> bool:
        answer = (await own_http.get("/sales")).json()
        return bool(answer == {"sales": [], "unreadable": [OWN_SALE.item_id]})

    await until(lost)
    page = await own_http.get("/")
    assert f"Sales that cannot be shown now: {OWN_SALE.item_id}." in page.text
    assert "<p>There is no sale.</p>" not in page.text
    addresses = Addresses(url_of(own_redis, API), f"127.0.0.1:{free_port()}", "")
    with ApiServer(tmp_path / "new", addresses) as new:
        async with httpx.AsyncClient(base_url=new.url, timeout=30) as http:
            answer = await http.get("/sales")
            problem(answer, 503, "fenced")
            assert answer.headers["cache-control"] == "no-store"
            await own_inventory.index.claim(str(uuid.uuid4()))

            async def known() -> bool:
                return (await http.get("/sales")).status_code == 200

            await until(known)
        new.kill()  # a graceful stop would wait for Kafka


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


async def test_as_many_clients_as_may_wait_for_redis_are_never_refused(
    api: ApiServer, open_sale: OpenSale, item: str
) -> None:
    """Each of them sends its next request when it has its answer."""
    await open_sale(item)
    look = f"GET /sales/{item}/reservations/{UNKNOWN_ID} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    statuses: Counter[int] = Counter()

    def answered(client: Connection, status: int, _: bytes) -> None:
        statuses[status] += 1
        client.send(look)

    connections = await open_connections(api.url, MAX_READS, answered)
    for client in connections:
        client.send(look)
    await until(lambda: statuses.total() > 50 * MAX_READS)
    for client in connections:
        client.close()
    assert set(statuses) == {404}


async def test_the_process_is_alive_and_ready(http: httpx.AsyncClient) -> None:
    assert (await http.get("/healthz")).status_code == 200
    assert (await http.get("/readyz")).status_code == 200


async def test_metrics_are_served_on_their_own_port(
    api: ApiServer, http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 1)
    await reserve(http, item)

    async def swept() -> str:
        async with httpx.AsyncClient() as scraper:
            text = (await scraper.get(api.metrics_url)).text
        return text if f'flashsale_api_outbox_entries{{item="{item}"}} 1.0' in text else ""

    text = await until(swept)
    for name in (
        f'flashsale_api_requests_total{{item="{item}",outcome="accepted"}} 1.0',
        "flashsale_api_request_seconds_bucket",
        "flashsale_api_batch_size_count",
        "flashsale_api_script_seconds_count",
        "flashsale_api_unacknowledged_events",
        "flashsale_api_events_published_total",
    ):
        assert name in text


async def test_a_sale_has_counters_before_its_first_request(
    api: ApiServer, open_sale: OpenSale, item: str
) -> None:
    """Otherwise Prometheus finds no increase if the sale sells out between two scrapes."""
    await open_sale(item, 1)

    async def counters() -> str:
        async with httpx.AsyncClient() as scraper:
            text = (await scraper.get(api.metrics_url)).text
        lines = text.splitlines(keepends=True)
        return "".join(line for line in lines if "requests" in line and f'"{item}"' in line)

    text = await until(counters)
    for outcome in ("accepted", "sold_out", "limit_reached"):
        assert f'flashsale_api_requests_total{{item="{item}",outcome="{outcome}"}} 0.0' in text


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
    await redis.delete(*ItemKeys.of(item).sold)
    await redis.srem(items("flashsale"), item)
    await until(removed)
    # The pod remembers the sale, which was not closed, and takes the keys for lost.
    problem(await reserve(http, item), 503, "fenced")
    assert f'item="{item}"' not in await metrics()
