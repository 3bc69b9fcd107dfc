"""The order port refuses wrong requests, and each refusal changes nothing."""

import asyncio

import httpx
import pytest

from dev.services import ApiServer
from tests.support.api import UNKNOWN_ID, problem
from tests.support.eventually import until
from tests.support.orders import TOKENS, NewApi, Shop, order_client

JSON = {"Content-Type": "application/json"}


async def test_unknown_items_and_reservations_get_404(shop: Shop) -> None:
    path = f"/sales/{shop.item}/reservations/{UNKNOWN_ID}"
    for kind in ("unknown-item", "unknown-reservation"):
        if kind == "unknown-reservation":
            await shop.open()
        for answer in (
            await shop.confirm(path),
            await shop.cancel(path),
            await shop.orders.get(path),
        ):
            problem(answer, 404, kind)


async def test_a_path_with_ids_in_another_form_decides_nothing(shop: Shop) -> None:
    """A final answer would let the shop void the payment of a reservation that exists."""
    await shop.open()
    own_id = (await shop.hold("ann")).rpartition("/")[2]
    for item, name in (
        ("bad:item", own_id),
        (f"%{ord(shop.item[0]):X}{shop.item[1:]}", own_id),
        (shop.item, own_id.upper()),
        (shop.item, f"%{ord(own_id[0]):X}{own_id[1:]}"),
        (shop.item, "x"),
    ):
        path = f"/sales/{item}/reservations/{name}"
        for answer in (await shop.confirm(path), await shop.cancel(path)):
            problem(answer, 404, "not-found")


async def test_other_paths_and_methods_get_problems(shop: Shop) -> None:
    path = f"/sales/{shop.item}/reservations/{UNKNOWN_ID}"
    for method, other, status, kind in (
        ("GET", f"{path}/confirm", 405, "method-not-allowed"),
        ("DELETE", path, 405, "method-not-allowed"),
        ("POST", path, 405, "method-not-allowed"),
        ("POST", f"{path}/refund", 404, "not-found"),
        ("POST", f"{path}/confirm/", 404, "not-found"),
        ("POST", "/reserve", 404, "not-found"),
        ("GET", "/sales", 404, "not-found"),
        ("GET", "/", 404, "not-found"),
    ):
        problem(await shop.orders.request(method, other), status, kind)
    # The buyers' port has no such paths.
    problem(await shop.buyers.post(f"{path}/confirm", json={"orderRef": "o"}), 404, "not-found")


@pytest.mark.parametrize(
    ("body", "status", "kind", "field"),
    [
        (b"{", 400, "malformed-json", None),
        (b'{"orderRef":"\xff"}', 400, "malformed-json", None),
        (b"[" * 8_000, 422, "invalid-field", ""),
        (b"[]", 422, "invalid-field", ""),
        (b"null", 422, "invalid-field", ""),
        (b'{"orderRef":null}', 422, "invalid-field", "orderRef"),
        (b'{"orderRef":7}', 422, "invalid-field", "orderRef"),
        (b'{"orderRef":""}', 422, "invalid-field", "orderRef"),
        (b'{"orderRef":"a,b"}', 422, "invalid-field", "orderRef"),
        (b'{"orderRef":"line\\n"}', 422, "invalid-field", "orderRef"),
        (b'{"orderRef":"%b"}' % (b"x" * 129), 422, "invalid-field", "orderRef"),
        (b'{"orderRef":"a","orderRef":"b"}', 400, "malformed-json", None),
        (b'{"orderRef":"a","order\\u0052ef":"b"}', 400, "malformed-json", None),
        (b'{"orderRef":"a","quantity":1}', 422, "invalid-field", "quantity"),
        (b'{"orderref":"a"}', 422, "invalid-field", "orderref"),
        (b'{"orderRef":"a"}' + b" " * 20_000, 413, "body-too-large", None),
    ],
)
@pytest.mark.parametrize("verb", ["confirm", "cancel"])
async def test_a_wrong_body_is_named_and_changes_nothing(
    shop: Shop, verb: str, body: bytes, status: int, kind: str, field: str | None
) -> None:
    await shop.open()
    path = await shop.hold()
    answer = await shop.orders.post(f"{path}/{verb}", content=body, headers=JSON)
    refusal = problem(answer, status, kind)
    assert refusal.get("field") == field
    if field:
        assert field in refusal["detail"]
    assert (await shop.record(path)).state == "held"


