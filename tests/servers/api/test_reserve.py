"""POST /reserve on a real API process: every answer, and the limits under concurrency."""

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import datetime

import httpx
import pytest
from redis.asyncio import Redis

from dev.crowd import stampede
from dev.journal import Attempt
from dev.services import ApiServer
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.sale import rfc3339_of_ms
from tests.support.api import UNKNOWN_ID, OpenSale, accepted, problem, reserve
from tests.support.eventually import until

TOO_DEEP = b'{"userId":"ann","itemId":"x","quantity":1,"more":' + b"[" * 8_000


async def test_an_accepted_request_returns_the_reservation_and_its_location(
    http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, max_per_user=2)
    answer = await reserve(http, item, quantity=2)
    assert answer.status_code == 202
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert answer.headers["location"] == f"/sales/{item}/reservations/{body['reservationId']}"
    assert datetime.fromisoformat(body["acceptedAt"]).tzinfo is not None
    assert body.pop("confirmedAt") == body.pop("acceptedAt")
    assert body == {
        "reservationId": body["reservationId"],
        "saleId": f"default/{item}",
        "itemId": item,
        "userId": "ann",
        "quantity": 2,
        "state": "confirmed",
    }
    found = await http.get(answer.headers["location"])
    assert found.headers["cache-control"] == "no-store"
    public = {name: value for name, value in answer.json().items() if name != "userId"}
    assert (found.status_code, found.json()) == (200, public)


async def test_a_retry_with_the_same_key_returns_the_same_reservation(
    http: httpx.AsyncClient, open_sale: OpenSale, inventory: Inventory, item: str
) -> None:
    spec = await open_sale(item, 5, max_per_user=5)
    answers = await asyncio.gather(*(reserve(http, item, key="k-1") for _ in range(30)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.text for answer in answers}) == 1
    assert await accepted(inventory, item) == 1
    await inventory.close(item, spec.sale_id, 2)
    assert (await reserve(http, item, key="k-1")).text == answers[0].text
    problem(await reserve(http, item, key="k-1", quantity=2), 422, "key-reused")
    # Another user can use the same key.
    problem(await reserve(http, item, user="bob", key="k-1"), 409, "ended")


async def test_a_refused_request_can_be_repeated_with_its_key(
    http: httpx.AsyncClient, open_sale: OpenSale, inventory: Inventory, item: str
) -> None:
    spec = await open_sale(item, 0)
    problem(await reserve(http, item, key="k"), 409, "sold-out")
    await inventory.apply(replace(spec, stock=1), 2)
    assert (await reserve(http, item, key="k")).status_code == 202


async def test_a_request_is_refused_if_it_exceeds_the_limit_or_the_stock(
    http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 3, max_per_user=2)
    refused = problem(await reserve(http, item, quantity=3), 409, "limit-reached")
    assert (refused["userUnits"], refused["maxPerUser"]) == (0, 2)
    assert (await reserve(http, item, quantity=2)).status_code == 202
    refused = problem(await reserve(http, item), 409, "limit-reached")
    assert (refused["userUnits"], refused["maxPerUser"]) == (2, 2)
    problem(await reserve(http, item, "bob", quantity=2), 409, "not-enough-left")
    assert (await reserve(http, item, "bob")).status_code == 202
    problem(await reserve(http, item, "cid"), 409, "sold-out")


async def test_concurrent_requests_of_a_user_get_at_most_the_limit(
    http: httpx.AsyncClient, open_sale: OpenSale, inventory: Inventory, item: str
) -> None:
    await open_sale(item, 100, max_per_user=2)
    answers = await asyncio.gather(*(reserve(http, item) for _ in range(100)))
    assert Counter(answer.status_code for answer in answers) == {202: 2, 409: 98}
    assert await accepted(inventory, item) == 2


