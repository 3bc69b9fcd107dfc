"""Reconciles that run at the same time, on real Redis and PostgreSQL."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis

from flashsale import ledger
from flashsale.clocks import ServerTime
from flashsale.inventory import Applied
from flashsale.reservations import Outcome
from flashsale.sale import Sale, SaleSpec
from flashsale_consumer import recorded
from flashsale_operator.sales.decision import Reason
from flashsale_operator.sales.reconciler import (
    _LOCK_ITEM,
    Outdated,
)
from tests.support.eventually import until
from tests.support.ledgers import Connection, connected, waits
from tests.support.simulated_shop import QUICK, SimulatedShop


async def test_of_concurrent_manifests_one_reaches_both_ledger_and_redis(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    for _ in range(10):
        stocks = random.sample(range(11, 99), 3)
        results = await asyncio.gather(
            *(shop.apply(replace(spec, stock=stock)) for stock in stocks)
        )
        assert {result.reason for result in results} <= {Reason.APPLIED, Reason.SUPERSEDED}
        row, sale = await shop.row(spec.sale_id), await shop.sale(spec.item_id)
        assert sale is not None
        assert row.allocated in stocks
        assert (sale.allocated, sale.revision) == (row.allocated, row.revision)


async def test_concurrent_reconciles_of_a_new_manifest_seed_it_once(
    redis: "Redis", pool: ledger.Pool, spec: SaleSpec
) -> None:
    # Reconciles that find the row without keys must leave enough time for the seeding.
    shop = SimulatedShop(redis, pool, patience=replace(QUICK, seeding=1.0))
    results = await asyncio.gather(*(shop.apply(spec) for _ in range(8)))
    assert [result.applied for result in results].count(Applied.SEEDED) == 1
    assert (await shop.apply(spec)).ready
    assert await shop.buy(spec.item_id, *"abcdefghijkl") == [
        *[Outcome.ACCEPTED] * 10,
        *[Outcome.SOLD_OUT] * 2,
    ]


async def test_of_two_new_sales_only_one_gets_the_item(
    shop: SimulatedShop, spec: SaleSpec, other: SaleSpec
) -> None:
    results = await asyncio.gather(shop.apply(spec), shop.apply(other))
    assert {result.reason for result in results} == {Reason.APPLIED, Reason.ITEM_CONFLICT}
    assert len(await ledger.sales(shop.pool, spec.item_id)) == 1


@pytest.fixture
async def holder(shop: SimulatedShop, database_url: str) -> AsyncIterator[Connection]:
    """A session of a database whose transactions see only their beginning by default."""
    async with connected(database_url) as own:
        name = await own.fetchval("SELECT current_database()")
        await own.execute(
            f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'repeatable read'"
        )
        await shop.pool.expire_connections()
        yield own


async def test_a_sale_that_waited_for_the_items_lock_sees_the_other_sale(
    shop: SimulatedShop, spec: SaleSpec, other: SaleSpec, holder: Connection
) -> None:
    async with holder.transaction():
        await holder.execute(_LOCK_ITEM, shop.engine, spec.item_id)
        applied = [asyncio.create_task(shop.apply(each)) for each in (spec, other)]
        await until(lambda: waits(holder, 2), "both sales wait for the lock")
    results = await asyncio.gather(*applied)
    assert {result.reason for result in results} == {Reason.APPLIED, Reason.ITEM_CONFLICT}
    assert len(await ledger.sales(shop.pool, spec.item_id)) == 1


async def test_a_manifest_that_changed_during_the_wait_for_the_lock_is_not_written(
    shop: SimulatedShop, spec: SaleSpec, holder: Connection
) -> None:
    """Another operator has the lock, and writes the newer manifest."""
    is_current = True

    async def current() -> bool:
        return is_current

    async with holder.transaction():
        await holder.execute(_LOCK_ITEM, shop.engine, spec.item_id)
        applying = asyncio.create_task(shop.reconciler.reconcile(spec, current=current))
        await until(lambda: waits(holder), "the sale waits for the lock")
        is_current = False
    with pytest.raises(Outdated):
        await applying
    assert await ledger.sales(shop.pool, spec.item_id) == []


@pytest.mark.parametrize("write", ["claim", "adoption", "rebuild", "announcement"])
async def test_a_single_write_that_waited_for_another_change_is_done(
    shop: SimulatedShop, spec: SaleSpec, holder: Connection, write: str
) -> None:
    await shop.apply(spec)
    row = await shop.row(spec.sale_id)
    writes: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "claim": lambda: ledger.engine_id(shop.pool, shop.engine, "redis:6379/0"),
        "adoption": lambda: shop.reconciler.reconcile(spec, resource_uid="uid"),
        "rebuild": lambda: shop.rebuilder.rebuild(row),
        "announcement": lambda: recorded.Source(shop.pool, "").announced(
            [recorded.Rebuild(spec.sale_id, spec.item_id, 1, 0)]
        ),
    }
    await holder.execute("UPDATE engine SET redis_address = NULL")
    async with holder.transaction():
        await holder.execute("UPDATE engine SET name = name")
        await holder.execute("UPDATE sales SET updated_at = now()")
        task = asyncio.create_task(writes[write]())
        await until(lambda: waits(holder), "the write waits for the change")
    await task


@pytest.mark.parametrize("again", ["before the row", "before the keys"])
async def test_of_a_new_sale_and_one_that_is_applied_again_only_one_gets_the_item(
    shop: SimulatedShop,
    sold: SaleSpec,
    other: SaleSpec,
    monkeypatch: pytest.MonkeyPatch,
    again: str,
) -> None:
    """With two unfinished sales in the ledger, neither could be rebuilt after a loss."""
    await shop.reconciler.close(sold.sale_id)
    late = SimulatedShop(shop.redis, shop.pool)
    observe, apply = late.inventory.observe, late.inventory.apply

    async def apply_again_after_the_look(item_id: str) -> tuple[Sale | None, ServerTime]:
        monkeypatch.setattr(late.inventory, "observe", observe)
        found = await observe(item_id)
        await shop.apply(sold)
        return found

    async def apply_again_before_the_keys(*row: Any, **options: Any) -> Applied:  # noqa: ANN401
        await shop.apply(sold)
        return await apply(*row, **options)

    if again == "before the row":
        monkeypatch.setattr(late.inventory, "observe", apply_again_after_the_look)
    else:
        monkeypatch.setattr(late.inventory, "apply", apply_again_before_the_keys)
    await late.apply(other)
    await shop.redis.flushall()
    results = [await shop.apply(each) for each in (sold, other)]
    assert sorted(result.ready for result in results) == [False, True]
