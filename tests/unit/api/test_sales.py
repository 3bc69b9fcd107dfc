"""How many reads may wait for Redis, which never answers here, and the held units of a sale."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping

import pytest

from flashsale.errors import RedisUnavailable
from flashsale.inventory import Holds, Inventory, Look
from flashsale.sale import SaleState
from flashsale_api.engine import Engine
from flashsale_api.sales import FRESH_SECONDS, MAX_READS, STALE_SECONDS, Sales, _view
from tests.support.observations import SERVER, a_sale

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


class SellingInventory(Inventory):
    """Sells a unit between two looks, until it is away."""

    def __init__(self) -> None:
        """Has no client."""
        self.sold, self.away = 0, False

    async def look(
        self,
        item_id: str,  # noqa: ARG002 - there is one sale
        reservation_id: str = "",  # noqa: ARG002
    ) -> Look:
        if self.away:
            raise RedisUnavailable("away", maybe_executed=False)
        self.sold += 1
        return Look(a_sale(accepted=self.sold), None, SERVER)

    async def holds(self, now_ms: Mapping[str, int]) -> dict[str, Holds]:  # noqa: ARG002
        return {}


async def test_an_answer_is_renewed_after_a_second_and_kept_for_three(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, passed = asyncio.get_running_loop(), 0.0
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + passed)
    inventory = SellingInventory()
    handler = Sales(inventory, Engine("flashsale")).handler(b"/sales/phone")
    assert handler is not None

    async def available() -> int | None:
        answers: list[tuple[int, bytes]] = []
        handler([], b"", lambda status, _, body: answers.append((status, body)))
        for _ in range(10):
            await asyncio.sleep(0)
        [(status, body)] = answers
        return json.loads(body)["available"] if status == 200 else None

    assert await available() == 99
    passed += FRESH_SECONDS
    assert [await available(), await available()] == [99, 98]
    inventory.away = True
    passed += FRESH_SECONDS
    assert await available() == 98
    passed += STALE_SECONDS - FRESH_SECONDS
    assert await available() is None


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


def test_holds_are_shown_until_the_last_one_ends() -> None:
    """A sale can lose its holds while some are open."""
    for hold_ms, held, shown in ((0, 0, None), (0, 2, 2), (600_000, 0, 0), (600_000, 2, 2)):
        sale = a_sale(accepted=held, held=held, hold_ms=hold_ms)
        assert _view(sale, SaleState.SELLING, 0).held == shown
        assert _view(sale, SaleState.FENCED, 0).held is None
