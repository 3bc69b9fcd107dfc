"""Reconciles of manifests on real Redis and PostgreSQL."""

import asyncio
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from dev.stack.servers import RedisServer
from flashsale import ledger, redis_client
from flashsale.errors import LedgerUnavailable, RedisUnavailable, UnmetRequirement
from flashsale.inventory import Applied, Closed
from flashsale.keys import ItemKeys
from flashsale.requirements import Checks
from flashsale.reservations import Outcome
from flashsale.sale import SaleSpec, SaleState
from flashsale_operator.sales import engine
from flashsale_operator.sales.decision import Reason
from flashsale_operator.sales.engine import require_redis
from flashsale_operator.sales.offsets import Span
from flashsale_operator.sales.reconciler import (
    _HOLD_EXPIRED,
    _REFUSED,
    UnknownSale,
)
from tests.support.simulated_shop import SimulatedShop


async def test_a_new_sale_can_be_sold(shop: SimulatedShop, spec: SaleSpec) -> None:
    result = await shop.apply(spec)
    assert (result.applied, result.state, result.reason) == (
        Applied.SEEDED,
        SaleState.SELLING,
        Reason.APPLIED,
    )
    assert result.message == "10 of 10 available"
    row = await shop.row(spec.sale_id)
    assert (row.revision, row.allocated, row.capacity, row.closed) == (1, 10, 10, False)
    assert await shop.buy(spec.item_id, "ann") == [Outcome.ACCEPTED]


async def test_applying_again_changes_nothing(
    shop: SimulatedShop, redis: Redis, spec: SaleSpec
) -> None:
    full = replace(
        spec, display_name="Größe", starts_ms=1_000_000_000_123, ends_ms=32_000_000_000_456
    )
    await shop.apply(full)
    await shop.buy(spec.item_id, "ann", "bob")
    before = await shop.row(spec.sale_id), await redis.hgetall(ItemKeys.of(spec.item_id).sale)
    for _ in range(2):
        result = await shop.apply(full)
        assert (result.applied, result.message) == (Applied.UNCHANGED, "8 of 10 available")
    after = await shop.row(spec.sale_id), await redis.hgetall(ItemKeys.of(spec.item_id).sale)
    assert after == before


