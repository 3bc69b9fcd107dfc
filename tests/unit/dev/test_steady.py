"""The steady buyers of `make soak`, against a server whose answers a test selects."""

import asyncio
import json
from collections import deque

import pytest

from dev.soak import Report
from dev.stack.ports import free_port
from dev.steady import Buyers

RESERVED = (202, {"reservationId": "r-1"})
FENCED = (503, {"type": "urn:problem:flashsale:fenced"})
UNKNOWN: tuple[int, dict[str, str]] = (202, {})
CONFIRMED: tuple[int, dict[str, str]] = (200, {})
EXPIRED = (409, {"type": "urn:problem:flashsale:hold-expired"})


async def buy(*answers: tuple[int, dict[str, str]] | None) -> Buyers:
    """Let one buyer arrive, who pays. An answer of None closes the connection."""
    left = deque(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(head.lower().partition(b"content-length: ")[2].split(b"\r", 1)[0])
                await reader.readexactly(size)
                if (answer := left.popleft()) is None:
                    return
                body = json.dumps(answer[1])
                writer.write(
                    f"HTTP/1.1 {answer[0]} x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
                )
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        refused = f"http://127.0.0.1:{free_port()}"
        buyers = Buyers([refused, url], [refused, url], "token", lambda: "phone", rate=16.0)
        await buyers.run(0.15)
    assert not left
    return buyers


@pytest.fixture(autouse=True)
def everyone_pays_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dev.steady.CONFIRMED", 1.0)
    monkeypatch.setattr("dev.steady.PAYING_SECONDS", 0.0)
    monkeypatch.setattr("dev.steady._AGAIN_SECONDS", (0.0, 0.0))


async def test_a_buyer_comes_back_until_both_requests_are_served() -> None:
    counts = (await buy(FENCED, None, RESERVED, UNKNOWN, CONFIRMED)).counts
    assert counts.served == {"reserve": 1, "confirm": 1}
    assert counts.promised == counts.confirmed == {"phone": {"r-1"}}
    assert counts.answers["reserve: 503 fenced"] == 1
    assert not counts.failures


async def test_a_refusal_is_a_failure() -> None:
    counts = (await buy(RESERVED, EXPIRED)).counts
    assert counts.failures == {"confirm: 409 hold-expired": 1}
    assert counts.promised == {"phone": {"r-1"}}
    assert not counts.confirmed


async def test_a_soak_without_a_promised_reservation_fails() -> None:
    report = Report(await buy(RESERVED, CONFIRMED), minutes=1.0, rate=16.0)
    assert not report.passed
    report.promised = 1
    assert report.passed
