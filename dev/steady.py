"""A steady stream of buyers with holds for hours. Each one comes back until it is served."""

import asyncio
import json
import random
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from dev.crowd import Client, order_request, reserve_request

CONFIRMED: Final = 0.6
"""The share of buyers who pay. The holds of the others expire."""
REQUESTS_PER_BUYER: Final = 1 + CONFIRMED
PAYING_SECONDS: Final = 1.0
PATIENCE_SECONDS: Final = 10.0
SERVED_SECONDS: Final = 120.0
"""A buyer who is not served for so long has failed."""
_AGAIN_SECONDS: Final = (0.2, 1.0)
TICK_SECONDS: Final = 0.005
CONNECTIONS: Final = 400
"""Requests in flight to the buyers' ports, and as many to the order ports. Others wait."""
_SAMPLES: Final = 200_000


@dataclass
class Counts:
    """The results so far."""

    answers: Counter[str] = field(default_factory=Counter)
    """By request and status. 0 is a missing answer."""
    failures: Counter[str] = field(default_factory=Counter)
    """Requests that were refused, or not served in the end."""
    served: Counter[str] = field(default_factory=Counter)
    """Requests that were served in the end."""
    repeated: int = 0
    slowest_seconds: float = 0.0
    """The longest time until a request was served, with its repetitions."""
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    """Seconds per answer of the last requests."""
    promised: dict[str, set[str]] = field(default_factory=dict)
    """The ids of the reservations that were answered 202, by item."""
    confirmed: dict[str, set[str]] = field(default_factory=dict)
    """The ids of the confirmations that were answered 200, by item."""


class Addressed:
    """Connections to several processes. As behind a Service, each request goes to any of them."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls
        self._free: dict[str, deque[Client]] = {url: deque() for url in urls}
        self._places = asyncio.Semaphore(CONNECTIONS)

    async def send(self, request: bytes) -> tuple[int, dict[str, object]]:
        """Send a request. If one process does not answer, the next one gets it.

        The request is safe to repeat, because it has a key or an order.
        """
        first = random.randrange(len(self._urls))
        status, body = 0, dict[str, object]()
        async with self._places:
            for url in (*self._urls[first:], *self._urls[:first]):
                free = self._free[url]
                client = free.popleft() if free else Client(url)
                try:
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        status, body = await client.request(request)
                except TimeoutError:
                    status = 0
                free.append(client)
                if status:
                    break
        return status, body

    def close(self) -> None:
        for clients in self._free.values():
            for client in clients:
                client.close()


class Buyers:
    """Buyers who arrive at a constant rate, reserve one unit each, and pay or leave."""

    def __init__(
        self,
        urls: Sequence[str],
        order_urls: Sequence[str],
        token: str,
        item: Callable[[], str],
        rate: float,
    ) -> None:
        """`rate` is in requests per second without repetitions. `item` returns the sale now."""
        self.counts = Counts()
        self._api, self._orders = Addressed(urls), Addressed(order_urls)
        self._token = token
        self._item = item
        self._rate = rate / REQUESTS_PER_BUYER

    async def run(self, seconds: float) -> None:
        """Let buyers arrive for so long, and return once each is served or has failed."""
        began, arrived, count = time.monotonic(), 0, int(seconds * self._rate)
        async with asyncio.TaskGroup() as buyers:
            while arrived < count:
                due = int((time.monotonic() - began) * self._rate)
                for _ in range(min(due, count) - arrived):
                    arrived += 1
                    buyers.create_task(self._buy(f"buyer-{arrived}"))
                await asyncio.sleep(TICK_SECONDS)
        self._api.close()
        self._orders.close()

    async def _buy(self, user: str) -> None:
        item = self._item()
        body = json.dumps({"userId": user, "itemId": item, "quantity": 1}).encode()
        answer = await self._insist("reserve", 202, self._api, reserve_request(body, user))
        if answer is None:
            return
        identity = str(answer["reservationId"])
        self.counts.promised.setdefault(item, set()).add(identity)
        if random.random() >= CONFIRMED:
            return
        await asyncio.sleep(random.uniform(0, 2 * PAYING_SECONDS))
        path = f"/sales/{item}/reservations/{identity}/confirm"
        order = json.dumps({"orderRef": f"order-{uuid.uuid4()}"}).encode()
        request = order_request(path, order, self._token)
        if await self._insist("confirm", 200, self._orders, request) is not None:
            self.counts.confirmed.setdefault(item, set()).add(identity)

    async def _insist(
        self, name: str, wanted: int, to: Addressed, request: bytes
    ) -> dict[str, object] | None:
        """Repeat a request until it is served. Returns None if it is refused, or after a while."""
        counts, began = self.counts, time.monotonic()
        while True:
            sent = time.monotonic()
            status, body = await to.send(request)
            now = time.monotonic()
            counts.latencies.append(now - sent)
            kind = str(body.get("type", "")).rpartition(":")[2]
            counts.answers[f"{name}: {status} {kind}".rstrip()] += 1
            if status == wanted:
                counts.served[name] += 1
                counts.slowest_seconds = max(counts.slowest_seconds, now - began)
                return body
            # 202 of a confirmation means that Kafka has not acknowledged it yet.
            if status not in (0, 202, 503) or now - began > SERVED_SECONDS:
                counts.failures[f"{name}: {status} {kind}".rstrip()] += 1
                return None
            counts.repeated += 1
            await asyncio.sleep(random.uniform(*_AGAIN_SECONDS))
