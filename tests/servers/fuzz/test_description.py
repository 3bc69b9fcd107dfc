"""The API's description of itself against its real answers: nothing more and nothing less."""

import asyncio
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
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale_api.responses import Problem
from tests.servers.api.test_outages import ITEM
from tests.servers.api.test_reserve import reserve
from tests.support.proxy import Proxy

DESCRIPTION: dict[str, Any] = json.loads((files("flashsale_api") / "openapi.json").read_bytes())
UNKNOWN = "01a208bd-5117-7f0d-b8d8-4e8e9760b87e"
URN = "urn:flashsale:problem:"

Sort = tuple[str, int, str]
"""One sort of answer: the operation, the status, and a problem's slug or ""."""

ON_ANY_PATH = {Problem.NOT_FOUND, Problem.METHOD_NOT_ALLOWED}
"""Answers of the framework, which the description's text has."""
NEVER = {
    Problem.INTERNAL_ERROR,  # described, and a test that can provoke it has found a bug
    Problem.MALFORMED_REQUEST,  # what the framework would say to an error that it does not have
}


def resolved(value: Any) -> Any:  # noqa: ANN401 - any part of a JSON document
    """The part of the description that a reference means."""
    while isinstance(value, dict) and "$ref" in value:
        found: Any = DESCRIPTION
        for name in value["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        value = found
    return value


def slugs(schema: Any) -> Iterator[str]:  # noqa: ANN401 - any part of a JSON document
    """The problems that a schema lets through."""
    match resolved(schema):
        case {"properties": {"type": {"const": str(urn)}}}:
            yield urn.removeprefix(URN)
        case {"properties": {"type": {"enum": list(urns)}}}:
            yield from (urn.removeprefix(URN) for urn in urns)
        case {"allOf": list(parts)} | {"oneOf": list(parts)}:
            for part in parts:
                yield from slugs(part)


def described() -> set[Sort]:
    """Every sort of answer that the description has."""
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
    """Real answers, each held against the description."""

    def __init__(self) -> None:
        self.sorts: set[Sort] = set()

    def check(self, label: str, answer: httpx.Response) -> str:
        """Asserts that the description has just this; returns the problem's slug, or ""."""
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
    """An API that has started and cannot reach Redis."""

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


async def test_every_answer_is_described_and_every_description_is_answered(
    http: httpx.AsyncClient,
    unready: httpx.AsyncClient,
    own_http: httpx.AsyncClient,
    own_redis: RedisServer,
    proxy: Proxy,
    stock: Inventory,
    redis: Redis,
    open_sale: Callable[..., Any],
    new_item: Callable[[], str],
) -> None:
    seen = Seen()
    await _decided(seen, http, stock, open_sale, new_item)
    await _refused(seen, http)
    await _looked_up(seen, http, redis, open_sale, new_item)
    await _unavailable(seen, unready)
    await _backed_up(seen, http, redis, open_sale, new_item())
    await _uncertain(seen, own_http, own_redis, proxy)
    never = {problem.value.slug for problem in NEVER}
    assert seen.sorts == {sort for sort in described() if sort[2] not in never}


async def _decided(
    seen: Seen,
    http: httpx.AsyncClient,
    stock: Inventory,
    open_sale: Callable[..., Any],
    new_item: Callable[[], str],
) -> None:
    label, item, later = "POST /reserve", new_item(), new_item()
    spec = await open_sale(item, 3, max_per_user=2)
    await open_sale(later, starts_ms=(await stock.server()).now_ms + 90_000)
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
    await stock.apply(replace(spec, paused=True), 2)
    found.append(await reserve(http, item, "cid", key="k"))
    await stock.close(item, spec.sale_id, 3)
    found.append(await reserve(http, item, "cid", key="k"))
    assert [seen.check(label, answer) for answer in found] == [
        *("", "", "key-reused", "limit-reached", "not-enough-left", ""),
        *("sold-out", "not-open", "unknown-item", "paused", "ended"),
    ]
    place = await http.get(bought.headers["location"])
    assert place.json() == bought.json()
    seen.check("GET /sales/{itemId}/reservations/{reservationId}", place)


async def _refused(seen: Seen, http: httpx.AsyncClient) -> None:
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
        *("malformed-json", "unsupported-media-type", "body-too-large"),
        *["invalid-field"] * 5,
    ]


async def _looked_up(
    seen: Seen,
    http: httpx.AsyncClient,
    redis: Redis,
    open_sale: Callable[..., Any],
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
        (f"/sales/{item}/reservations/{UNKNOWN}", "unknown-reservation"),
        (f"/sales/{new_item()}/reservations/{UNKNOWN}", "unknown-item"),
        (f"/sales/{foreign}/reservations/{UNKNOWN}", "fenced"),
    ):
        assert seen.check(place, await http.get(path)) == slug
    assert seen.check("POST /reserve", await reserve(http, foreign)) == "fenced"
    for path in ("/sales", "/healthz", "/readyz", "/openapi.json"):
        assert seen.check(f"GET {path}", await http.get(path)) == ""
    assert (await http.get("/openapi.json")).json() == DESCRIPTION


async def _unavailable(seen: Seen, unready: httpx.AsyncClient) -> None:
    """Redis has never answered."""
    for label, path in (
        ("GET /sales", "/sales"),
        ("GET /sales/{itemId}", "/sales/x"),
        ("GET /sales/{itemId}/reservations/{reservationId}", f"/sales/x/reservations/{UNKNOWN}"),
    ):
        assert seen.check(label, await unready.get(path)) == "redis-unavailable"
    assert seen.check("POST /reserve", await reserve(unready, "x")) == "redis-unavailable"
    seen.check("GET /readyz", await unready.get("/readyz"))
    assert seen.check("GET /healthz", await unready.get("/healthz")) == ""


async def _backed_up(
    seen: Seen, http: httpx.AsyncClient, redis: Redis, open_sale: Callable[..., Any], item: str
) -> None:
    await open_sale(item)
    assert seen.check("POST /reserve", await reserve(http, item)) == ""
    fill = "for n = 1, 100000 do redis.call('XADD', KEYS[1], '*', 'id', 'x') end"
    await redis.eval(fill, 1, ItemKeys.of(item).outbox)
    assert seen.check("POST /reserve", await reserve(http, item, "bob")) == "outbox-full"
    await redis.delete(*(getattr(ItemKeys.of(item), key) for key in ("sale", "outbox")))


async def _uncertain(
    seen: Seen, own_http: httpx.AsyncClient, own_redis: RedisServer, proxy: Proxy
) -> None:
    proxy.cut_replies(b"EVALSHA", 2)
    assert seen.check("POST /reserve", await reserve(own_http, ITEM)) == "outcome-unknown"
    own_redis.pause()
    slug = ""
    async with asyncio.timeout(30):
        while slug != "too-many-waiting":  # more come than calls may be in flight
            found = await asyncio.gather(*(reserve(own_http, ITEM) for _ in range(50)))
            slug = max(seen.check("POST /reserve", answer) for answer in found)
    own_redis.resume()


async def test_other_paths_and_methods_are_problems_too(http: httpx.AsyncClient) -> None:
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


def test_every_problem_is_described_once_it_can_be_answered() -> None:
    said = {slug for _, _, slug in described() if slug}
    unsaid = ON_ANY_PATH | (NEVER - {Problem.INTERNAL_ERROR})
    assert said == {problem.value.slug for problem in Problem if problem not in unsaid}
