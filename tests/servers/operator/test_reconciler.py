"""Manifests carried out on real Redis and PostgreSQL."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from dev.stack.servers import RedisServer
from flashsale import ledger, redis_client
from flashsale.errors import LedgerUnavailable, RedisUnavailable
from flashsale.inventory import Applied, Closed
from flashsale.keys import ItemKeys
from flashsale.reservations import Outcome
from flashsale.sale import SaleSpec, SaleState
from flashsale_operator.sales.decision import Reason
from flashsale_operator.sales.offsets import Span
from flashsale_operator.sales.reconciler import UnknownSale, refuse_eviction
from tests.servers.operator.conftest import QUICK, Pool, Shop


async def test_a_new_sale_is_sold(shop: Shop, spec: SaleSpec) -> None:
    report = await shop.apply(spec)
    assert (report.applied, report.state, report.reason) == (
        Applied.SEEDED,
        SaleState.SELLING,
        Reason.APPLIED,
    )
    assert report.message == "10 of 10 available"
    row = await shop.row(spec.sale_id)
    assert (row.revision, row.allocated, row.capacity, row.closed) == (1, 10, 10, False)
    assert await shop.buy(spec.item_id, "ann") == [Outcome.ACCEPTED]


async def test_applying_again_changes_nothing(shop: Shop, redis: Redis, spec: SaleSpec) -> None:
    full = replace(
        spec, display_name="Größe", starts_ms=1_000_000_000_123, ends_ms=32_000_000_000_456
    )
    await shop.apply(full)
    await shop.buy(spec.item_id, "ann", "bob")
    before = await shop.row(spec.sale_id), await redis.hgetall(ItemKeys.of(spec.item_id).sale)
    for _ in range(2):
        report = await shop.apply(full)
        assert (report.applied, report.message) == (Applied.UNCHANGED, "8 of 10 available")
    after = await shop.row(spec.sale_id), await redis.hgetall(ItemKeys.of(spec.item_id).sale)
    assert after == before


async def test_a_crowd_and_ever_changing_manifests_create_no_unit(
    shop: Shop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    choose = random.Random(7)
    done = asyncio.Event()

    async def crowd(name: str) -> list[Outcome]:
        found: list[Outcome] = []
        while not done.is_set():
            found += await shop.buy(spec.item_id, *(f"{name}-{len(found)}-{n}" for n in range(5)))
        return found

    async def owner() -> None:
        for _ in range(30):
            await shop.apply(replace(spec, stock=choose.randint(0, 300)))
        await shop.apply(replace(spec, stock=300))
        done.set()

    crowds, _ = await asyncio.gather(asyncio.gather(*(crowd(f"c{n}") for n in range(4))), owner())
    sold = sum(outcomes.count(Outcome.ACCEPTED) for outcomes in crowds)
    sale, row = await shop.sale(spec.item_id), await shop.row(spec.sale_id)
    assert sale is not None
    assert sale.accepted == sold <= 300
    assert (sale.revision, sale.allocated) == (row.revision, 300)


async def test_restock_pause_and_window_reach_the_next_buyer(shop: Shop, spec: SaleSpec) -> None:
    async def buy(user: str) -> Outcome:
        return (await shop.buy(spec.item_id, user))[0]

    await shop.apply(replace(spec, stock=1))
    assert [await buy("a"), await buy("b")] == [Outcome.ACCEPTED, Outcome.SOLD_OUT]
    assert (await shop.apply(replace(spec, stock=2))).state is SaleState.SELLING
    assert [await buy("c"), await buy("d")] == [Outcome.ACCEPTED, Outcome.SOLD_OUT]
    assert (await shop.apply(replace(spec, paused=True))).state is SaleState.PAUSED
    assert await buy("e") is Outcome.PAUSED
    later = (await shop.inventory.server()).now_ms + 3_600_000
    assert (await shop.apply(replace(spec, starts_ms=later))).state is SaleState.SCHEDULED
    assert await buy("f") is Outcome.NOT_OPEN
    assert (await shop.apply(replace(spec, ends_ms=later))).state is SaleState.SELLING
    assert await buy("g") is Outcome.ACCEPTED
    assert (await shop.row(spec.sale_id)).revision == 5


async def test_stock_below_what_is_held_leaves_what_is_held(shop: Shop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    for applied in (Applied.CHANGED, Applied.UNCHANGED):
        report = await shop.apply(replace(spec, stock=1))
        assert (report.applied, report.reason) == (applied, Reason.STOCK_BELOW_HELD)
        assert "stock 1 is below the 3 units" in report.message
    row = await shop.row(spec.sale_id)
    assert (row.allocated, row.capacity, row.revision) == (1, 10, 2)
    await shop.record(spec.item_id)


async def test_an_ended_sale_stays_ended(shop: Shop, spec: SaleSpec) -> None:
    now_ms = (await shop.inventory.server()).now_ms
    over = replace(spec, ends_ms=now_ms - 1)
    assert (await shop.apply(over)).state is SaleState.ENDED
    assert (await shop.apply(over)).ready
    for spec_again in (spec, replace(spec, ends_ms=now_ms + 60_000)):
        report = await shop.apply(spec_again)
        assert (report.state, report.reason) == (SaleState.ENDED, Reason.SALE_ENDED)
        assert "a new sale needs a new name" in report.message
    await shop.steward.close(spec.sale_id)
    assert (await shop.apply(spec)).reason is Reason.SALE_ENDED
    assert await shop.buy(spec.item_id, "ann") == [Outcome.ENDED]


async def test_the_item_of_a_sale_cannot_be_changed(shop: Shop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    report = await shop.apply(replace(spec, item_id="another"))
    assert report.reason is Reason.ITEM_CHANGED
    assert report.message.startswith("spec.itemId: is immutable")
    assert await shop.sale("another") is None


async def test_two_different_manifests_at_once_leave_one_of_them_everywhere(
    shop: Shop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    for _ in range(10):
        stocks = random.sample(range(11, 99), 3)
        reports = await asyncio.gather(
            *(shop.apply(replace(spec, stock=stock)) for stock in stocks)
        )
        assert {report.reason for report in reports} <= {Reason.APPLIED, Reason.SUPERSEDED}
        row, sale = await shop.row(spec.sale_id), await shop.sale(spec.item_id)
        assert sale is not None
        assert row.allocated in stocks
        assert (sale.allocated, sale.revision) == (row.allocated, row.revision)


async def test_many_stewards_with_one_new_manifest_seed_it_once(
    redis: "Redis", pool: Pool, spec: SaleSpec
) -> None:
    # Those who find the row and no keys yet leave the time that it takes to seed.
    shop = Shop(redis, pool, patience=replace(QUICK, seeding=1.0))
    reports = await asyncio.gather(*(shop.apply(spec) for _ in range(8)))
    assert [report.applied for report in reports].count(Applied.SEEDED) == 1
    assert (await shop.apply(spec)).ready
    assert await shop.buy(spec.item_id, *"abcdefghijkl") == [
        *[Outcome.ACCEPTED] * 10,
        *[Outcome.SOLD_OUT] * 2,
    ]


async def test_of_two_new_sales_of_an_item_one_gets_it(
    shop: Shop, spec: SaleSpec, other: SaleSpec
) -> None:
    reports = await asyncio.gather(shop.apply(spec), shop.apply(other))
    assert {report.reason for report in reports} == {Reason.APPLIED, Reason.ITEM_CONFLICT}
    assert len(await ledger.sales(shop.pool, spec.item_id)) == 1


async def test_a_steward_that_died_before_seeding_is_followed_by_a_rebuild(
    shop: Shop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.redis.flushall()  # as if nothing had been seeded
    shop.topic[0] = Span(0, 3)
    report = await shop.apply(spec)
    assert (report.state, report.reason) == (SaleState.FENCED, Reason.FENCED)
    assert report.message == "the ledger has read partition 0 to 0 of 3"
    assert await shop.buy(spec.item_id, "d") == [Outcome.FENCED]
    await shop.read_to(0, 3)
    assert (await shop.apply(spec)).state is SaleState.SELLING


async def test_a_flush_with_units_sold_is_never_sold_again(shop: Shop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id)
    await shop.redis.flushall()
    assert await shop.buy(spec.item_id, "d") == [Outcome.UNKNOWN]
    report = await shop.apply(spec)
    assert (report.state, report.ready) == (SaleState.SELLING, True)
    assert report.sale is not None
    assert (report.sale.accepted, report.sale.available) == (3, 7)


async def test_keys_without_their_sale_are_not_seeded_over(shop: Shop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a")
    await shop.redis.delete(ItemKeys.of(spec.item_id).sale)
    report = await shop.apply(spec)
    assert (report.state, report.message) == (
        SaleState.FENCED,
        "the outbox has 1 events that Kafka has not",
    )
    await shop.record(spec.item_id)
    report = await shop.apply(spec)
    assert report.sale is not None
    assert (report.state, report.sale.accepted) == (SaleState.SELLING, 1)


@pytest.mark.parametrize("lose", [0, 1])
async def test_after_a_restart_a_sale_is_rebuilt_once_its_outbox_is_drained(
    tmp_path: Path, pool: Pool, spec: SaleSpec, lose: int
) -> None:
    with RedisServer(tmp_path, appendfsync="always") as server:
        redis = redis_client.connect(server.url)
        shop = Shop(redis, pool)
        await shop.apply(spec)
        await shop.buy(spec.item_id, "a", "b", "c")
        server.kill()
        with pytest.raises(RedisUnavailable):
            await shop.apply(spec)
        server.start()
        assert await shop.buy(spec.item_id, "d") == [Outcome.FENCED]
        report = await shop.apply(spec)
        assert (report.state, report.message) == (
            SaleState.FENCED,
            "the outbox has 3 events that Kafka has not",
        )
        await shop.record(spec.item_id, lose=lose)
        report = await shop.apply(spec)
        assert (report.ready, report.state) == (True, SaleState.SELLING)
        assert report.rebuilt is not None
        assert (report.rebuilt.accepted, report.rebuilt.lost) == (3 - lose, lose)
        assert (await shop.buy(spec.item_id, "b", "c", "d")).count(Outcome.LIMIT_REACHED) == 2
        await redis.aclose()


async def test_an_item_goes_to_the_next_sale_when_the_first_is_closed_and_recorded(
    shop: Shop, spec: SaleSpec, other: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "ann")
    report = await shop.apply(other)
    assert (report.state, report.reason) == (SaleState.ITEM_CONFLICT, Reason.ITEM_CONFLICT)
    assert report.message == f"{spec.item_id} is sold by {spec.sale_id}, which is Selling"
    assert await ledger.sale(shop.pool, other.sale_id) is None
    await shop.steward.close(spec.sale_id)
    assert "its outbox has 1 event" in (await shop.apply(other)).message
    await shop.record(spec.item_id)
    assert (await shop.apply(other)).applied is Applied.SEEDED
    assert await shop.buy(spec.item_id, "ann") == [Outcome.ACCEPTED]
    assert (await shop.apply(spec)).reason is Reason.ITEM_CONFLICT


async def test_closing_and_applying_again_continues_with_the_same_buyers(
    shop: Shop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "ann")
    report = await shop.steward.close(spec.sale_id)
    assert (report.applied, report.state, report.ready) == (Closed.CLOSED, SaleState.CLOSING, True)
    assert await shop.buy(spec.item_id, "bob") == [Outcome.ENDED]
    assert (await shop.steward.close(spec.sale_id)).applied is Closed.UNCHANGED
    assert (await shop.row(spec.sale_id)).revision == 2
    report = await shop.apply(spec)
    assert (report.applied, report.message) == (Applied.CHANGED, "9 of 10 available")
    assert await shop.buy(spec.item_id, "ann", "bob") == [Outcome.LIMIT_REACHED, Outcome.ACCEPTED]


async def test_closing_needs_no_keys_and_an_older_ledger_still_closes(
    shop: Shop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.apply(replace(spec, stock=20))
    await shop.pool.execute("UPDATE sales SET revision = 1")
    report = await shop.steward.close(spec.sale_id)
    assert (report.applied, report.state) == (Closed.CLOSED, SaleState.CLOSING)
    await shop.redis.flushall()
    report = await shop.steward.close(spec.sale_id)
    assert (report.applied, report.state, report.ready) == (Closed.UNKNOWN, SaleState.CLOSING, True)
    with pytest.raises(UnknownSale, match="no such sale"):
        await shop.steward.close("default/never")


async def test_an_older_ledger_is_brought_above_redis_revision(shop: Shop, spec: SaleSpec) -> None:
    for stock in (10, 11, 12):
        await shop.apply(replace(spec, stock=stock))
    await shop.pool.execute("UPDATE sales SET revision = 1")
    assert (await shop.apply(replace(spec, stock=12))).ready
    await shop.pool.execute("DELETE FROM sales")
    assert (await shop.apply(replace(spec, stock=13))).message == "13 of 13 available"
    assert (await shop.row(spec.sale_id)).revision == 5


async def test_who_closes_an_item_means_the_sale_that_may_sell(
    shop: Shop, spec: SaleSpec, other: SaleSpec
) -> None:
    with pytest.raises(UnknownSale, match="there is no sale of this item"):
        await shop.steward.sales_to_close(spec.item_id)
    await shop.apply(spec)
    await shop.steward.close(spec.sale_id)
    await shop.apply(other)
    assert await shop.steward.sales_to_close(spec.item_id) == [other.sale_id]
    await shop.steward.close(other.sale_id)
    assert await shop.steward.sales_to_close(spec.item_id) == [other.sale_id]
    await shop.redis.flushall()
    assert await shop.steward.sales_to_close(spec.item_id) == [spec.sale_id, other.sale_id]


async def test_nothing_reaches_redis_when_the_ledger_is_away(shop: Shop, spec: SaleSpec) -> None:
    await shop.pool.execute("ALTER TABLE sales RENAME TO away")
    with pytest.raises(LedgerUnavailable):
        await shop.apply(spec)
    assert await shop.sale(spec.item_id) is None


async def test_a_redis_that_evicts_is_refused(shop: Shop) -> None:
    await refuse_eviction(shop.inventory)
    await shop.redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(RedisUnavailable, match="allkeys-lru: it must be noeviction"):
            await refuse_eviction(shop.inventory)
    finally:
        await shop.redis.config_set("maxmemory-policy", "noeviction")