async def test_a_request_before_the_start_gets_the_start_time(
    http: httpx.AsyncClient, open_sale: OpenSale, inventory: Inventory, item: str
) -> None:
    starts_ms = (await inventory.server()).now_ms + 90_000
    await open_sale(item, starts_ms=starts_ms)
    answer = await reserve(http, item)
    assert problem(answer, 409, "not-open")["startsAt"] == rfc3339_of_ms(starts_ms)
    assert 1 <= int(answer.headers["retry-after"]) <= 90


async def test_a_paused_sale_and_an_ended_sale_refuse_requests(
    http: httpx.AsyncClient, open_sale: OpenSale, inventory: Inventory, item: str
) -> None:
    spec = await open_sale(item, paused=True)
    problem(await reserve(http, item), 409, "paused")
    await inventory.apply(replace(spec, ends_ms=1), 2)
    problem(await reserve(http, item), 409, "ended")


async def test_an_unknown_item_gets_404(http: httpx.AsyncClient, item: str) -> None:
    problem(await reserve(http, item), 404, "unknown-item")


async def test_a_sale_whose_keys_are_lost_is_fenced_and_not_unknown(
    http: httpx.AsyncClient, open_sale: OpenSale, redis: Redis, item: str
) -> None:
    await open_sale(item)
    bought = await reserve(http, item)
    assert bought.status_code == 202
    await redis.delete(*ItemKeys.of(item).sold)
    problem(await reserve(http, item, "bob"), 503, "fenced")
    problem(await http.get(bought.headers["location"]), 503, "fenced")
    problem(await http.get(f"/sales/{item}"), 503, "fenced")
    problem(await reserve(http, f"{item}-2"), 404, "unknown-item")


async def test_a_pod_that_has_not_been_called_yet_knows_the_sale_too(
    api: ApiServer, http: httpx.AsyncClient, open_sale: OpenSale, redis: Redis, item: str
) -> None:
    await open_sale(item)

    async def swept() -> bool:
        entries = f'flashsale_api_outbox_entries{{item="{item}"}}'
        return entries in (await http.get(api.metrics_url)).text

    await until(swept)
    await redis.delete(*ItemKeys.of(item).sold)
    problem(await reserve(http, item), 503, "fenced")


async def test_a_closed_sale_whose_keys_are_lost_may_have_been_applied_again(
    http: httpx.AsyncClient, open_sale: OpenSale, redis: Redis, inventory: Inventory, item: str
) -> None:
    spec = await open_sale(item)
    assert (await reserve(http, item)).status_code == 202
    await inventory.close(item, spec.sale_id, 2)
    problem(await reserve(http, item, "bob"), 409, "ended")
    await redis.delete(*ItemKeys.of(item).sold)
    problem(await reserve(http, item, "bob"), 503, "fenced")


@pytest.mark.parametrize(("field", "value"), [("run_id", "another"), ("format", "99")])
async def test_a_sale_of_another_run_or_format_is_fenced(
    http: httpx.AsyncClient,
    open_sale: OpenSale,
    redis: Redis,
    item: str,
    field: str,
    value: str,
) -> None:
    await open_sale(item)
    await redis.hset(ItemKeys.of(item).sale, field, value)
    answer = await reserve(http, item)
    problem(answer, 503, "fenced")
    assert int(answer.headers["retry-after"]) >= 1
    problem(await http.get(f"/sales/{item}/reservations/{UNKNOWN_ID}"), 503, "fenced")


