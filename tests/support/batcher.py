"""Fakes of the batcher's neighbours, and requests to it."""

import asyncio
from collections.abc import Sequence
from typing import Final

from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.inventory import Inventory, ItemReply
from flashsale.reservations import Answer, BatchReply, OutboxEntry, Outcome, Request, Snapshot
from flashsale_api.batcher import Batcher, Decision
from flashsale_api.publisher import Publisher

NEVER_SECONDS: Final = 600.0
"""A time that no test waits."""


class HeldInventory(Inventory):
    """Records the script calls, and answers one call per `go.release()`.

    Each request of a call gets `outcome`, but the items in `errors` an error. If `fail` is set,
    the reply is lost.
    """

    items_per_call = 1

    def __init__(self) -> None:
        self.items_of_calls: list[list[str]] = []
        self.errors: dict[str, RedisUnavailable | ContractViolation] = {}
        self.calls: list[Sequence[Request]] = []
        self.answered = 0
        self.go = asyncio.Semaphore(0)
        self.outcome = Outcome.ACCEPTED
        self.available = 1
        self.fail = False

    def node_of(self, item_id: str) -> str:
        """The part of the item in front of a dot, as in `node.item`."""
        return item_id.rpartition(".")[0]

    async def reserve_all(
        self, batches: Sequence[tuple[str, Sequence[Request]]], **_: object
    ) -> list[ItemReply]:
        self.calls.append([request for _, requests in batches for request in requests])
        self.items_of_calls.append([item_id for item_id, _ in batches])
        await self.go.acquire()
        self.answered += 1
        if self.fail:
            raise RedisUnavailable("cut", maybe_executed=True)
        return [self.errors.get(item_id) or self._reply(requests) for item_id, requests in batches]

    def _reply(self, requests: Sequence[Request]) -> BatchReply:
        return BatchReply(
            now_ms=1,
            snapshot=Snapshot("default/x", 1, 1, 1),
            available=self.available,
            starts_ms=0,
            version=1,
            hold_ms=0,
            held=0,
            answers=[Answer(self.outcome, "1-1") for _ in requests],
        )


class RecordingPublisher(Publisher):
    """Records the reservations that it is given, and publishes nothing."""

    def __init__(self) -> None:
        self.added: list[OutboxEntry] = []
        self._held = set()

    def add(self, entry: OutboxEntry) -> None:
        self.added.append(entry)


def a_request(number: int = 0) -> Request:
    return Request(f"id-{number}", f"user-{number}", 1)


def decide(batcher: Batcher, item_id: str, request: Request) -> "asyncio.Future[Decision]":
    future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

    def decided(decision: Decision) -> None:
        if not future.done():  # the buyer has disconnected
            future.set_result(decision)

    batcher.decide(item_id, request, decided)
    return future


async def turns(number: int = 5) -> None:
    """Let the event loop run for a few turns."""
    for _ in range(number):
        await asyncio.sleep(0)