async def test_manifest_changes_during_a_sale_create_no_units(
    shop: SimulatedShop, spec: SaleSpec
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


async def test_a_restock_a_pause_and_a_window_apply_to_the_next_buyer(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
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


async def test_stock_below_the_held_units_keeps_these_units(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    for applied in (Applied.CHANGED, Applied.UNCHANGED):
        result = await shop.apply(replace(spec, stock=1))
        assert (result.applied, result.reason) == (applied, Reason.STOCK_BELOW_HELD)
        assert "stock 1 is below the 3 units" in result.message
    row = await shop.row(spec.sale_id)
    assert (row.allocated, row.capacity, row.revision) == (1, 10, 2)
    await shop.record(spec.item_id)


async def test_an_ended_sale_stays_ended(shop: SimulatedShop, spec: SaleSpec) -> None:
    now_ms = (await shop.inventory.server()).now_ms
    over = replace(spec, ends_ms=now_ms - 1)
    assert (await shop.apply(over)).state is SaleState.ENDED
    assert (await shop.apply(over)).ready
    for spec_again in (spec, replace(spec, ends_ms=now_ms + 60_000)):
        result = await shop.apply(spec_again)
        assert (result.state, result.reason) == (SaleState.ENDED, Reason.SALE_ENDED)
        assert "a new sale needs a new name" in result.message
    await shop.reconciler.close(spec.sale_id)
    assert (await shop.apply(spec)).reason is Reason.SALE_ENDED
    assert await shop.buy(spec.item_id, "ann") == [Outcome.ENDED]


@pytest.mark.parametrize("held", [False, True])
async def test_an_ended_sale_that_was_closed_stays_ended_without_its_keys(
    shop: SimulatedShop, spec: SaleSpec, held: bool
) -> None:
    now_ms = (await shop.inventory.server()).now_ms
    spec = replace(spec, ends_ms=now_ms + 60_000, hold_seconds=600 if held else None)
    await shop.apply(spec)
    await shop.buy(spec.item_id, "ann")
    await shop.record(spec.item_id)
    # The end has passed meanwhile.
    await shop.pool.execute(
        "UPDATE sales SET ends_at = to_timestamp($1::float8)", (now_ms - 1_000) / 1000
    )
    await shop.reconciler.close(spec.sale_id)
    await shop.redis.flushall()
    for _ in range(2):
        result = await shop.apply(spec)
        assert (result.state, result.reason) == (SaleState.ENDED, Reason.SALE_ENDED)
        assert await shop.buy(spec.item_id, "bob") != [Outcome.ACCEPTED]
    assert (await shop.row(spec.sale_id)).closed
    assert (await shop.sale(spec.item_id) is not None) is held, "its hold can be confirmed"


async def test_a_sale_that_was_closed_before_its_end_continues_without_its_keys(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    now_ms = (await shop.inventory.server()).now_ms
    await shop.apply(replace(spec, ends_ms=now_ms + 60_000))
    await shop.reconciler.close(spec.sale_id)
    await shop.redis.flushall()
    # An hour has passed meanwhile, and the end with it.
    await shop.pool.execute(
        "UPDATE sales "
        "SET ends_at = to_timestamp($1::float8), closed_at = closed_at - interval '1 hour'",
        (now_ms - 1_000) / 1000,
    )
    assert (await shop.apply(spec)).state is SaleState.SELLING
    assert (await shop.row(spec.sale_id)).closed_at is None
    assert await shop.buy(spec.item_id, "bob") == [Outcome.ACCEPTED]


async def test_the_item_of_a_sale_cannot_be_changed(shop: SimulatedShop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    result = await shop.apply(replace(spec, item_id="another"))
    assert result.reason is Reason.ITEM_CHANGED
    assert result.message.startswith("spec.itemId is immutable")
    assert await shop.sale("another") is None


async def test_a_reconciler_that_dies_before_seeding_leads_to_a_rebuild(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.redis.flushall()  # as if the keys had never been seeded
    shop.topic[0] = Span(0, 3)
    result = await shop.apply(spec)
    assert (result.state, result.reason) == (SaleState.FENCED, Reason.FENCED)
    assert result.message == "the ledger has read partition 0 to offset 0 of 3"
    assert await shop.buy(spec.item_id, "d") == [Outcome.FENCED]
    await shop.read_to(0, 3)
    assert (await shop.apply(spec)).state is SaleState.SELLING


async def test_units_sold_before_a_flush_are_not_sold_again(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id)
    await shop.redis.flushall()
    assert await shop.buy(spec.item_id, "d") == [Outcome.UNKNOWN]
    result = await shop.apply(spec)
    assert (result.state, result.ready) == (SaleState.SELLING, True)
    assert result.sale is not None
    assert (result.sale.accepted, result.sale.available) == (3, 7)


async def test_remaining_keys_of_a_lost_sale_are_not_overwritten(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a")
    await shop.redis.delete(ItemKeys.of(spec.item_id).sale)
    result = await shop.apply(spec)
    assert (result.state, result.message) == (
        SaleState.FENCED,
        "the outbox has 1 event that Kafka has not acknowledged",
    )
    await shop.record(spec.item_id)
    result = await shop.apply(spec)
    assert result.sale is not None
    assert (result.state, result.sale.accepted) == (SaleState.SELLING, 1)


@pytest.mark.parametrize("lose", [0, 1])
async def test_after_a_restart_a_sale_is_rebuilt_when_its_outbox_is_empty(
    tmp_path: Path, pool: ledger.Pool, spec: SaleSpec, lose: int
) -> None:
    with RedisServer(tmp_path, appendfsync="always") as server:
        redis = redis_client.connect(server.url)
        shop = SimulatedShop(redis, pool)
        await shop.apply(spec)
        await shop.buy(spec.item_id, "a", "b", "c")
        server.kill()
        with pytest.raises(RedisUnavailable):
            await shop.apply(spec)
        server.start()
        assert await shop.buy(spec.item_id, "d") == [Outcome.FENCED]
        result = await shop.apply(spec)
        assert (result.state, result.message) == (
            SaleState.FENCED,
            "the outbox has 3 events that Kafka has not acknowledged",
        )
        await shop.record(spec.item_id, lose=lose)
        result = await shop.apply(spec)
        assert (result.ready, result.state) == (True, SaleState.SELLING)
        assert result.rebuilt is not None
        assert (result.rebuilt.accepted, result.rebuilt.lost) == (3 - lose, lose)
        assert (await shop.buy(spec.item_id, "b", "c", "d")).count(Outcome.LIMIT_REACHED) == 2
        await redis.aclose()


async def test_a_sale_is_fenced_if_redis_restarts_while_it_is_observed(
    tmp_path: Path, pool: ledger.Pool, spec: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer(tmp_path, appendfsync="always") as server:
        redis = redis_client.connect(server.url)
        shop = SimulatedShop(redis, pool)
        await shop.apply(spec)
        reads = {name: getattr(shop.inventory, name) for name in ("servers", "_read")}

        async def restart_after(name: str, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            found = await reads[name](*arguments, **options)
            for each, read in reads.items():
                monkeypatch.setattr(shop.inventory, each, read)
            server.kill()
            server.start()
            with pytest.raises(RedisUnavailable):
                await shop.sale(spec.item_id)
            assert await shop.sale(spec.item_id)  # another reconcile has connected again
            return found

        for name in reads:
            monkeypatch.setattr(shop.inventory, name, partial(restart_after, name))
        result = await shop.apply(spec)
        assert result.rebuilt is not None
        assert await shop.buy(spec.item_id, "a") == [Outcome.ACCEPTED]
        await redis.aclose()


async def test_a_new_sale_gets_the_item_after_the_first_is_closed_and_recorded(
    shop: SimulatedShop, spec: SaleSpec, other: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "ann")
    result = await shop.apply(other)
    assert (result.state, result.reason) == (SaleState.ITEM_CONFLICT, Reason.ITEM_CONFLICT)
    assert result.message == f"{spec.item_id} is sold by {spec.sale_id}, which is Selling"
    assert await ledger.sale(shop.pool, other.sale_id) is None
    await shop.reconciler.close(spec.sale_id)
    assert "its outbox has 1 event" in (await shop.apply(other)).message
    await shop.record(spec.item_id)
    assert (await shop.apply(other)).applied is Applied.SEEDED
    assert await shop.buy(spec.item_id, "ann") == [Outcome.ACCEPTED]
    assert (await shop.apply(spec)).reason is Reason.ITEM_CONFLICT


async def test_applying_a_closed_sale_again_keeps_its_buyers(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "ann")
    result = await shop.reconciler.close(spec.sale_id)
    assert (result.applied, result.state, result.ready) == (Closed.CLOSED, SaleState.CLOSING, True)
    assert await shop.buy(spec.item_id, "bob") == [Outcome.ENDED]
    assert (await shop.reconciler.close(spec.sale_id)).applied is Closed.UNCHANGED
    assert (await shop.row(spec.sale_id)).revision == 2
    result = await shop.apply(spec)
    assert (result.applied, result.message) == (Applied.CHANGED, "9 of 10 available")
    assert await shop.buy(spec.item_id, "ann", "bob") == [Outcome.LIMIT_REACHED, Outcome.ACCEPTED]


async def test_a_sale_without_keys_or_with_an_older_ledger_can_be_closed(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.apply(replace(spec, stock=20))
    await shop.pool.execute("UPDATE sales SET revision = 1")
    result = await shop.reconciler.close(spec.sale_id)
    assert (result.applied, result.state) == (Closed.CLOSED, SaleState.CLOSING)
    await shop.redis.flushall()
    result = await shop.reconciler.close(spec.sale_id)
    assert (result.applied, result.state, result.ready) == (Closed.UNKNOWN, SaleState.CLOSING, True)
    with pytest.raises(UnknownSale, match="no such sale"):
        await shop.reconciler.close("default/never")


async def test_a_sale_that_an_older_ledger_closes_again_keeps_the_time_of_its_close(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """It could not be continued if its end has passed since, because it would count as ended."""
    await shop.apply(spec)
    await shop.reconciler.close(spec.sale_id)
    await shop.pool.execute("UPDATE sales SET closed_at = closed_at - interval '1 hour'")
    former = await shop.row(spec.sale_id)
    await shop.apply(spec)
    await shop.pool.execute(
        "UPDATE sales SET closed = true, closed_at = $1, revision = $2",
        former.closed_at,
        former.revision,
    )
    assert (await shop.reconciler.close(spec.sale_id)).applied is Closed.CLOSED
    row = await shop.row(spec.sale_id)
    assert (row.closed_at, row.revision) == (former.closed_at, former.revision + 2)


async def test_the_ledger_notes_a_close_while_redis_is_away(
    shop: SimulatedShop, sold: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise RedisUnavailable("away")

    monkeypatch.setattr(engine, "claim", away)
    with pytest.raises(RedisUnavailable):
        await shop.reconciler.close(sold.sale_id)
    assert (await shop.row(sold.sale_id)).closed


async def test_an_older_ledger_takes_a_revision_above_redis(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    for stock in (10, 11, 12):
        await shop.apply(replace(spec, stock=stock))
    await shop.pool.execute("UPDATE sales SET revision = 1")
    assert (await shop.apply(replace(spec, stock=12))).ready
    await shop.pool.execute("DELETE FROM sales")
    assert (await shop.apply(replace(spec, stock=13))).message == "13 of 13 available"
    assert (await shop.row(spec.sale_id)).revision == 5


async def test_closing_an_item_closes_its_unfinished_sale(
    shop: SimulatedShop, spec: SaleSpec, other: SaleSpec
) -> None:
    with pytest.raises(UnknownSale, match="there is no sale of this item"):
        await shop.reconciler.sales_to_close(spec.item_id)
    await shop.apply(spec)
    await shop.reconciler.close(spec.sale_id)
    await shop.apply(other)
    assert await shop.reconciler.sales_to_close(spec.item_id) == [other.sale_id]
    await shop.reconciler.close(other.sale_id)
    assert await shop.reconciler.sales_to_close(spec.item_id) == [other.sale_id]
    await shop.redis.flushall()
    assert await shop.reconciler.sales_to_close(spec.item_id) == [spec.sale_id, other.sale_id]


async def test_nothing_reaches_redis_while_the_ledger_is_away(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.pool.execute("ALTER TABLE sales RENAME TO away")
    with pytest.raises(LedgerUnavailable):
        await shop.apply(spec)
    assert await shop.sale(spec.item_id) is None


async def test_the_former_spec_of_a_wrong_manifest_is_never_written(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """Another writer may have changed the row since, or the ledger may be an older copy."""
    for stock in (10, 20):
        await shop.reconciler.reconcile(replace(spec, stock=stock), "uid-1")
    before = await shop.row(spec.sale_id)
    result = await shop.reconciler.reconcile(spec, "uid-1", mistakes="spec.stock: is wrong")
    assert (result.state, result.reason) == (SaleState.SELLING, Reason.INVALID_SPEC)
    assert result.message == "spec.stock: is wrong"
    assert await shop.row(spec.sale_id) == before
    await shop.pool.execute("UPDATE sales SET revision = 1, allocated = 10")
    older = await shop.row(spec.sale_id)
    await shop.reconciler.reconcile(spec, "uid-1", mistakes="spec.stock: is wrong")
    assert await shop.row(spec.sale_id) == older
    sale = await shop.sale(spec.item_id)
    assert sale is not None
    assert sale.allocated == 20


async def test_a_redis_that_evicts_keys_is_refused(shop: SimulatedShop) -> None:
    await require_redis(Checks(), shop.inventory)
    await shop.redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(UnmetRequirement, match="allkeys-lru, but needs maxmemory-policy noev"):
            await require_redis(Checks(), shop.inventory)
    finally:
        await shop.redis.config_set("maxmemory-policy", "noeviction")


@pytest.mark.parametrize("query", [_REFUSED, _HOLD_EXPIRED], ids=["refused", "expired"])
async def test_rare_states_are_found_without_reading_all_reservations(
    shop: SimulatedShop, spec: SaleSpec, query: str
) -> None:
    """Each reconcile asks for them."""
    await shop.pool.execute(
        """
        INSERT INTO reservations (sale_id, reservation_id, user_id, quantity, state, version,
                                  accepted_at)
        SELECT $1, gen_random_uuid(), 'user' || n, 1, 'confirmed', 1, now()
        FROM generate_series(1, 20000) n
        """,
        spec.sale_id,
    )
    await shop.pool.execute("ANALYZE reservations")
    plan = [line for (line,) in await shop.pool.fetch(f"EXPLAIN {query}", spec.sale_id)]
    assert "reservations_refused_or_expired" in "\n".join(plan)