async def test_a_full_outbox_refuses_new_buyers_but_not_retries(
    http: httpx.AsyncClient, open_sale: OpenSale, redis: Redis, inventory: Inventory, item: str
) -> None:
    await open_sale(item)
    first = await reserve(http, item, key="k")
    assert first.status_code == 202
    fill = "for n = 1, 100000 do redis.call('XADD', KEYS[1], '*', 'id', 'x') end"
    await redis.eval(fill, 1, ItemKeys.of(item).outbox)
    answer = await reserve(http, item, "bob")
    problem(answer, 503, "outbox-full")
    assert int(answer.headers["retry-after"]) >= 1
    assert (await reserve(http, item, key="k")).text == first.text
    assert await accepted(inventory, item) == 1
    await redis.delete(*(getattr(ItemKeys.of(item), key) for key in ("sale", "outbox")))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"quantity": -1}, "quantity"),
        ({"quantity": 0}, "quantity"),
        ({"quantity": 1_001}, "quantity"),
        ({"quantity": 10**30}, "quantity"),
        ({"quantity": "2"}, "quantity"),
        ({"quantity": 1.9}, "quantity"),
        ({"quantity": 1.0}, "quantity"),
        ({"quantity": True}, "quantity"),
        ({"quantity": None}, "quantity"),
        ({"quantity": ...}, "quantity"),
        ({"userId": ...}, "userId"),
        ({"userId": None}, "userId"),
        ({"userId": ""}, "userId"),
        ({"userId": 7}, "userId"),
        ({"userId": "x" * 129}, "userId"),
        ({"userId": "nul\x00byte"}, "userId"),
        ({"userId": "line\n"}, "userId"),
        ({"userId": "a,b"}, "userId"),
        ({"userId": "päm"}, "userId"),
        ({"itemId": ...}, "itemId"),
        ({"itemId": "another:key"}, "itemId"),
        ({"itemId": "}:{"}, "itemId"),
        ({"itemId": "x" * 129}, "itemId"),
        ({"itemId": ".hidden"}, "itemId"),
    ],
)
@pytest.mark.parametrize("units", [0, 5])
async def test_an_invalid_field_is_named_and_takes_no_unit(
    http: httpx.AsyncClient,
    open_sale: OpenSale,
    inventory: Inventory,
    item: str,
    fields: dict[str, object],
    field: str,
    units: int,
) -> None:
    await open_sale(item, units)
    good: dict[str, object] = {"userId": "ann", "itemId": item, "quantity": 1}
    body = {name: value for name, value in (good | fields).items() if value is not ...}
    refusal = problem(await http.post("/reserve", json=body), 422, "invalid-field")
    assert refusal["field"] == field
    assert field in refusal["detail"]
    assert refusal["rule"] in refusal["detail"]
    sale = (await inventory.sales([item]))[item]
    assert (sale.accepted, sale.available, sale.outbox_length) == (0, units, 0)


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"1", b"null"])
async def test_a_body_that_is_not_an_object_is_refused(
    http: httpx.AsyncClient, body: bytes
) -> None:
    answer = await http.post("/reserve", content=body, headers={"Content-Type": "application/json"})
    problem(answer, 422, "invalid-field")


@pytest.mark.parametrize("body", [b"", b"{", b"{]", b'{"userId":"\xff"}', b"NaN", TOO_DEEP])
async def test_malformed_json_is_refused(http: httpx.AsyncClient, body: bytes) -> None:
    answer = await http.post("/reserve", content=body, headers={"Content-Type": "application/json"})
    problem(answer, 400, "malformed-json")


@pytest.mark.parametrize(
    ("members", "name"),
    [
        (b'"userId":"bob"', "userId"),
        (b'"user\\u0049d":"bob"', "userId"),
        (b'"itemId":"another"', "itemId"),
        (b'"quantity":1', "quantity"),
        (b'"x":1,"x":1', "x"),
        (b'"":1,"":1', ""),
        (b'"x":{"y":[%b]},"x":null' % (b"9" * 6_000), "x"),
    ],
)
async def test_a_repeated_member_is_refused_and_takes_no_unit(
    http: httpx.AsyncClient,
    open_sale: OpenSale,
    inventory: Inventory,
    item: str,
    members: bytes,
    name: str,
) -> None:
    await open_sale(item)
    body = b'{"userId":"ann","itemId":"%b","quantity":1,%b}' % (item.encode(), members)
    headers = {"Content-Type": "application/json"}
    answer = await http.post("/reserve", content=body, headers=headers)
    assert problem(answer, 400, "malformed-json")["detail"] == f"the member {name} is repeated"
    assert await accepted(inventory, item) == 0


