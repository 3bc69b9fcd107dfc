"""`apply.lua` and `close.lua` on real servers: absolute, idempotent, and never an extra unit."""

import asyncio
import random
from dataclasses import replace

import pytest

from flashsale.inventory import Applied, Closed, Inventory
from flashsale.outbox import Outbox
from flashsale.reservations import Outcome
from flashsale.sale import Predecessor, Sale, SaleState
from tests.support.inventory import a_request, a_sale, answers, opened, outcome


async def the_sale(inventory: Inventory, item: str) -> Sale:
    return (await inventory.sales([item]))[item]


async def test_applying_again_changes_nothing(inventory: Inventory, item: str) -> None:
    spec = await opened(inventory, a_sale(item, 5))
    assert await outcome(inventory, item, a_request()) is Outcome.ACCEPTED
    before = await the_sale(inventory, item)
    for _ in range(3):
        assert await inventory.apply(spec, 1, seed_until_ms=2**53) is Applied.UNCHANGED
    assert await the_sale(inventory, item) == before


async def test_missing_keys_are_not_created_without_permission(
    inventory: Inventory, item: str
) -> None:
    assert await inventory.apply(a_sale(item), 1) is Applied.MISSING
    assert await outcome(inventory, item, a_request()) is Outcome.UNKNOWN


async def test_an_older_revision_is_refused(inventory: Inventory, item: str) -> None:
    spec = await opened(inventory, a_sale(item, 5))
    assert await inventory.apply(replace(spec, stock=9), 3) is Applied.CHANGED
    assert await inventory.apply(replace(spec, stock=7), 2) is Applied.STALE
    assert (await the_sale(inventory, item)).allocated == 9


async def test_a_restock_sells_the_difference(inventory: Inventory, item: str) -> None:
    spec = await opened(inventory, a_sale(item, 2))
    found = await answers(inventory, item, [a_request(f"u{n}") for n in range(3)])
    assert [answer.outcome for answer in found] == [Outcome.ACCEPTED] * 2 + [Outcome.SOLD_OUT]
    assert await inventory.apply(replace(spec, stock=3), 2) is Applied.CHANGED
    found = await answers(inventory, item, [a_request(f"v{n}") for n in range(2)])
    assert [answer.outcome for answer in found] == [Outcome.ACCEPTED, Outcome.SOLD_OUT]


async def test_allocated_is_not_lowered_below_the_taken_units(
    inventory: Inventory, item: str
) -> None:
    spec = await opened(inventory, a_sale(item, 10))
    await answers(inventory, item, [a_request(f"u{n}") for n in range(4)])
    assert await inventory.apply(replace(spec, stock=1), 2) is Applied.CHANGED
    sale = await the_sale(inventory, item)
    assert (sale.allocated, sale.available) == (4, 0)
    assert await outcome(inventory, item, a_request()) is Outcome.SOLD_OUT
    assert await inventory.apply(replace(spec, stock=1), 2) is Applied.UNCHANGED


async def test_applying_manifests_during_a_sale_creates_no_units(
    inventory: Inventory, item: str
) -> None:
    spec = await opened(inventory, a_sale(item, 20))
    chance = random.Random(item)
    crowd = [a_request(f"u{n}") for n in range(900)]
    sold: list[int] = []

    async def buy(start: int) -> None:
        for at in range(start, len(crowd), 6 * 15):
            found = await answers(inventory, item, crowd[at : at + 15])
            sold.append(sum(answer.outcome is Outcome.ACCEPTED for answer in found))

    async def edit() -> int:
        most = spec.stock
        for revision in range(2, 40):
            wanted = chance.randint(0, 60)
            await inventory.apply(
                replace(spec, stock=wanted, paused=chance.random() < 0.2),
                revision - chance.choice([0, 0, 0, 1]),
                seed_until_ms=2**53 if chance.random() < 0.5 else None,
            )
            sale = await the_sale(inventory, item)
            assert sale.taken <= sale.allocated
            most = max(most, sale.allocated)
        return most

    _, most = await asyncio.gather(asyncio.gather(*(buy(15 * n) for n in range(6))), edit())
    sale = await the_sale(inventory, item)
    assert sale.accepted == sum(sold) <= most


async def test_the_permission_to_seed_expires(inventory: Inventory, item: str) -> None:
    now_ms, _ = await inventory.server(item)
    assert await inventory.apply(a_sale(item), 1, seed_until_ms=now_ms - 1) is Applied.MISSING
    assert await inventory.apply(a_sale(item), 1, seed_until_ms=now_ms + 60_000) is Applied.SEEDED


