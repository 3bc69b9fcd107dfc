"""Raw bytes at the API's socket, which no HTTP client would send. Needs Redis.

The API answers 4xx or closes the connection. Meanwhile it serves other connections. No unit is
taken, and no traceback is logged.
"""

import asyncio
import os
import socket
from collections.abc import Callable

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dev.services import ApiServer
from flashsale.inventory import Inventory
from flashsale.sale import Sale
from flashsale_api.limits import MAX_HEAD_BYTES
from flashsale_api.reserve import MAX_BODY_BYTES
from tests.support.api import OpenSale, accepted
from tests.support.wire import (
    DEADLINE_SECONDS,
    GET,
    POST,
    TE,
    Wire,
    body_for,
    connection,
    reserve,
)


def chunked(body: bytes, size: bytes | None = None, end: bytes = b"0\r\n\r\n") -> bytes:
    return (b"%x" % len(body) if size is None else size) + b"\r\n" + body + b"\r\n" + end


def _malformed(item: str) -> dict[str, bytes]:
    body, good = body_for(item), reserve(item)
    length = b"Content-Length: %d\r\n" % len(body)

    def sized(lengths: bytes) -> bytes:
        return POST + lengths + b"\r\n" + body

    def in_chunks(headers: bytes, size: bytes | None = None) -> bytes:
        return POST + headers + b"\r\n" + chunked(body, size)

    return {
        "NUL bytes": b"\x00" * 64 + b"\r\n\r\n",
        "a TLS hello": bytes.fromhex("160301020001 0001fc0303") + b"\x00" * 100,
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/2.0 as a version": good.replace(b"HTTP/1.1", b"HTTP/2.0"),
        "HTTP/0.9": good.replace(b"HTTP/1.1", b"HTTP/0.9"),
        "another version": good.replace(b"HTTP/1.1", b"HTTP/9.9"),
        "an unknown method": good.replace(b"POST", b"BREW"),
        "a method in lower case": good.replace(b"POST", b"post"),
        "no path": good.replace(b"/reserve", b""),
        "a path without a slash": good.replace(b"/reserve", b"reserve"),
        "CONNECT": b"CONNECT other:443 HTTP/1.1\r\nHost: other\r\n\r\n" + good,
        "a NUL in the path": good.replace(b"/reserve", b"/res\x00erve"),
        "Latin-1 in the path": good.replace(b"/reserve", b"/res\xe4rve"),
        "a fragment": good.replace(b"/reserve", b"/reserve#f"),
        "no Host": good.replace(b"Host: x\r\n", b""),
        "two Hosts": good.replace(b"Host: x\r\n", b"Host: x\r\n" * 2),
        "another coding before chunked": in_chunks(TE.replace(b"chunked", b"gzip, chunked")),
        "too many fields": reserve(item, b"X: y\r\n" * 200),
        "UTF-8 in the path": good.replace(b"/reserve", "/resérve".encode()),
        "a path of 100 kB": good.replace(b"/reserve", b"/" + b"a" * 100_000),
        "bare line feeds": good.replace(b"\r\n", b"\n"),
        "bare carriage returns": good.replace(b"\r\n", b"\r"),
        "a folded header": reserve(item, b"X: a\r\n b\r\n"),
        "a NUL in a header": reserve(item, b"X: a\x00b\r\n"),
        "a space in a header's name": reserve(item, b"X Y: a\r\n"),
        "a header without a name": reserve(item, b": a\r\n"),
        "a header without a colon": reserve(item, b"X\r\n"),
        "two lengths": sized(length + b"Content-Length: 5\r\n"),
        "the same length twice": sized(length * 2),
        "a list of lengths": sized(b"Content-Length: %d, %d\r\n" % (len(body), len(body))),
        "a negative length": sized(b"Content-Length: -1\r\n"),
        "a length with a sign": sized(b"Content-Length: +%d\r\n" % len(body)),
        "a length in hex": sized(b"Content-Length: 0x2b\r\n"),
        "a length of 2**80": sized(b"Content-Length: %d\r\n" % 2**80),
        "a length and chunks": in_chunks(length + TE),
        "chunks and a length": in_chunks(TE + length),
        "a request after no chunks": POST + TE + b"Content-Length: 4\r\n\r\n0\r\n\r\n" + good,
        "a request in no chunks": POST + b"Content-Length: 5\r\n" + TE + b"\r\n0\r\n\r\n" + good,
        "chunked, a space before the colon": in_chunks(TE.replace(b":", b" :")),
        "chunked, then gzip": in_chunks(TE.replace(b"chunked", b"chunked, gzip")),
        "chunked and identity": in_chunks(TE + b"Transfer-Encoding: identity\r\n"),
        "almost chunked": in_chunks(TE.replace(b"chunked", b"xchunked")),
        "an invalid chunk size": in_chunks(TE, b"zz"),
        "a negative chunk size": in_chunks(TE, b"-1"),
        "a chunk of 2**80 bytes": in_chunks(TE, b"1" + b"0" * 20),
        "a chunk longer than its size": in_chunks(TE, b"5"),
        "chunks that end in line feeds": POST + TE + b"\r\n" + chunked(body).replace(b"\r", b""),
    }  # fmt: skip


