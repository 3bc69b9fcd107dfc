"""Requests that try to upset the order or the number of a connection's answers. Needs Redis."""

import asyncio

import httpx
import pytest

from dev.services import ApiServer
from dev.stack.servers import RedisServer
from flashsale.inventory import Inventory
from flashsale.sale import Sale
from flashsale_api.limits import MAX_PIPELINED
from tests.support.api import OWN_SALE, UNKNOWN_ID, OpenSale, accepted
from tests.support.wire import CHUNKED, GET, JSON, POST, TE, connection, reserve


async def test_upgrades_in_one_read_are_served_in_a_loop(
    api: ApiServer, inventory: Inventory, open_sale: OpenSale, item: str
) -> None:
    """The first requests are answered at once, so none of them waits and is refused.

    The buffers of the kernel hold all their answers, if this process does not read for a while.
    """
    await open_sale(item, 5, max_per_user=5)
    upgrade = b"Connection: upgrade\r\nUpgrade: x\r\n"
    logged = len(api.log.read_bytes())
    async with connection(api) as wire:
        wire.send(reserve(item, upgrade).replace(JSON, b"") * 100 + reserve(item))
        assert [await wire.status() for _ in range(100)] == [415] * 100
        assert await wire.status() == 202
    async with connection(api) as wire:
        wire.send(reserve(item) + GET.replace(b"\r\n\r\n", b"\r\n" + upgrade + b"\r\n") * 4_300)
        assert await wire.status() == 202
        await wire.rest_or_silence()
    assert await accepted(inventory, item) == 2
    assert b"Traceback" not in api.log.read_bytes()[logged:]


async def test_an_upgrade_keeps_the_rest_of_its_connection_header(
    api: ApiServer, untouched: Sale
) -> None:
    del untouched
    upgrade = GET.replace(b"\r\n\r\n", b"\r\nConnection: close, Upgrade\r\nUpgrade: x\r\n\r\n")
    for request in (upgrade, upgrade.replace(b"close, ", b"").replace(b"HTTP/1.1", b"HTTP/1.0")):
        async with connection(api) as wire:
            wire.send(request + GET)
            assert await wire.status() == 200
            assert await wire.rest() == b""


async def test_more_pipelined_requests_than_may_wait_are_refused_in_their_order(
    api: ApiServer, inventory: Inventory, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 1_000, max_per_user=1_000)
    async with connection(api) as wire:
        wire.send(reserve(item) * (MAX_PIPELINED + 1))
        assert [await wire.status() for _ in range(MAX_PIPELINED + 1)] == [202] * 17
    async with connection(api) as wire:
        wire.send(reserve(item) * 400)
        statuses = []
        while status := await wire.status():
            statuses.append(status)
    assert statuses == [202] * (MAX_PIPELINED + 1) + [400]
    assert await accepted(inventory, item) == 2 * (MAX_PIPELINED + 1)


async def test_requests_that_arrive_one_by_one_wait_in_the_kernel(
    own_api: ApiServer, own_redis: RedisServer
) -> None:
    """The API reads no further while one waits, so these are not too many."""
    number = MAX_PIPELINED + 1
    path = f"/sales/{OWN_SALE.item_id}/reservations/{UNKNOWN_ID}".encode()
    own_redis.pause()
    try:
        async with connection(own_api) as wire:
            wire.send(GET.replace(b"/healthz", path))  # its answer waits for Redis
            for _ in range(number):
                wire.send(GET)
                await asyncio.sleep(0.01)
            own_redis.resume()
            assert [await wire.status() for _ in range(number + 1)][1:] == [200] * number
    finally:
        own_redis.resume()


@pytest.mark.parametrize(
    "bad",
    [
        b"\x00garbage\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 1_000,
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: " + b"b" * 70_000 + b"\r\n\r\n",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        b"CONNECT other:443 HTTP/1.1\r\nHost: other\r\n\r\n",
    ],
    ids=["not HTTP", "too many fields", "a head too large", "another coding", "CONNECT"],
)
async def test_earlier_requests_are_answered_before_a_refusal(
    api: ApiServer, inventory: Inventory, open_sale: OpenSale, item: str, bad: bytes
) -> None:
    await open_sale(item, 5)
    async with connection(api) as wire:
        wire.send(reserve(item) + bad)
        assert await wire.status() == 202
        assert await wire.status() in (400, 431, 501)
        assert await wire.rest() == b""
    assert await accepted(inventory, item) == 1


async def test_a_half_closed_connection_gets_its_answers(
    api: ApiServer, inventory: Inventory, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 5, max_per_user=5)
    async with connection(api) as wire:
        wire.send(reserve(item) * 3 + reserve(item)[:-1])
        wire.writer.write_eof()
        assert [await wire.status() for _ in range(4)] == [202, 202, 202, 0]
    assert await accepted(inventory, item) == 3


async def test_a_client_that_leaves_during_a_pipeline_leaves_no_traceback(
    api: ApiServer, untouched: Sale, http: httpx.AsyncClient
) -> None:
    path = f"/sales/{untouched.item_id}/reservations/{UNKNOWN_ID}".encode()
    look = GET.replace(b"/healthz", path)  # its answer waits for Redis
    for _ in range(20):
        async with connection(api) as wire:
            wire.send((look + GET) * 8)
            await asyncio.sleep(0)
    assert (await http.get("/healthz")).status_code == 200


async def test_trailers_are_not_headers(
    api: ApiServer, inventory: Inventory, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 5, max_per_user=5)
    body = reserve(item).partition(b"\r\n\r\n")[2]
    chunk = b"%x\r\n%b\r\n0\r\n" % (len(body), body)
    plain = b"POST /reserve HTTP/1.1\r\nHost: x\r\n" + TE
    async with connection(api) as wire:
        wire.send(plain + b"\r\n" + chunk + b"Content-Type: application/json\r\n\r\n")
        assert await wire.status() == 415
        wire.send((CHUNKED + chunk + b"Idempotency-Key: k\r\n\r\n") * 2)
        assert [await wire.status() for _ in range(2)] == [202, 202]
    assert await accepted(inventory, item) == 2  # two reservations without a key


async def test_a_path_is_compared_as_it_was_sent(api: ApiServer, untouched: Sale) -> None:
    async with connection(api) as wire:
        for path in (b"/%72eserve", b"/reserve%2f", b"/reserve/", b"//reserve", b"/RESERVE"):
            wire.send(reserve(untouched.item_id).replace(b"/reserve", path))
            assert await wire.status() == 404


async def test_blanks_behind_a_header_do_not_count(
    api: ApiServer, inventory: Inventory, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 5, max_per_user=5)
    async with connection(api) as wire:
        for blanks in (b"", b" ", b"\t "):
            wire.send(reserve(item, b"Idempotency-Key: k" + blanks + b"\r\n"))
            assert await wire.status() == 202
    assert await accepted(inventory, item) == 1
