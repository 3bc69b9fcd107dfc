"""`settle.lua`, the outbox and the pages of reservations on real servers."""

import uuid

import pytest

from flashsale.errors import ContractViolation
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale.reservations import Record, Request, Snapshot
from tests.support.inventory import a_request, a_sale, answers, opened


async def test_an_outbox_entry_contains_the_whole_event(
    inventory: Inventory, outbox: Outbox, item: str
) -> None:
    await opened(inventory, a_sale(item, 7, max_per_user=2))
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    request = Request(str(uuid.uuid4()), "ann", 2, "k", trace)
    [answer] = await answers(inventory, item, [request])
    until_ms = (await inventory.server()).now_ms + 1
    [entry] = await outbox.page(item, until_ms=until_ms, count=10)
    assert (entry.entry_id, entry.reservation_id) == (answer.detail, request.reservation_id)
    assert entry.record == Record("accepted", 1, 2, entry.record.occurred_ms, "ann", "k")
    assert entry.snapshot == Snapshot(f"default/{item}", 7, 7, 1)
    assert entry.traceparent == trace


async def test_settle_keeps_an_entry_of_another_reservation(
    inventory: Inventory, outbox: Outbox, item: str
) -> None:
    await opened(inventory, a_sale(item))
    mine, other = a_request("ann"), a_request("bob")
    [first, second] = await answers(inventory, item, [mine, other])
    assert await outbox.settle(item, [(first.detail, other.reservation_id)]) == 0
    assert await outbox.settle(item, [(first.detail, mine.reservation_id)] * 2) == 1
    assert await outbox.settle(item, [(first.detail, mine.reservation_id)]) == 0
    assert (await inventory.sales([item]))[item].outbox_length == 1
    page = await outbox.page(item, until_ms=2**50, count=9)
    assert [entry.entry_id for entry in page] == [second.detail]


async def test_the_pages_of_reservations_contain_each_reservation(
    inventory: Inventory, item: str
) -> None:
    await opened(inventory, a_sale(item, 10_000))
    requests = [a_request(f"user-{number}") for number in range(8 * 128)]
    for start in range(0, len(requests), 128):
        await answers(inventory, item, requests[start : start + 128])
    pages = [page async for page in inventory.reservation_pages(item, count=100)]
    assert len(pages) > 1
    found = {own_id: record.user_id for _, page in pages for own_id, record in page}
    assert found == {request.reservation_id: request.user_id for request in requests}


async def test_an_item_without_a_sale_has_no_reservations(inventory: Inventory, item: str) -> None:
    with pytest.raises(ContractViolation, match="has no sale of this item"):
        await anext(inventory.reservation_pages(item))
