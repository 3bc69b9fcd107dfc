"""The OpenAPI document describes exactly the API's real answers. Needs Redis."""

import asyncio
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema_rs import Draft202012Validator
from redis.asyncio import Redis

from dev.services import Addresses, ApiServer
from dev.stack.ports import free_port
from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.keys import DEFAULT_ENGINE, ItemKeys, engine_id
from flashsale_api.responses import Problem
from tests.support.api import OWN_SALE, UNKNOWN_ID, OpenSale, reserve
from tests.support.eventually import until
from tests.support.proxy import Proxy

DESCRIPTION: dict[str, Any] = json.loads((files("flashsale_api") / "openapi.json").read_bytes())
URN = "urn:flashsale:problem:"

Sort = tuple[str, int, str]
"""A sort of answer: the operation, the status, and the slug of the problem or ""."""

ON_ANY_PATH = {Problem.NOT_FOUND, Problem.METHOD_NOT_ALLOWED}
"""Starlette's answers. They are described in the document's text."""
NEVER = {
    Problem.INTERNAL_ERROR,  # described, but a test that provokes it has found a bug
    Problem.MALFORMED_REQUEST,  # for errors that Starlette does not raise today
}


def resolved(value: Any) -> Any:  # noqa: ANN401 - any part of a JSON document
    """Follow the references of a part of the document."""
    while isinstance(value, dict) and "$ref" in value:
        found: Any = DESCRIPTION
        for name in value["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        value = found
    return value


def slugs(schema: Any) -> Iterator[str]:  # noqa: ANN401 - any part of a JSON document
    """Yield the slugs of the problems that a schema allows."""
    match resolved(schema):
        case {"properties": {"type": {"const": str(urn)}}}:
            yield urn.removeprefix(URN)
        case {"properties": {"type": {"enum": list(urns)}}}:
            yield from (urn.removeprefix(URN) for urn in urns)
        case {"allOf": list(parts)} | {"oneOf": list(parts)}:
            for part in parts:
                yield from slugs(part)


def described() -> set[Sort]:
    """Return every described sort of answer."""
    found = set()
    for path, methods in DESCRIPTION["paths"].items():
        for method, operation in methods.items():
            if method == "parameters":
                continue
            for status, response in operation["responses"].items():
                for content in response["content"].values():
                    for slug in list(slugs(content["schema"])) or [""]:
                        found.add((f"{method.upper()} {path}", int(status), slug))
    return found


class Seen:
    """The sorts of real answers. Each answer is checked against the document."""

    def __init__(self) -> None:
        self.sorts: set[Sort] = set()

    def check(self, label: str, answer: httpx.Response) -> str:
        """Assert that the answer is as described. Return the slug of the problem, or ""."""
        method, path = label.split(" ")
        operation = DESCRIPTION["paths"][path][method.lower()]
        assert str(answer.status_code) in operation["responses"], (label, answer.text)
        response = operation["responses"][str(answer.status_code)]
        kind = answer.headers["content-type"].partition(";")[0]
        schema = {
            **response["content"][kind]["schema"],
            "components": DESCRIPTION["components"],
        }
        slug = ""
        if kind == "text/plain":
            Draft202012Validator(schema).validate(answer.text)
        else:
            Draft202012Validator(schema, validate_formats=True).validate(answer.json())
        if kind == "application/problem+json":
            slug = answer.json()["type"].removeprefix(URN)
        for name, header in response.get("headers", {}).items():
            if (value := answer.headers.get(name)) is not None:
                rule = resolved(header)["schema"]
                number = rule.get("type") == "integer"
                Draft202012Validator(rule).validate(int(value) if number else value)
        assert ("location" in answer.headers) == (
            answer.status_code == 202 or slug == Problem.OUTCOME_UNKNOWN.value.slug
        )
        assert ("retry-after" in answer.headers) == (
            answer.status_code == 503 or slug in {"paused", "not-open"}
        ) or kind == "text/plain"
        self.sorts.add((label, answer.status_code, slug))
        return slug


class Unready(ApiServer):
    """An API that cannot reach Redis. It counts as started once it listens."""

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


async def test_the_described_and_the_real_answers_are_the_same(
    http: httpx.AsyncClient,
    unready: httpx.AsyncClient,
    own_http: httpx.AsyncClient,
    own_redis: RedisServer,
    proxy: Proxy,
    inventory: Inventory,
    redis: Redis,
    open_sale: OpenSale,
    new_item: Callable[[], str],
) -> None:
    seen = Seen()
    await _check_decisions(seen, http, inventory, open_sale, new_item)
    await _check_invalid(seen, http)
    await _check_reads(seen, http, redis, open_sale, new_item)
    await _check_unready(seen, unready)
    await _check_full_outbox(seen, http, redis, open_sale, new_item())
    await _check_outages(seen, own_http, own_redis, proxy)
    await _check_other_engine(seen, own_http, own_redis)
    never = {problem.value.slug for problem in NEVER}
    assert seen.sorts == {sort for sort in described() if sort[2] not in never}


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
    assert place.json() == bought.json()
    seen.check("GET /sales/{itemId}/reservations/{reservationId}", place)


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
    for path in ("/sales", "/healthz", "/readyz", "/openapi.json"):
        assert seen.check(f"GET {path}", await http.get(path)) == ""
    assert (await http.get("/openapi.json")).json() == DESCRIPTION


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
    assert seen.check("GET /healthz", await unready.get("/healthz")) == ""


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
    proxy.cut_replies(b"EVALSHA", 2)
    assert seen.check("POST /reserve", await reserve(own_http, item)) == "outcome-unknown"
    own_redis.pause()
    slug = ""
    async with asyncio.timeout(30):
        while slug != "too-many-waiting":  # more requests than the calls in flight can take
            found = await asyncio.gather(*(reserve(own_http, item) for _ in range(50)))
            slug = max(seen.check("POST /reserve", answer) for answer in found)
    own_redis.resume()


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
    problem = Draft202012Validator(resolved({"$ref": "#/components/schemas/Problem"}))
    for method, path, status in (
        ("GET", "/", 404),
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
    found = {slug for _, _, slug in described() if slug}
    undescribed = ON_ANY_PATH | (NEVER - {Problem.INTERNAL_ERROR})
    assert found == {problem.value.slug for problem in Problem if problem not in undescribed}
