"""`python -m bench.path`: measure the CPU time of each part of a request, in one process.

There are no sockets, and the result is the minimum of many tries, so the kernel and a busy machine
do not disturb it. Reads FLASHSALE_REDIS_URL for the client's part of a script call. Prints `Parts`
as JSON.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, cast

import msgspec
import uvicorn
import uvloop
from aiokafka.producer.message_accumulator import BatchBuilder
from starlette.applications import Starlette
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from bench.baseline import app as baseline
from bench.results import Parts
from bench.unbounded import UnboundedBatcher, UnboundedProtocol
from dev.issuer import AUDIENCE, Issuer
from flashsale import events, redis_client
from flashsale.events import Event
from flashsale.inventory import Inventory, ItemReply
from flashsale.outbox import Outbox
from flashsale.reservations import (
    Answer,
    BatchReply,
    OutboxEntry,
    Outcome,
    Record,
    Request,
    Snapshot,
    State,
)
from flashsale.tracing import Tracing
from flashsale_api.app import Application
from flashsale_api.authentication import Authentication, GatewayHeader
from flashsale_api.batcher import Batcher, Decision
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.protocol import HttpProtocol
from flashsale_api.publisher import Publisher
from flashsale_api.reserve import Reserve
from flashsale_api.sales import Sales
from flashsale_api.spans import Spans
from flashsale_api.tokens import ALGORITHMS, Keys, Tokens

CONNECTIONS: Final = 32
"""Requests in flight, and therefore in a batch."""

_HEADER: Final = "a gateway's header"
_KNOWN: Final = "a token that the pod has verified before"
_NEW: Final = "a new {} token"

_TRIES: Final = 200
_SLOW_TRIES: Final = 20
_SOLD_OUT: Final = Decision(Outcome.SOLD_OUT)
_SALE: Final = Snapshot("default/bench", 100, 100, 1)
_ID: Final = "00000000-0000-7000-8000-000000000000"
_BODY: Final = b'{"userId":"u1-000000001","itemId":"bench","quantity":1}'
_ANONYMOUS: Final = b'{"itemId":"bench","quantity":1}'


def _request(body: bytes = _BODY, header: str = "") -> bytes:
    """Returns the bytes of a request. `header` is a further line."""
    return (
        b"POST /reserve HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n%b"
        b"Content-Length: %d\r\n\r\n%b"
    ) % (f"{header}\r\n".encode() if header else b"", len(body), body)


_REQUESTS: Final = (_request(),) * CONNECTIONS


class _Transport(asyncio.Transport):
    """Counts the written bytes, and keeps only the first."""

    def __init__(self) -> None:
        super().__init__()
        self.wrote = 0
        self.first: bytes | bytearray | memoryview = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.wrote += len(data)
        self.first = self.first or data

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Does nothing."""

    def pause_reading(self) -> None:
        """Does nothing."""

    def resume_reading(self) -> None:
        """Does nothing."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Does nothing."""

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("127.0.0.1", 1) if name in {"sockname", "peername"} else default


class _AcceptingInventory(Inventory):
    """Accepts every request at once, without Redis."""

    items_per_call = 1

    def __init__(self) -> None:
        """Has no client."""

    def node_of(self, item_id: str) -> str:  # noqa: ARG002 - there is one node
        return ""

    async def reserve_all(
        self, batches: Sequence[tuple[str, Sequence[Request]]], **_: object
    ) -> list[ItemReply]:
        await asyncio.sleep(0)
        answer = Answer(Outcome.ACCEPTED, "1795561067887-0")
        return [
            BatchReply(1795561067887, _SALE, 50, 0, 1, 0, 0, [answer] * len(requests))
            for _, requests in batches
        ]


class _Nowhere(Publisher):
    def __init__(self) -> None:
        """Has no producer."""
        self._held = set()

    def add(self, entry: OutboxEntry) -> None:
        """Publishes nothing."""


class _SoldOut(Batcher):
    def sold_out(self, item_id: str) -> Decision:  # noqa: ARG002 - every item is sold out
        return _SOLD_OUT


class _Unmeasured:
    """Stands for the metrics, an item's metrics and a counter, and does nothing."""

    def __call__(self, item_id: str) -> "_Unmeasured":  # noqa: ARG002 - one object for all
        return self

    def __getattr__(self, name: str) -> "_Unmeasured":
        return self

    def __getitem__(self, name: str) -> "_Unmeasured":
        return self

    def outcomes(self, item_id: str) -> "_Unmeasured":  # noqa: ARG002 - one object for all
        return self

    def add_item(self, item_id: str) -> None:
        """Does nothing."""

    def inc(self) -> None:
        """Does nothing."""

    def observe(self, value: float) -> None:
        """Does nothing."""

    def set(self, value: float) -> None:
        """Does nothing."""

    def labels(self, item_id: str) -> "_Unmeasured":  # noqa: ARG002 - one object for all
        return self


def _app(
    batcher: type[Batcher],
    metrics: Metrics | None = None,
    spans: Spans | None = None,
    authentication: Authentication | None = None,
) -> ASGIApp:
    metrics = metrics or Metrics()
    engine = Engine("flashsale")
    decided = batcher(_AcceptingInventory(), _Nowhere(), metrics, engine, spans=spans)
    reserve = Reserve(decided, metrics, spans, authentication)

    return Application(reserve, Sales(_AcceptingInventory(), Engine("flashsale")), Starlette())