@pytest.mark.parametrize("name", _malformed("x"))
async def test_malformed_bytes_are_refused_and_take_no_unit(
    api: ApiServer, untouched: Sale, name: str
) -> None:
    async with connection(api) as wire, connection(api) as other:
        other.send(GET[:20])
        wire.send(_malformed(untouched.item_id)[name])
        assert await wire.status() in (0, 501, *range(400, 500))
        assert b"HTTP/1.1 2" not in await wire.rest()  # a request after it is ignored, too
        other.send(GET[20:])
        assert await other.status() == 200


@pytest.mark.parametrize(
    "cut",
    [
        lambda head, body: head[:9],  # noqa: ARG005
        lambda head, body: head,  # noqa: ARG005
        lambda head, body: head + b"\r\n\r\n" + body[:-1],
        lambda head, body: head + b"\r\n\r\n",  # noqa: ARG005
        lambda head, body: POST + TE + b"\r\n" + chunked(body, end=b""),  # noqa: ARG005
        lambda head, body: head + b"\r\nExpect: 100-continue\r\n\r\n",  # noqa: ARG005
    ],
    ids=[
        "in the path",
        "in the head",
        "in the body",
        "before the body",
        "before the last chunk",
        "at 100-continue",
    ],
)
async def test_a_client_that_disconnects_during_a_request_takes_no_unit(
    api: ApiServer, untouched: Sale, cut: Callable[[bytes, bytes], bytes]
) -> None:
    for leave in ("half", "close", "reset"):
        async with connection(api) as wire:
            head, _, body = reserve(untouched.item_id).partition(b"\r\n\r\n")
            wire.send(cut(head, body))
            await wire.writer.drain()
            if leave == "half":
                wire.writer.write_eof()
                assert not (await wire.rest()).startswith(b"HTTP/1.1 2")
            elif leave == "close":
                wire.writer.close()
    async with connection(api) as other:
        other.send(GET)
        assert await other.status() == 200


async def test_a_head_without_an_end_closes_the_connection(api: ApiServer, untouched: Sale) -> None:
    del untouched
    most = 500 * MAX_HEAD_BYTES  # far more than the buffers of both sockets can hold
    sent = 0

    async def send(wire: Wire) -> None:
        nonlocal sent
        while sent < most:
            wire.send(b"X: " + b"a" * 10_000 + b"\r\n")
            await wire.writer.drain()
            sent += 10_000

    async with connection(api) as wire:
        wire.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(send(wire), DEADLINE_SECONDS)
    assert sent < most


