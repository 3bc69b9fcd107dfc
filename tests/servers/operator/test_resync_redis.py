"""A resync in Redis: it frees keys, completes the index, and rebuilds or closes finished sales."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace

import pytest

from dev.stack.servers import RedisServer
from flashsale import keys
from flashsale.errors import LedgerUnavailable
from flashsale.inventory import Freed
from flashsale.keys import DEFAULT_ENGINE, ItemKeys
from flashsale.ledger import SaleRow
from flashsale.reservations import Outcome, Transition
from flashsale.sale import SaleSpec, SaleState
from flashsale_operator.sales.decision import Reason, needs_rebuild
from flashsale_operator.sales.offsets import Span
from tests.support.eventually import until
from tests.support.fake_kube import resync_of
from tests.support.simulated_shop import QUICK, SimulatedShop


async def test_keys_are_freed_after_everything_is_recorded(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    async def free() -> Freed:
        row = await shop.row(spec.sale_id)
        return await shop.inventory.free(
            spec.item_id, spec.sale_id, row.revision, accepted=row.accepted, released=row.released
        )

    assert await free_unknown(shop, spec) is Freed.UNKNOWN
    await shop.apply(spec)
    assert await shop.buy(spec.item_id, "ada") == [Outcome.ACCEPTED]
    assert await free() is Freed.OPEN
    await shop.reconciler.close(spec.sale_id)
    assert await free() is Freed.UNRECORDED
    await shop.record(spec.item_id)
    assert (
        await shop.inventory.free(spec.item_id, "other/sale", 2, accepted=1, released=0)
        is Freed.UNKNOWN
    )
    assert (
        await shop.inventory.free(spec.item_id, spec.sale_id, 1, accepted=1, released=0)
        is Freed.OPEN
    )
    assert (
        await shop.inventory.free(spec.item_id, spec.sale_id, 2, accepted=0, released=0)
        is Freed.UNRECORDED
    )
    assert spec.item_id in await shop.inventory.index.items()
    assert await free() is Freed.FREED
    assert await shop.redis.exists(*ItemKeys.of(spec.item_id).sold) == 0
    assert not await shop.redis.sismember(keys.items(DEFAULT_ENGINE), spec.item_id)
    assert await free() is Freed.UNKNOWN


async def free_unknown(shop: SimulatedShop, spec: SaleSpec) -> Freed:
    return await shop.inventory.free(spec.item_id, spec.sale_id, 1, accepted=0, released=0)


async def test_keys_are_not_freed_while_the_outbox_has_events(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "ada")
    await shop.reconciler.close(spec.sale_id)
    assert (
        await shop.inventory.free(spec.item_id, spec.sale_id, 2, accepted=1, released=0)
        is Freed.UNRECORDED
    )
    assert await shop.redis.xlen(ItemKeys.of(spec.item_id).outbox) == 1


async def test_the_index_has_the_items_that_have_keys_or_should_have_them(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """An API pod takes an item of the index that has no keys for a lost one."""
    index, own = keys.items(DEFAULT_ENGINE), resync_of(shop)
    await shop.apply(spec)
    await shop.redis.delete(index)
    await own.resync()
    assert await shop.redis.smembers(index) == {spec.item_id}
    await shop.redis.flushall()
    await own.resync()
    assert await shop.redis.smembers(index) == {spec.item_id}, "the sale is lost"
    await shop.apply(spec)
    await shop.reconciler.close(spec.sale_id)
    await shop.redis.delete(index)
    await own.resync()
    assert await shop.redis.smembers(index) == {spec.item_id}, "its keys are not freed yet"
    await shop.redis.delete(*ItemKeys.of(spec.item_id).sold)
    await own.resync()
    assert await shop.redis.smembers(index) == set()


@pytest.mark.parametrize("lost", ["before", "after the look at the claim", "before the claim"])
@pytest.mark.parametrize("closes", [False, True])
async def test_redis_is_not_claimed_before_lost_items_are_in_its_index(
    shop: SimulatedShop,
    spec: SaleSpec,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
    closes: bool,
) -> None:
    """A pod that starts in between would take a lost item for an unknown one."""
    second = SaleSpec("default/other", f"{spec.item_id}-2", 5)
    for each in (spec, second):
        await shop.apply(each)
    index = shop.inventory.index
    claimed, claim = index.claimed, index.claim

    async def lose_after_look(engine_id: str) -> bool:
        found = await claimed(engine_id)
        await shop.redis.flushall()
        return found

    async def lose_before_claim(engine_id: str, item_ids: Iterable[str] = ()) -> None:
        await shop.redis.flushall()
        await claim(engine_id, item_ids)

    if lost == "after the look at the claim":
        monkeypatch.setattr(index, "claimed", lose_after_look)
    else:
        await shop.redis.flushall()
    if lost == "before the claim":
        monkeypatch.setattr(index, "claim", lose_before_claim)
    await (shop.reconciler.close(second.sale_id) if closes else shop.apply(second))
    items, is_claimed = await index.read()
    assert spec.item_id in items or not is_claimed


async def test_an_ended_sale_of_flashsalectl_is_rebuilt_without_a_flashsale(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.pool.execute("UPDATE sales SET ends_at = now() - interval '1 hour'")
    await shop.redis.flushall()
    own = resync_of(shop)

    async def rebuilt() -> bool:
        await own.resync()
        row, sale = await shop.row(sold.sale_id), await shop.sale(sold.item_id)
        return not needs_rebuild(row, sale, await shop.inventory.server(), last=True)

    await until(rebuilt)
    assert await shop.buy(sold.item_id, "z") == [Outcome.ENDED]


async def test_a_finished_sale_that_cannot_be_rebuilt_does_not_stop_the_others(
    shop: SimulatedShop, sold: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(sold, sale_id="default/a-broken", item_id=f"{sold.item_id}-2")
    await shop.apply(broken)
    await shop.pool.execute("UPDATE sales SET ends_at = now() - interval '1 hour'")
    await shop.redis.flushall()
    own = resync_of(shop)
    rebuild, failed = own._rebuilds.rebuild, []

    async def fails(row: SaleRow, *, wakes: bool = True) -> object:
        if row.sale_id == broken.sale_id:
            failed.append(row)
            raise LedgerUnavailable("the ledger is unavailable: it has just gone away")
        return await rebuild(row, wakes=wakes)

    monkeypatch.setattr(own._rebuilds, "rebuild", fails)

    async def rebuilt() -> bool:
        await own.resync()
        row, sale = await shop.row(sold.sale_id), await shop.sale(sold.item_id)
        return not needs_rebuild(row, sale, await shop.inventory.server(), last=True)

    await until(rebuilt)
    assert failed


async def test_a_closed_sale_from_before_its_last_rebuild_is_rebuilt(
    shop: SimulatedShop, sold: SaleSpec, redis_server: RedisServer
) -> None:
    """The engine returns to a Redis that it had left. The sale was closed at the other one."""
    async with shop.at_another_redis(sold, redis_server.url):
        assert await shop.confirm(sold.item_id, "a") is Transition.CHANGED
        await shop.record(sold.item_id)
        await shop.reconciler.close(sold.sale_id)
    own = resync_of(shop)

    async def rebuilt() -> bool:
        await own.resync()
        row, sale = await shop.row(sold.sale_id), await shop.sale(sold.item_id)
        trusted = sale is not None and sale.run_id == (await shop.inventory.server()).run_id
        return trusted and not needs_rebuild(row, sale, await shop.inventory.server())

    await until(rebuilt)
    assert await shop.buy(sold.item_id, "z") == [Outcome.ENDED]
    assert await shop.cancel(sold.item_id, "a") is Transition.OTHER_ORDER
    assert await shop.cancel(sold.item_id, "a", "order-1") is Transition.CHANGED


async def test_an_outdated_sale_is_fenced_before_it_is_closed(
    shop: SimulatedShop, sold: SaleSpec, redis_server: RedisServer
) -> None:
    async with shop.at_another_redis(sold, redis_server.url):
        pass
    closed = await shop.reconciler.close(sold.sale_id)
    assert closed.sale is not None
    assert closed.sale.stored_state == "closed"
    assert closed.sale.run_id != (await shop.inventory.server()).run_id


async def test_a_sale_that_only_the_ledger_has_closed_is_closed_without_a_rebuild(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.pool.execute("UPDATE sales SET closed = true, revision = revision + 1")
    await resync_of(shop).resync()
    row, sale = await shop.row(sold.sale_id), await shop.sale(sold.item_id)
    assert sale is not None
    assert (sale.stored_state, sale.revision, sale.rebuilt) == ("closed", row.revision, 0)


async def test_a_sale_that_was_closed_while_it_waited_for_its_rebuild_gives_its_item_back(
    shop: SimulatedShop, sold: SaleSpec, other: SaleSpec
) -> None:
    """Redis lost its keys, and its FlashSale was deleted before the ledger had all its events."""
    await shop.redis.flushall()
    shop.topic = {0: Span(0, 5)}
    assert (await shop.apply(sold)).state is SaleState.FENCED
    await shop.reconciler.close(sold.sale_id)
    waits = resync_of(shop)
    await waits.resync()
    await asyncio.sleep(3 * QUICK.recorded)
    await waits.resync()
    conflict = await shop.apply(other)
    assert conflict.reason is Reason.ITEM_CONFLICT, "the topic may have more events of the sale"
    assert "waits for its rebuild: Redis lost 3 units" in conflict.message
    await shop.read_to(0, 5)
    own = resync_of(shop)

    async def sells() -> bool:
        await own.resync()
        return (await shop.apply(other)).state is SaleState.SELLING

    await until(sells, "the other sale has the item")
    assert await shop.buy(sold.item_id, "a") == [Outcome.ACCEPTED]