async def test_a_paused_sale_accepts_nothing_until_it_is_resumed(
    inventory: Inventory, item: str
) -> None:
    spec = await opened(inventory, a_sale(item, 5))
    server = await inventory.server(item)
    assert await inventory.apply(replace(spec, paused=True), 2) is Applied.CHANGED
    assert await outcome(inventory, item, a_request()) is Outcome.PAUSED
    assert (await the_sale(inventory, item)).state(*server) is SaleState.PAUSED
    assert await inventory.apply(spec, 3) is Applied.CHANGED
    assert await outcome(inventory, item, a_request()) is Outcome.ACCEPTED


async def test_the_window_moves_with_the_manifest(inventory: Inventory, item: str) -> None:
    now_ms, run_id = await inventory.server(item)
    spec = await opened(inventory, a_sale(item, 5, starts_ms=now_ms + 3_600_000))
    assert (await the_sale(inventory, item)).state(now_ms, run_id) is SaleState.SCHEDULED
    assert await outcome(inventory, item, a_request()) is Outcome.NOT_OPEN
    await inventory.apply(replace(spec, starts_ms=now_ms - 1, ends_ms=now_ms + 3_600_000), 2)
    assert await outcome(inventory, item, a_request()) is Outcome.ACCEPTED
    await inventory.apply(replace(spec, starts_ms=None, ends_ms=now_ms - 1), 3)
    assert await outcome(inventory, item, a_request("bob")) is Outcome.ENDED


async def test_a_closed_sale_accepts_nothing_until_it_is_applied_again(
    inventory: Inventory, item: str
) -> None:
    spec = await opened(inventory, a_sale(item, 5, max_per_user=2))
    assert await outcome(inventory, item, a_request("ann", 2)) is Outcome.ACCEPTED
    assert await inventory.close(item, spec.sale_id, 2) is Closed.CLOSED
    assert await inventory.close(item, spec.sale_id, 2) is Closed.UNCHANGED
    assert await outcome(inventory, item, a_request("bob")) is Outcome.ENDED
    assert await inventory.apply(spec, 1) is Applied.STALE
    assert await inventory.apply(spec, 3) is Applied.CHANGED
    # It is the same sale, with the same buyers and counts.
    assert await outcome(inventory, item, a_request("ann")) is Outcome.LIMIT_REACHED
    assert (await the_sale(inventory, item)).available == 3


async def test_closing_does_not_change_another_sale_or_a_newer_revision(
    inventory: Inventory, item: str
) -> None:
    spec = await opened(inventory, a_sale(item, 5))
    assert await inventory.close(item, "default/other", 9) is Closed.UNKNOWN
    assert await inventory.close("absent-item", spec.sale_id, 9) is Closed.UNKNOWN
    await inventory.apply(spec, 5)
    assert await inventory.close(item, spec.sale_id, 4) is Closed.STALE
    assert await outcome(inventory, item, a_request()) is Outcome.ACCEPTED


async def test_another_sale_replaces_only_a_finished_and_recorded_sale(
    inventory: Inventory, outbox: Outbox, item: str
) -> None:
    first = await opened(inventory, a_sale(item, 5))
    second = replace(first, sale_id="default/second", stock=7)
    bought = a_request()
    [answer] = await answers(inventory, item, [bought])

    async def take(recorded: int) -> Applied:
        replaced = Predecessor(first.sale_id, recorded)
        return await inventory.apply(second, 1, seed_until_ms=2**53, replaces=replaced)

    assert await take(1) is Applied.CONFLICT  # selling
    await inventory.close(item, first.sale_id, 2)
    assert await take(1) is Applied.CONFLICT  # not drained
    await outbox.settle(item, [(answer.detail, bought.reservation_id, 1)])
    assert await take(0) is Applied.CONFLICT  # not recorded
    assert (
        await inventory.apply(second, 1, seed_until_ms=2**53) is Applied.CONFLICT
    )  # not permitted
    assert await take(1) is Applied.SEEDED
    sale = await the_sale(inventory, item)
    assert (sale.sale_id, sale.accepted, sale.available) == ("default/second", 0, 7)
    assert (await inventory.look(item, bought.reservation_id)).record is None
    assert await inventory.apply(first, 9, seed_until_ms=2**53) is Applied.CONFLICT


@pytest.mark.parametrize("stock_wanted", [0, 1, 100_000_000])
async def test_the_smallest_and_largest_stocks_can_be_applied(
    inventory: Inventory, item: str, stock_wanted: int
) -> None:
    await opened(inventory, a_sale(item, stock_wanted))
    assert (await the_sale(inventory, item)).available == stock_wanted


async def test_a_display_name_can_contain_any_text(inventory: Inventory, item: str) -> None:
    await opened(inventory, a_sale(item, display_name="Ein 📱, „neu“\nund gut"))
    assert (await the_sale(inventory, item)).display_name == "Ein 📱, „neu“\nund gut"