async def test_a_repeated_member_that_is_no_text_is_refused(
    http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item)
    half = b'"\xed\xa0\x80":1'  # half of a surrogate pair
    body = b'{"userId":"ann","itemId":"%b","quantity":1,%b,%b}' % (item.encode(), half, half)
    answer = await http.post("/reserve", content=body, headers={"Content-Type": "application/json"})
    problem(answer, 400, "malformed-json")


async def test_further_members_are_ignored(
    http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item)
    further = b'"x":{"userId":"bob","y":1,"y":[%b]},"User":"userId"' % (b"9" * 6_000)
    body = b'{"userId":"ann","itemId":"%b","quantity":1,%b}' % (item.encode(), further)
    headers = {"Content-Type": "application/json"}
    answer = await http.post("/reserve", content=body, headers=headers)
    assert answer.status_code == 202
    assert answer.json()["userId"] == "ann"


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"]
)
async def test_another_content_type_is_refused(
    http: httpx.AsyncClient, content_type: str | None
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = await http.post("/reserve", content=b"{}", headers=headers)
    problem(answer, 415, "unsupported-media-type")


async def test_a_content_type_with_a_charset_is_accepted(
    http: httpx.AsyncClient, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item)
    body = f'{{"userId":"ann","itemId":"{item}","quantity":1,"unknown":[{{}}]}}'
    answer = await http.post(
        "/reserve", content=body, headers={"Content-Type": "Application/JSON; charset=utf-8"}
    )
    assert answer.status_code == 202


async def test_a_huge_body_is_refused_and_takes_no_unit(
    http: httpx.AsyncClient, open_sale: OpenSale, inventory: Inventory, item: str
) -> None:
    await open_sale(item)
    answer = await reserve(http, item, user="x" * 1_500_000)
    problem(answer, 413, "body-too-large")
    assert await accepted(inventory, item) == 0


@pytest.mark.parametrize("key", ["with space", "x" * 129, "a,b", "é"])
async def test_an_invalid_or_repeated_key_is_refused(
    http: httpx.AsyncClient, open_sale: OpenSale, inventory: Inventory, item: str, key: str
) -> None:
    await open_sale(item)
    body = {"userId": "ann", "itemId": item, "quantity": 1}
    answer = await http.post("/reserve", json=body, headers=[(b"Idempotency-Key", key.encode())])
    assert problem(answer, 422, "invalid-field")["field"] == "Idempotency-Key"
    twice = [("Idempotency-Key", "one"), ("Idempotency-Key", "two")]
    answer = await http.post("/reserve", json=body, headers=twice)
    assert problem(answer, 422, "invalid-field")["field"] == "Idempotency-Key"
    assert await accepted(inventory, item) == 0


async def test_other_methods_get_405_and_unknown_paths_404(http: httpx.AsyncClient) -> None:
    answer = await http.get("/reserve")
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"
    problem(await http.delete("/sales"), 405, "method-not-allowed")
    problem(await http.get("/nothing"), 404, "not-found")
    problem(await http.get("/metrics"), 404, "not-found")


async def test_three_thousand_users_get_exactly_ninety_nine_units(
    api: ApiServer, open_sale: OpenSale, inventory: Inventory, item: str
) -> None:
    await open_sale(item, 99)
    wanted = [
        Attempt(f"u{n}", {"userId": f"u{n}", "itemId": item, "quantity": 1}) for n in range(3_000)
    ]
    journal = await stampede([api.url], wanted)
    assert journal.outcomes() == {(202, "accepted"): 99, (409, "sold-out"): 2_901}
    assert await accepted(inventory, item) == 99