async def test_a_body_without_an_end_is_answered_413(api: ApiServer, untouched: Sale) -> None:
    del untouched
    async with connection(api) as wire:
        wire.send(POST + TE + b"\r\n")
        for _ in range(3 * MAX_BODY_BYTES // 1000):
            wire.send(b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        assert await wire.status() == 413


async def test_unusual_but_valid_requests_are_served(
    api: ApiServer, inventory: Inventory, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 100, max_per_user=100)
    body, good = body_for(item), reserve(item)
    taken = 0
    for request in (
        good,
        b"\r\n\r\n" + good,
        good.replace(b"POST /reserve", b"POST http://elsewhere/reserve"),
        good.replace(b"/reserve", b"/reserve?" + b"&" * 2_000),
        good.replace(b"HTTP/1.1", b"HTTP/1.0"),
        good.replace(b"Host: x\r\n", b"Host: x\r\n" + b"X-Many: y\r\n" * 90),
        POST + TE + b"\r\n" + chunked(body),
        POST + TE + b"\r\n" + b"".join(chunked(body[n : n + 1], end=b"") for n in range(len(body)))
        + b"0\r\nTrailer: x\r\n\r\n",
        # The first request of Java's HttpClient offers HTTP/2.
        reserve(item, b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"),
        reserve(item, b"Connection: Upgrade\r\nUpgrade: websocket\r\n"),
    ):  # fmt: skip
        async with connection(api) as wire:
            wire.send(request)
            assert await wire.status() == 202, request
            taken += 1
        async with connection(api) as wire:  # byte by byte
            for at in range(len(request)):
                wire.send(request[at : at + 1])
                if at % 100 == 0:
                    await wire.writer.drain()
            assert await wire.status() == 202, request
            taken += 1
    async with connection(api) as wire:
        wire.send(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert await wire.status() == 100
        wire.send(body)
        assert await wire.status() == 202
    async with connection(api) as wire:  # a client of HTTP/1.0 would take 100 for the answer
        old = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Expect: 100-continue\r\n"
        wire.send(old + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        assert await wire.status() == 202
    assert await accepted(inventory, item) == taken + 2


async def test_invalid_paths_are_not_found(
    api: ApiServer, http: httpx.AsyncClient, untouched: Sale
) -> None:
    del http, untouched
    for path in (
        b"/sales/%00",
        b"/sales/%ff",
        b"/sales/%zz",
        b"/sales/%",
        b"/sales/a%2fb",
        b"/sales/a,b",
        b"/sales/../healthz",
        b"//healthz",
        b"/healthz/",
        b"/sales/%0d%0aX:%20y",
        b"/;",
        b"*",
        b"/sales/{}",
        b"/sales/flashsale:items",
        b"/sales/" + b"%41" * 300,
        b"/%2e%2e/etc",
    ):
        async with connection(api) as wire:
            wire.send(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
            assert await wire.status() in (400, 404), path


async def test_bytes_after_a_valid_request_neither_undo_nor_repeat_it(
    api: ApiServer, inventory: Inventory, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 100, max_per_user=100)
    good, bad = reserve(item), b"POST /reserve HTTP/1.1\r\nContent-Length: x\r\n\r\n"
    async with connection(api) as wire:
        wire.send(GET + good + reserve(item, body=b"{") + good + GET)
        assert [await wire.status() for _ in range(5)] == [200, 202, 400, 202, 200]
    async with connection(api) as wire:  # only the first and the last wait for Redis
        wire.send(good + reserve(item, body=b"{") + GET + good)
        assert [await wire.status() for _ in range(4)] == [202, 400, 200, 202]
    async with connection(api) as wire:
        wire.send(good)
        assert await wire.status() == 202
        wire.send(bad + good)
        assert await wire.status() == 400
        assert await wire.rest() == b""
    assert await accepted(inventory, item) == 5


@pytest.mark.slow
async def test_silent_and_slow_clients_are_disconnected_and_delay_no_other_client(
    api: ApiServer, untouched: Sale
) -> None:
    """Takes 20 s, which is the longest time that the API allows a request."""
    good = reserve(untouched.item_id)
    body_begins = good.index(b"\r\n\r\n") + 4

    async def dribble(wire: Wire, data: bytes) -> None:
        for at in range(len(data)):
            wire.send(data[at : at + 1])
            await asyncio.sleep(1)

    async def starve(begin: bytes, then: bytes) -> None:
        async with connection(api) as wire, asyncio.timeout(DEADLINE_SECONDS):
            wire.send(begin)
            dribbling = asyncio.create_task(dribble(wire, then))
            assert await wire.rest() == b""
            dribbling.cancel()
            await asyncio.gather(dribbling, return_exceptions=True)

    async with asyncio.TaskGroup() as crowd:
        starving = [
            crowd.create_task(starve(begin, then))
            for _ in range(200)
            for begin, then in (
                (b"", b""),
                (b"", b"\r\n" * 100),
                (good[:10], b""),
                (good[:40], b"a" * 100),
                (good[:body_begins], good[body_begins:]),
                (POST + TE + b"\r\n", b"1\r\na\r\n" * 20),
            )
        ]
        while not all(task.done() for task in starving):
            async with connection(api) as other:
                other.send(GET)
                assert await other.status() == 200
            await asyncio.sleep(0.1)


@settings(
    max_examples=int(os.environ.get("FLASHSALE_FUZZ_EXAMPLES", "300")),
    derandomize=os.environ.get("FLASHSALE_FUZZ_RANDOM") != "1",
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def _send_mangled(data: st.DataObject, port: int, item: str) -> None:
    """Send a valid request after changing, dropping, repeating and inserting bytes."""
    request = bytearray(reserve(item, b"Idempotency-Key: k\r\n"))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(request) - 1))
        match data.draw(st.sampled_from(["change", "drop", "repeat", "insert"])):
            case "change":
                request[at] = data.draw(st.integers(0, 255))
            case "drop" if len(request) > 40:
                del request[at : at + data.draw(st.integers(1, 20))]
            case "repeat":
                request[at:at] = request[at : at + data.draw(st.integers(1, 200))]
            case _:
                request[at:at] = data.draw(
                    st.sampled_from([b"\r\n", b"\r\n\r\n", b"\x00", b":", b"chunked", b"\xff", TE])
                )
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_SECONDS) as wire:
        wire.sendall(request)
        wire.shutdown(socket.SHUT_WR)
        answer = b""
        while part := wire.recv(65_536):
            answer += part
    for status in answer.split(b"HTTP/1.1 ")[1:]:
        assert status[:1] in b"14" or status.startswith(b"200"), (bytes(request), answer)


async def test_mangled_requests_are_answered_or_closed(
    api: ApiServer,
    http: httpx.AsyncClient,
    inventory: Inventory,
    open_sale: OpenSale,
    item: str,
) -> None:
    await open_sale(item, 5, paused=True)  # some requests stay valid, so the sale is paused
    await asyncio.to_thread(lambda: _send_mangled(port=api.port, item=item))
    assert (await http.get("/healthz")).status_code == 200
    assert await accepted(inventory, item) == 0
    assert b"Traceback" not in api.log.read_bytes()