async def _path(
    app: ASGIApp,
    requests: Sequence[bytes] = _REQUESTS,
    *,
    protocol: type[HttpProtocol] = HttpProtocol,
    before: Callable[[], None] | None = None,
    tries: int = _TRIES,
) -> float:
    """Returns the CPU microseconds from the bytes of a request to the bytes of its answer.

    `before` is called before each turn, in which every connection sends its request.
    """
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    config.load()
    state = ServerState()
    state.default_headers = [(b"date", b"Tue, 24 Nov 2026 23:00:00 GMT")]
    transports = [_Transport() for _ in range(CONNECTIONS)]
    connections = []
    for transport in transports:
        connection = protocol(config=config, server_state=state, app_state={})
        connection.connection_made(transport)
        connections.append(connection)

    async def turn() -> None:
        if before is not None:
            before()
        wrote = [transport.wrote for transport in transports]
        for connection, request in zip(connections, requests, strict=True):
            connection.data_received(request)
        while any(t.wrote == w for t, w in zip(transports, wrote, strict=True)):
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    found = await _least(turn, tries) / CONNECTIONS
    statuses = {bytes(transport.first[9:12]) for transport in transports}
    if statuses - {b"202", b"409"}:
        raise RuntimeError(f"the measured requests were answered {statuses}")
    return found


async def _identity() -> dict[str, float]:
    """Returns the CPU microseconds of an accepted request by the source of its user."""
    by_header = [_request(_ANONYMOUS, "X-User-Id: u1-000000001")] * CONNECTIONS
    header = GatewayHeader("X-User-Id")
    found = {_HEADER: await _path(_app(Batcher, authentication=header), by_header)}
    with Issuer() as issuer:
        keys = Keys(issuer.settings["FLASHSALE_JWKS_URL"], Metrics())
        tokens = Tokens(keys, issuer.url, AUDIENCE)
        refreshing = asyncio.create_task(keys.run())
        while keys.problem:
            await asyncio.sleep(0.01)
        app = _app(Batcher, authentication=tokens)
        for algorithm in ALGORITHMS:
            by_token = [
                _request(
                    _ANONYMOUS, f"Authorization: Bearer {issuer.token(f'u1-{number}', algorithm)}"
                )
                for number in range(CONNECTIONS)
            ]
            if _KNOWN not in found:
                found[_KNOWN] = await _path(app, by_token)
            found[_NEW.format(algorithm)] = await _path(
                app, by_token, before=tokens.forget, tries=_SLOW_TRIES
            )
        refreshing.cancel()
    return found


async def _least(turn: Callable[[], Awaitable[object]], tries: int = _TRIES) -> float:
    """Returns the minimum of many tries, in CPU microseconds."""
    least = float("inf")
    for _ in range(tries):
        begun = time.process_time()
        for _ in range(4):
            await turn()
        least = min(least, time.process_time() - begun)
    return least / 4 * 1e6


async def parts(redis_url: str) -> Parts:
    """Measures all parts. Redis does not need a sale."""
    server = await _path(baseline)
    accepted = await _path(_app(Batcher))
    unmeasured = await _path(_app(Batcher, cast("Metrics", _Unmeasured())))
    tracing = Spans(Tracing("bench", {"OTEL_TRACES_SAMPLER_ARG": "0"}))
    untraced = await _path(_app(Batcher, spans=tracing))
    client = redis_client.connect(redis_url)
    inventory, outbox = Inventory(client), Outbox(client)
    requests = [Request(_ID, "u1-000000001", 1)] * CONNECTIONS
    acknowledged = [(f"1795561067887-{number}", _ID, 1) for number in range(CONNECTIONS)]
    record = Record(State.CONFIRMED, 1, 1, 1795561067887, "u1-000000001", "")

    async def publish() -> None:
        batch = BatchBuilder(256 * 1024, 0, is_transactional=0)
        for _ in range(CONNECTIONS):
            batch.append(
                timestamp=record.accepted_ms,
                key=_ID.encode(),
                value=events.encode(Event.of("bench", _ID, record, _SALE)),
                headers=events.headers(""),
            )
        batch.close()

    try:
        return Parts(
            server=server,
            refused=await _path(_app(_SoldOut)),
            accepted=accepted,
            script=await _least(
                lambda: inventory.reserve("bench-path", requests, timeout_seconds=5)
            )
            / CONNECTIONS,
            event=await _least(publish) / CONNECTIONS,
            settled=await _least(lambda: outbox.settle("bench-path", acknowledged)) / CONNECTIONS,
            metrics=accepted - unmeasured,
            untraced=untraced - accepted,
            bounds=accepted - await _path(_app(UnboundedBatcher), protocol=UnboundedProtocol),
            identity={name: spent - accepted for name, spent in (await _identity()).items()},
        )
    finally:
        await client.aclose()


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m bench.path",
        description="Measure parts of a request in one process, and print their seconds as JSON. "
        "FLASHSALE_REDIS_URL names the Redis, such as the one of .local/env.",
    ).parse_args()
    if not (redis_url := os.environ.get("FLASHSALE_REDIS_URL")):
        sys.exit("FLASHSALE_REDIS_URL is not set: expected redis://host:port/db, as in .local/env")
    found = uvloop.run(parts(redis_url))
    sys.stdout.buffer.write(msgspec.json.encode(found))
