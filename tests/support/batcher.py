"""Fakes of the batcher's neighbours."""

import asyncio
from collections.abc import Sequence

from flashsale.errors import RedisUnavailable
from flashsale.inventory import Inventory
from flashsale.reservations import Answer, BatchReply, Outcome, Request, Snapshot
from flashsale_api.publisher import Accepted, Publisher


class HeldInventory(Inventory):
    """Records the script calls, and answers one call per `go.release()`.

    Each request of a call gets `outcome`. If `fail` is set, the reply is lost.
    """

    def __init__(self) -> None:
        self.calls: list[Sequence[Request]] = []
        self.answered = 0
        self.go = asyncio.Semaphore(0)
        self.outcome = Outcome.ACCEPTED
        self.available = 1
        self.fail = False

    async def reserve(
        self,
        item_id: str,  # noqa: ARG002 - every item has a sale
        requests: Sequence[Request],
        **_: object,
    ) -> BatchReply:
        self.calls.append(requests)
        await self.go.acquire()
        self.answered += 1
        if self.fail:
            raise RedisUnavailable("cut", maybe_executed=True)
        return BatchReply(
            now_ms=1,
            snapshot=Snapshot("default/x", 1, 1, 1),
            available=self.available,
            outbox_length=0,
            starts_ms=0,
            version=1,
            hold_ms=0,
            held=0,
            answers=[Answer(self.outcome, "1-1") for _ in requests],
        )


class RecordingPublisher(Publisher):
    """Records the reservations that it is given, and publishes nothing."""

    def __init__(self) -> None:
        self.added: list[Accepted] = []

    def add(self, accepted: Accepted) -> None:
        self.added.append(accepted)