async def test_a_confirmation_needs_an_order(shop: Shop) -> None:
    await shop.open()
    path = await shop.hold()
    empty = await shop.orders.post(f"{path}/confirm", content=b"", headers=JSON)
    problem(empty, 400, "malformed-json")
    without = await shop.orders.post(f"{path}/confirm", json={})
    assert problem(without, 422, "invalid-field")["field"] == "orderRef"
    assert (await shop.record(path)).state == "held"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/jsonp"])
async def test_another_content_type_is_refused(shop: Shop, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    for verb in ("confirm", "cancel"):
        path = f"/sales/{shop.item}/reservations/{UNKNOWN_ID}/{verb}"
        answer = await shop.orders.post(path, content=b'{"orderRef":"o"}', headers=headers)
        problem(answer, 415, "unsupported-media-type")


@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_a_cancellation_needs_no_order(shop: Shop, body: bytes) -> None:
    await shop.open()
    path = await shop.hold()
    headers = JSON if body else {}

    async def cancelled() -> bool:
        answer = await shop.orders.post(f"{path}/cancel", content=body, headers=headers)
        assert answer.status_code in {200, 202}, answer.text
        return answer.status_code == 200

    await until(cancelled)


async def test_a_cancellation_whose_body_is_cut_off_changes_nothing(
    shop: Shop, order_api: ApiServer
) -> None:
    await shop.open()
    path = await shop.hold()
    port = int(order_api.orders_url.rpartition(":")[2])
    head = f"POST {path}/cancel HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKENS[0]}\r\n"
    for end in ("Content-Length: 20\r\n\r\n", "Content-Length: 20\r\n\r\n{"):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write((head + end).encode())
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
        await writer.wait_closed()
    # A call that came later is answered after them.
    assert (await shop.orders.get(path)).json()["state"] == "held"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", f"Bearer {TOKENS[0][:-1]}")],
        [("Authorization", f"Bearer {TOKENS[0]}x")],
        [("Authorization", f"Bearer {TOKENS[0].upper()}")],
        [("Authorization", f"Bearer {','.join(TOKENS)}")],
        [("Authorization", f"Basic {TOKENS[0]}")],
        [("Authorization", TOKENS[0])],
        [("X-Token", TOKENS[0])],
        [("Authorization", f"Bearer {TOKENS[0]}"), ("Authorization", f"Bearer {TOKENS[0]}")],
    ],
)
async def test_a_request_without_a_right_token_is_refused(
    shop: Shop, order_api: ApiServer, headers: list[tuple[str, str]]
) -> None:
    await shop.open()
    path = await shop.hold()
    async with httpx.AsyncClient(base_url=order_api.orders_url) as http:
        for answer in (
            await http.get(path, headers=headers),
            await http.post(f"{path}/cancel", headers=headers),
            await http.post(f"{path}/confirm", json={"orderRef": "o"}, headers=headers),
            await http.get("/nothing", headers=headers),
        ):
            problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert not any(token in answer.text for token in TOKENS)
    assert (await shop.record(path)).state == "held"


async def test_both_tokens_of_a_rotation_are_right(shop: Shop, order_api: ApiServer) -> None:
    await shop.open()
    path = await shop.hold()
    for token in TOKENS:
        async with order_client(order_api, token) as orders:
            assert (await orders.get(path)).status_code == 200
    lower = {"Authorization": f"bearer {TOKENS[1]}"}
    async with httpx.AsyncClient(base_url=order_api.orders_url) as http:
        assert (await http.get(path, headers=lower)).status_code == 200


async def test_a_rotated_token_is_wrong(shop: Shop, new_order_api: NewApi) -> None:
    api = await asyncio.to_thread(new_order_api, TOKENS[1])
    await shop.open()
    path = await shop.hold()
    async with order_client(api, TOKENS[0]) as former, order_client(api, TOKENS[1]) as current:
        problem(await former.get(path), 401, "unauthorized")
        assert (await current.get(path)).status_code == 200


async def test_the_port_is_closed_without_a_token(new_order_api: NewApi) -> None:
    api = await asyncio.to_thread(new_order_api)
    async with order_client(api) as orders:
        with pytest.raises(httpx.ConnectError):
            await orders.get("/")
