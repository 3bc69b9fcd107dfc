"""The OpenAPI document describes exactly the API's real answers. Needs Redis."""

import asyncio
import itertools
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from jsonschema_rs import Draft202012Validator
from redis.asyncio import Redis

from dev.crowd import Connection
from dev.issuer import Issuer
from dev.services import Addresses, ApiServer
from dev.stack.ports import free_port
from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.keys import DEFAULT_ENGINE, ItemKeys, engine_id
from flashsale.reservations import OrderCall
from flashsale_api.responses import Problem
from tests.support.api import OWN_SALE, UNKNOWN_ID, OpenSale, reserve
from tests.support.description import Description, Seen
from tests.support.eventually import until
from tests.support.proxy import Proxy

BUYERS, ORDERS = Description("openapi.json"), Description("openapi-orders.json")

ON_ANY_PATH = {Problem.NOT_FOUND, Problem.METHOD_NOT_ALLOWED}
"""Starlette's answers. They are described in the document's text."""
NEVER = {
    Problem.INTERNAL_ERROR,  # described, but a test that provokes it has found a bug
    Problem.MALFORMED_REQUEST,  # for errors that Starlette does not raise today
}


class SeenByBuyers(Seen):
    """The sorts of answers to buyers, with the rules for their headers."""

    def check(self, label: str, answer: httpx.Response) -> str:
        slug = super().check(label, answer)
        assert ("location" in answer.headers) == (
            answer.status_code == 202 or slug == Problem.OUTCOME_UNKNOWN.value.slug
        )
        assert ("retry-after" in answer.headers) == (
            answer.status_code == 503 or slug in {"paused", "not-open"}
        ) or answer.headers["content-type"].startswith("text/")
        return slug


