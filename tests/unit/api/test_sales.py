"""How many reads may wait for Redis. Redis is a fake that never answers."""

import asyncio
from collections import Counter

from flashsale.inventory import Inventory, Look
from flashsale_api.engine import Engine
from flashsale_api.sales import MAX_READS, Sales

IDENTITY = "01a208bd-5117-7f0d-b8d8-000000000001"


class SilentInventory(Inventory):
    """Never answers, and counts the reads."""

    def __init__(self) -> None:
        """Has no client."""
        self.reads = 0

    async def look(
        self,
        item_id: str,  # noqa: ARG002 - never answers for any item
        reservation_id: str = "",  # noqa: ARG002
    ) -> Look:
        self.reads += 1
        await asyncio.Event().wait()
        raise AssertionError


async def test_reads_above_the_limit_are_refused_at_once_and_never_sent() -> None:
    inventory = SilentInventory()
    sales = Sales(inventory, Engine("flashsale"))
    answers: Counter[int] = Counter()
    handler = sales.handler(f"/sales/phone/reservations/{IDENTITY}".encode())
    assert handler is not None
    for _ in range(MAX_READS + 10):
        handler([], b"", lambda status, *_: answers.update([status]))
    assert answers == {503: 10}
    await asyncio.sleep(0)
    assert inventory.reads == MAX_READS
    for task in sales._tasks:
        task.cancel()
    await asyncio.gather(*sales._tasks, return_exceptions=True)
