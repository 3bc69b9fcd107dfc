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
    """Those of made-up items have a limit of their own, and take no reads of sales away."""
    inventory, engine = SilentInventory(), Engine("flashsale")
    engine.items.note("phone")
    sales = Sales(inventory, engine)
    answers: Counter[int] = Counter()
    for item in ("made-up", "phone"):
        handler = sales.handler(f"/sales/{item}/reservations/{IDENTITY}".encode())
        assert handler is not None
        for _ in range(MAX_READS + 10):
            handler([], b"", lambda status, *_: answers.update([status]))
    assert answers == {503: 20}
    await asyncio.sleep(0)
    assert inventory.reads == 2 * MAX_READS
    for task in sales._tasks:
        task.cancel()
    await asyncio.gather(*sales._tasks, return_exceptions=True)
