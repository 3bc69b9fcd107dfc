"""The benchmark's crowd: every request is counted, from when it was due."""

import asyncio
from contextlib import suppress

import pytest

from bench.load import Crowd, Plan, Tally, rank

STALL_SECONDS = 0.5


class Api:
    """Answers 202 at once, but for the nth request, which takes `STALL_SECONDS`."""

    def __init__(self, stalled: int | None = None) -> None:
        self._stalled = stalled
        self.bodies: list[bytes] = []
        self.buyers: list[asyncio.Task[None]] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.buyers.append(asyncio.create_task(self.answer(reader, writer)))

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.bodies.append(await reader.readexactly(size))
                if len(self.bodies) == self._stalled:
                    await asyncio.sleep(STALL_SECONDS)
                # In two parts, as they may come.
                writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-le")
                await asyncio.sleep(0)
                writer.write(b"ngth: 2\r\n\r\n{}")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def run(api: Api, **plan: object) -> Tally:
    server = await asyncio.start_server(api.accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    made = Plan(**{"items": ["a", "b"], "users": "u", "urls": [f"http://127.0.0.1:{port}"], **plan})  # type: ignore[arg-type] # named by the tests below
    async with server:
        tally = await Crowd(made).run()
        await asyncio.gather(*api.buyers)
    return tally


async def test_what_waits_behind_a_stalled_answer_counts_from_when_it_was_due() -> None:
    api = Api(stalled=10)
    tally = await run(api, seconds=1.0, connections=1, rate=200.0)

    assert tally.requests == len(api.bodies) == 200
    # A hundred were due during the stall; the median of them waited half of it.
    assert tally.p95 >= STALL_SECONDS * 1000 * 0.5


async def test_a_closed_loop_counts_each_answer_and_has_every_buyer_come_once() -> None:
    api = Api()
    tally = await run(api, seconds=0.3, connections=4)

    assert 0 < tally.requests <= len(api.bodies)
    assert sum(tally.statuses.values()) == len(api.bodies)
    assert len(set(api.bodies)) == len(api.bodies)
    assert {b'"itemId":"a"' in body for body in api.bodies} == {True, False}


@pytest.mark.parametrize(
    ("percent", "value"), [(50, 50.0), (95, 95.0), (99, 99.0), (100, 100.0), (1, 1.0)]
)
def test_a_percentile_is_a_value_that_was_measured(percent: float, value: float) -> None:
    assert rank([float(number) for number in range(1, 101)], percent) == value


def test_nothing_has_no_percentile() -> None:
    assert rank([], 95) == 0.0
