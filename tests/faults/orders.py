"""The shop of a sale with holds: it confirms and cancels, and keeps a journal of every answer."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dev.crowd import Client, order_request

PAID: Final = 0.6
CANCELLED: Final = 0.15
"""The shares of reservations that are paid and that the shop cancels. The rest is abandoned."""
OTHER_ORDER: Final = 0.05
"""The share of confirmations that a second order races."""
PATIENCE_SECONDS: Final = 5.0
REPAIRED_SECONDS: Final = 60.0
"""How long a call may stay unanswered after everything was repaired."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the order service and its last answer. Times are in Unix seconds.

    `status` is 0 if there was no answer, and `kind` is the problem's kind.
    """

    reservation_id: str
    verb: str
    order_ref: str
    sent: float
    received: float
    status: int
    kind: str
    tries: int

    def line(self, began: float) -> str:
        """Return the call as one line of text, with seconds since `began`."""
        return (
            f"{self.sent - began:8.3f} to {self.received - began:8.3f} s  {self.verb} "
            f"{self.reservation_id} {self.order_ref}: {self.status} {self.kind}, "
            f"{self.tries} tries"
        )


class Shop:
    """Decides about each reservation, and insists until its calls are answered."""

    def __init__(
        self, urls: Sequence[str], token: str, item: str, *, seed: int, deleted: bool
    ) -> None:
        """`deleted`: the sale is deleted and applied again. It can be unknown in between."""
        self._deleted = deleted
        self._urls = urls
        self._token = token
        self._item = item
        self._chance = random.Random(seed)
        self._stopped: float | None = None
        self._working: set[asyncio.Task[None]] = set()
        self.journal: list[Call] = []

    def take(self, reservation_id: str) -> None:
        """Pay for a reservation, cancel it, or abandon it."""
        share = self._chance.random()
        order_ref = f"order-{reservation_id[:13]}"
        if share < PAID:
            self._start(reservation_id, "confirm", order_ref)
            if self._chance.random() < OTHER_ORDER:
                self._start(reservation_id, "confirm", f"other-{reservation_id[:13]}")
        elif share < PAID + CANCELLED:
            self._start(reservation_id, "cancel", order_ref)

    async def close(self) -> None:
        """Take nothing more, and return once every call is answered or given up."""
        self._stopped = time.monotonic()
        while self._working:
            await asyncio.gather(*self._working)

    def _start(self, reservation_id: str, verb: str, order_ref: str) -> None:
        task = asyncio.create_task(self._insist(reservation_id, verb, order_ref))
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _insist(self, reservation_id: str, verb: str, order_ref: str) -> None:
        await asyncio.sleep(self._chance.uniform(0.0, 1.0))
        path = f"/sales/{self._item}/reservations/{reservation_id}/{verb}"
        request = order_request(path, json.dumps({"orderRef": order_ref}).encode(), self._token)
        sent, tries = time.time(), 0
        while True:
            tries += 1
            status, kind = await self._send(request)
            unknown = status == 404 and (not self._deleted or self._repaired(0.0))
            if status in (200, 409) or unknown or self._repaired(REPAIRED_SECONDS):
                break
            await asyncio.sleep(self._chance.uniform(0.05, 0.5))
        self.journal.append(
            Call(reservation_id, verb, order_ref, sent, time.time(), status, kind, tries)
        )

    async def _send(self, request: bytes) -> tuple[int, str]:
        client = Client(self._chance.choice(self._urls))
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                status, body = await client.request(request)
        except TimeoutError:
            return 0, "no answer"
        finally:
            client.close()
        return status, str(body.get("type") or body.get("state") or "").rpartition(":")[2]

    def _repaired(self, seconds: float) -> bool:
        """Whether everything was repaired at least so long ago."""
        return self._stopped is not None and time.monotonic() > self._stopped + seconds