class Unready(ApiServer):
    """An API that cannot reach Redis or its issuer. It counts as started once it listens."""

    def _ready(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/healthz", timeout=2).close()
        except urllib.error.HTTPError as error:
            error.close()
        return True


@pytest.fixture
async def unready(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    nowhere = f"127.0.0.1:{free_port()}"
    server = Unready(tmp_path / "unready", Addresses(f"redis://{nowhere}/0", nowhere, ""))
    await asyncio.to_thread(server.start)
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        yield client
    server.kill()


@pytest.fixture
async def without_keys(
    without_kafka: Addresses, tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a pod that has never reached the issuer. It sends a valid token."""
    with Issuer() as issuer:
        settings = issuer.settings | {"FLASHSALE_JWKS_URL": f"http://127.0.0.1:{free_port()}/"}
        headers = {"authorization": f"Bearer {issuer.token('ann')}"}
    server = Unready(tmp_path / "without-keys", without_kafka, settings=settings)
    await asyncio.to_thread(server.start)
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=30) as client:
        yield client
    server.kill()


@pytest.fixture
async def unclaimed(without_kafka: Addresses, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a pod whose engine no operator has claimed."""
    server = ApiServer(tmp_path / "unclaimed", replace(without_kafka, engine="unclaimed"))
    await asyncio.to_thread(server.start)
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        yield client
    server.kill()


@pytest.fixture
async def of_header(without_kafka: Addresses, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a pod that names users by the header `x-user`."""
    settings = {"FLASHSALE_USER_HEADER": "x-user"}
    server = ApiServer(tmp_path / "of-header", without_kafka, settings=settings)
    await asyncio.to_thread(server.start)
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        yield client
    server.kill()


async def test_the_described_and_the_real_answers_are_the_same(
    http: httpx.AsyncClient,
    of_header: httpx.AsyncClient,
    unclaimed: httpx.AsyncClient,
    unready: httpx.AsyncClient,
    without_keys: httpx.AsyncClient,
    own_http: httpx.AsyncClient,
    own_redis: RedisServer,
    proxy: Proxy,
    inventory: Inventory,
    redis: Redis,
    open_sale: OpenSale,
    new_item: Callable[[], str],
) -> None:
    seen = SeenByBuyers(BUYERS)
    await _check_decisions(seen, http, inventory, open_sale, new_item)
    await _check_holds(seen, http, inventory, redis, open_sale, new_item())
    await _check_invalid(seen, http)
    await _check_reads(seen, http, redis, open_sale, new_item)
    assert seen.check("GET /sales", await unclaimed.get("/sales")) == "fenced"
    await _check_unready(seen, unready)
    await _check_without_keys(seen, without_keys)
    await _check_users(seen, of_header, open_sale, new_item())
    await _check_full_outbox(seen, http, redis, open_sale, new_item())
    await _check_outages(seen, own_http, own_redis, proxy)
    await _check_other_engine(seen, own_http, own_redis)
    never = {problem.value.slug for problem in NEVER}
    described = {sort for sort in BUYERS.described() if sort[2] not in never}
    assert seen.sorts == described - {("GET /", 500, "")}  # the page is no problem's body


async def _check_decisions(
    seen: Seen,
    http: httpx.AsyncClient,
    inventory: Inventory,
    open_sale: OpenSale,
    new_item: Callable[[], str],
) -> None:
    label, item, later = "POST /reserve", new_item(), new_item()
    spec = await open_sale(item, 3, max_per_user=2)
    await open_sale(later, starts_ms=(await inventory.server()).now_ms + 90_000)
    bought = await reserve(http, item, quantity=2, key="k")
    found = [
        bought,
        await reserve(http, item, quantity=2, key="k"),
        await reserve(http, item, quantity=1, key="k"),
        await reserve(http, item),
        await reserve(http, item, "bob", quantity=2),
        await reserve(http, item, "bob"),
        await reserve(http, item, "cid"),
        await reserve(http, later),
        await reserve(http, new_item()),
    ]
    await inventory.apply(replace(spec, paused=True), 2)
    found.append(await reserve(http, item, "cid", key="k"))
    await inventory.close(item, spec.sale_id, 3)
    found.append(await reserve(http, item, "cid", key="k"))
    assert [seen.check(label, answer) for answer in found] == [
        "",
        "",
        "key-reused",
        "limit-reached",
        "not-enough-left",
        "",
        "sold-out",
        "not-open",
        "unknown-item",
        "paused",
        "ended",
    ]
    place = await http.get(bought.headers["location"])
    assert place.json() == {k: v for k, v in bought.json().items() if k != "userId"}
    seen.check("GET /sales/{itemId}/reservations/{reservationId}", place)


async def _check_holds(
    seen: Seen,
    http: httpx.AsyncClient,
    inventory: Inventory,
    redis: Redis,
    open_sale: OpenSale,
    item: str,
) -> None:
    await open_sale(item, 2, max_per_user=2, hold_seconds=60, max_expired_holds=1)
    held = [await reserve(http, item, user, key="k") for user in ("ann", "bob")]
    sold_out = await reserve(http, item, "cid")
    first, second = (answer.json()["reservationId"] for answer in held)
    await inventory.change("cancel", item, [OrderCall(first)], timeout_seconds=5)
    await redis.zadd(ItemKeys.of(item).holds, {second: 1})
    await inventory.expire(item, 1, timeout_seconds=5)
    # Kafka has never acknowledged the end of the hold, so it is counted here.
    await redis.hset(ItemKeys.of(item).buyers, "bob", "0,1")
    found = [
        *held,
        sold_out,
        *[await reserve(http, item, user, key="k") for user in ("ann", "bob")],
        await reserve(http, item, "bob"),
    ]
    assert [seen.check("POST /reserve", answer) for answer in found] == [
        "",
        "",
        "sold-out",
        "cancelled",
        "hold-expired",
        "too-many-holds",
    ]
    assert seen.check("GET /sales/{itemId}", await http.get(f"/sales/{item}")) == ""
    place = "GET /sales/{itemId}/reservations/{reservationId}"
    for answer in held:
        assert seen.check(place, await http.get(answer.headers["location"])) == ""


async def _check_invalid(seen: Seen, http: httpx.AsyncClient) -> None:
    label, json_type = "POST /reserve", {"Content-Type": "application/json"}
    good = {"userId": "ann", "itemId": "x", "quantity": 1}
    found = [
        await http.post("/reserve", content=b"{", headers=json_type),
        await http.post("/reserve", content=b"{}"),
        await http.post("/reserve", content=b" " * 20_000, headers=json_type),
        await http.post("/reserve", content=b"[]", headers=json_type),
        *[await http.post("/reserve", json=good | {name: None}) for name in good],
        await http.post("/reserve", json=good, headers={"Idempotency-Key": "a b"}),
    ]
    assert [seen.check(label, answer) for answer in found] == [
        "malformed-json",
        "unsupported-media-type",
        "body-too-large",
        *["invalid-field"] * 5,
    ]


async def _check_reads(
    seen: Seen,
    http: httpx.AsyncClient,
    redis: Redis,
    open_sale: OpenSale,
    new_item: Callable[[], str],
) -> None:
    item, foreign = new_item(), new_item()
    await open_sale(item, display_name="Phone", starts_ms=1, ends_ms=4_000_000_000_000)
    await open_sale(foreign)
    await redis.hset(ItemKeys.of(foreign).sale, "format", "99")
    one, place = "GET /sales/{itemId}", "GET /sales/{itemId}/reservations/{reservationId}"
    assert seen.check(one, await http.get(f"/sales/{item}")) == ""
    assert seen.check(one, await http.get("/sales/bad:item")) == "unknown-item"
    assert seen.check(one, await http.get(f"/sales/{foreign}")) == "fenced"
    for path, slug in (
        (f"/sales/{item}/reservations/{UNKNOWN_ID}", "unknown-reservation"),
        (f"/sales/{new_item()}/reservations/{UNKNOWN_ID}", "unknown-item"),
        (f"/sales/{foreign}/reservations/{UNKNOWN_ID}", "fenced"),
    ):
        assert seen.check(place, await http.get(path)) == slug
    assert seen.check("POST /reserve", await reserve(http, foreign)) == "fenced"
    for path in ("/", "/sales", "/healthz", "/readyz", "/openapi.json"):
        assert seen.check(f"GET {path}", await http.get(path)) == ""
    assert (await http.get("/openapi.json")).json() == BUYERS.document


async def _check_unready(seen: Seen, unready: httpx.AsyncClient) -> None:
    """Send requests to a pod whose Redis has never answered."""
    for label, path in (
        ("GET /sales", "/sales"),
        ("GET /sales/{itemId}", "/sales/x"),
        ("GET /sales/{itemId}/reservations/{reservationId}", f"/sales/x/reservations/{UNKNOWN_ID}"),
    ):
        assert seen.check(label, await unready.get(path)) == "redis-unavailable"
    assert seen.check("POST /reserve", await reserve(unready, "x")) == "redis-unavailable"
    seen.check("GET /readyz", await unready.get("/readyz"))
    assert (await unready.get("/")).status_code == 503
    assert seen.check("GET /", await unready.get("/")) == ""
    assert seen.check("GET /healthz", await unready.get("/healthz")) == ""


async def _check_without_keys(seen: Seen, without_keys: httpx.AsyncClient) -> None:
    """Send requests with a token to a pod that cannot verify it."""
    answer = await without_keys.post("/reserve", json={"itemId": "x", "quantity": 1})
    assert seen.check("POST /reserve", answer) == "keys-unavailable"
    place = "GET /sales/{itemId}/reservations/{reservationId}"
    answer = await without_keys.get(f"/sales/x/reservations/{UNKNOWN_ID}")
    assert seen.check(place, answer) == "keys-unavailable"


async def _check_users(
    seen: Seen, of_header: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    """Send requests to a pod that names users by a header."""
    await open_sale(item)
    label, place = "POST /reserve", "GET /sales/{itemId}/reservations/{reservationId}"
    ann = {"x-user": "ann"}
    body = {"itemId": item, "quantity": 1}
    bought = await of_header.post("/reserve", json=body, headers=ann)
    assert seen.check(label, bought) == ""
    assert seen.check(label, await of_header.post("/reserve", json=body)) == "unauthorized"
    other = await of_header.post("/reserve", json=body | {"userId": "bob"}, headers=ann)
    assert seen.check(label, other) == "wrong-user"
    own = await of_header.get(bought.headers["location"], headers=ann)
    assert (seen.check(place, own), own.json()) == ("", bought.json())
    stranger = await of_header.get(bought.headers["location"])
    assert seen.check(place, stranger) == "unauthorized"


async def _check_full_outbox(
    seen: Seen, http: httpx.AsyncClient, redis: Redis, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item)
    assert seen.check("POST /reserve", await reserve(http, item)) == ""
    fill = "for n = 1, 100000 do redis.call('XADD', KEYS[1], '*', 'id', 'x') end"
    await redis.eval(fill, 1, ItemKeys.of(item).outbox)
    assert seen.check("POST /reserve", await reserve(http, item, "bob")) == "outbox-full"
    await redis.delete(*(getattr(ItemKeys.of(item), key) for key in ("sale", "outbox")))


async def _check_outages(
    seen: Seen, own_http: httpx.AsyncClient, own_redis: RedisServer, proxy: Proxy
) -> None:
    item = OWN_SALE.item_id

    unknown, url = f"/sales/x/reservations/{UNKNOWN_ID}", str(own_http.base_url)

    def ignored(*_: object) -> None:
        """The crowd ignores its answers."""

    async def served() -> bool:
        return (await own_http.get(unknown)).status_code == 404

    async def freeze_redis() -> None:
        # A pod that has been without Redis for 5 s lets no request wait for it.
        own_redis.resume()
        await until(served)
        own_redis.pause()

    proxy.cut_replies(b"EVALSHA", 2)
    assert seen.check("POST /reserve", await reserve(own_http, item)) == "outcome-unknown"
    slug = ""
    async with asyncio.timeout(120):
        while slug != "too-many-waiting":  # more requests than the calls in flight can take
            await freeze_redis()
            found = await asyncio.gather(*(reserve(own_http, item) for _ in range(50)))
            slug = max(seen.check("POST /reserve", answer) for answer in found)
        for path in ("/sales", "/sales/{itemId}", "/sales/{itemId}/reservations/{reservationId}"):
            place = path.replace("{itemId}", "x").replace("{reservationId}", UNKNOWN_ID)
            # The reads of known items and those of other names have limits of their own.
            busy = f"/sales/{item}/reservations/{UNKNOWN_ID}" if path == "/sales" else unknown
            slug = ""
            while slug != "too-many-waiting":  # more requests than may wait for Redis
                crowd = [await Connection.open(url, ignored, ignored) for _ in range(90)]
                await freeze_redis()
                for connection in crowd:
                    connection.send(f"GET {busy} HTTP/1.1\r\nHost: crowd\r\n\r\n".encode())
                slug = seen.check(f"GET {path}", await own_http.get(place))
                for connection in crowd:
                    connection.close()
    own_redis.resume()
    own_redis.kill()
    async with asyncio.timeout(30):
        while slug != "redis-unavailable":  # the first call may be in flight
            slug = seen.check("POST /reserve", await reserve(own_http, item))
    own_redis.start()


async def _check_other_engine(
    seen: Seen, own_http: httpx.AsyncClient, own_redis: RedisServer
) -> None:
    client = redis_client.connect(own_redis.url)
    ids = itertools.count()

    async def refused() -> bool:
        # The pod keeps the first id that it reads. Every other one belongs to another engine.
        await client.set(engine_id(DEFAULT_ENGINE), f"engine-{next(ids)}")
        answer = await reserve(own_http, OWN_SALE.item_id)
        return seen.check("POST /reserve", answer) == "other-engine"

    await until(refused)
    await client.aclose()


async def test_unknown_paths_and_other_methods_get_problems(http: httpx.AsyncClient) -> None:
    problem = Draft202012Validator(BUYERS.document["components"]["schemas"]["Problem"])
    for method, path, status in (
        ("POST", "/", 405),
        ("GET", "/sales/", 404),
        ("POST", "/reserve/", 404),
        ("GET", "/docs", 404),
        ("GET", "/reserve", 405),
        ("PUT", "/reserve", 405),
        ("POST", "/sales", 405),
        ("OPTIONS", "/sales/x", 405),
        ("TRACE", "/healthz", 405),
    ):
        answer = await http.request(method, path)
        assert answer.status_code == status, (method, path)
        assert answer.headers["content-type"] == "application/problem+json"
        problem.validate(answer.json())


def test_every_possible_problem_is_described() -> None:
    sorts = BUYERS.described() | ORDERS.described()
    found = {slug for _, _, slug in sorts if slug}
    # The order port also answers not-found if an id is written in another form.
    undescribed = (ON_ANY_PATH | NEVER) - {Problem.INTERNAL_ERROR, Problem.NOT_FOUND}
    assert found == {problem.value.slug for problem in Problem if problem not in undescribed}
