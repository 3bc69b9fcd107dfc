"""Engines that share a Redis or a ledger: they work next to each other, or one is refused."""

import asyncio
import uuid

import pytest
from redis.asyncio import Redis

from dev.stack.servers import RedisServer
from flashsale import heartbeat, keys, ledger, redis_client
from flashsale.errors import OtherEngine, RedisMoved
from flashsale.inventory import Applied, Closed, Freed
from flashsale.keys import DEFAULT_ENGINE, ItemKeys
from flashsale.reservations import Outcome, Request
from flashsale.sale import SaleSpec, SaleState
from flashsale_operator.ctl.commands import run
from flashsale_operator.sales.decision import spec_of
from flashsale_operator.sales.rebuild import Rebuilt
from flashsale_operator.sales.recovery import Fenced, Recovery
from tests.support.redis_users import OPERATOR, TESTER, url_of
from tests.support.simulated_shop import SimulatedShop

FOREIGN = str(uuid.UUID(int=7))


async def id_of(pool: ledger.Pool) -> str:
    return str(await pool.fetchval("SELECT id FROM engine"))


async def test_two_engines_of_different_names_share_a_redis(
    shop: SimulatedShop, spec: SaleSpec, other_pool: ledger.Pool
) -> None:
    brand = SimulatedShop(shop.redis, other_pool, engine="brand")
    for each in (shop, brand):
        report = await each.apply(spec)
        assert (report.state, report.ready) == (SaleState.SELLING, True)
    await shop.send(spec.item_id, [Request(str(uuid.uuid4()), "ann", 4)])
    assert await brand.buy(spec.item_id, "ann") == [Outcome.ACCEPTED]
    for each, accepted in ((shop, 0), (brand, 1)):
        sale = await each.sale(spec.item_id)
        assert sale is not None
        assert sale.accepted == accepted
        assert sale.engine == await id_of(each.pool)


async def test_every_key_begins_with_the_name_of_the_engine(
    redis: "Redis", pool: ledger.Pool, spec: SaleSpec
) -> None:
    brand = SimulatedShop(redis, pool, engine="brand")
    await brand.apply(spec)
    await brand.buy(spec.item_id, "ann", "bob")
    server = await brand.inventory.server()
    await heartbeat.beat(redis, "pod-1", {spec.item_id: 1}, {"": server}, "brand")
    await brand.record(spec.item_id)
    await heartbeat.retire(redis, "pod-1", [], "brand")
    await brand.change_run(spec.item_id)
    keys = [str(key) for key in await redis.keys("*")]
    assert len(keys) > 4
    assert [key for key in keys if not key.startswith("brand:")] == []
    await redis.flushall()
    assert isinstance(await brand.rebuilder.rebuild(await brand.row(spec.sale_id)), Rebuilt)
    assert all(str(key).startswith("brand:") for key in await redis.keys("*"))


async def test_two_ledgers_of_one_name_cannot_share_a_redis(
    shop: SimulatedShop, sold: SaleSpec, other_pool: ledger.Pool
) -> None:
    before = await shop.sale(sold.item_id)
    second = SimulatedShop(shop.redis, other_pool)
    own, foreign = await id_of(other_pool), await id_of(shop.pool)
    expected = f"this Redis belongs to engine {foreign}, and the ledger to engine {own}, both named"
    with pytest.raises(OtherEngine, match=expected):
        await second.apply(sold)
    assert await ledger.sale(other_pool, sold.sale_id) is None
    await other_pool.execute(
        "INSERT INTO sales (sale_id, item_id, allocated, revision, capacity) "
        "VALUES ($1, $2, 10, 1, 10)",
        sold.sale_id,
        sold.item_id,
    )
    with pytest.raises(OtherEngine, match=expected):
        await second.reconciler.close(sold.sale_id)
    assert await shop.sale(sold.item_id) == before


async def test_the_ledger_of_an_engine_of_another_name_is_refused(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    brand = SimulatedShop(shop.redis, shop.pool, engine="brand")
    row = await shop.row(sold.sale_id)
    with pytest.raises(OtherEngine, match=r"engine flashsale, but .* is brand"):
        await brand.apply(sold)
    with pytest.raises(OtherEngine, match=r"engine flashsale, but .* is brand"):
        await brand.rebuilder.rebuild(row)
    assert await shop.row(sold.sale_id) == row
    assert await brand.sale(sold.item_id) is None


async def test_every_script_refuses_the_sale_of_another_engine(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    row, item_id = await shop.row(sold.sale_id), sold.item_id
    before = await shop.sale(item_id)
    own, inventory = spec_of(row), shop.inventory
    assert await inventory.apply(own, 9, engine_id=FOREIGN) is Applied.OTHER_ENGINE
    assert await inventory.close(item_id, row.sale_id, 9, FOREIGN) is Closed.OTHER_ENGINE
    freed = await inventory.free(item_id, row.sale_id, 1, accepted=3, released=0, engine_id=FOREIGN)
    assert freed is Freed.OTHER_ENGINE
    reply = await inventory.reserve(
        item_id, [Request(str(uuid.uuid4()), "z", 1)], timeout_seconds=5, engine_id=FOREIGN
    )
    assert reply is Outcome.OTHER_ENGINE
    for step in ("fence", "wait", "begin"):
        answer = await Recovery(shop.redis).fence(own, 9, step=step, engine_id=FOREIGN)
        assert answer is Fenced.OTHER_ENGINE
    assert await shop.sale(item_id) == before


async def test_a_sale_of_the_previous_version_is_adopted(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """It has no engine, and Redis and the ledger's address have no owner yet."""
    await shop.redis.delete(keys.engine_id(DEFAULT_ENGINE))
    await shop.redis.hdel(ItemKeys.of(sold.item_id).sale, "engine")
    await shop.pool.execute("UPDATE engine SET redis_address = NULL")
    report = await shop.apply(sold)
    assert (report.state, report.ready, report.rebuilt) == (SaleState.SELLING, True, None)
    sale = await shop.sale(sold.item_id)
    assert sale is not None
    assert (sale.engine, sale.accepted) == (await id_of(shop.pool), 3)
    assert await shop.inventory.index.engine_id() == sale.engine


@pytest.fixture
def moved_url(redis_server: RedisServer) -> str:
    """Another address: the second database of the same server."""
    return f"{url_of(redis_server, TESTER).rpartition('/')[0]}/1"


async def test_a_redis_at_another_address_gets_no_sale_until_it_is_adopted(
    shop: SimulatedShop,
    sold: SaleSpec,
    moved_url: str,
    database_url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    former = shop.inventory.address
    client = redis_client.connect(moved_url)
    try:
        moved = SimulatedShop(client, shop.pool)
        unseen = SaleSpec("default/unseen", f"{sold.item_id}-2", 5)
        row = await shop.row(sold.sale_id)
        for work in (
            moved.apply(sold),
            moved.apply(unseen),
            moved.reconciler.close(sold.sale_id),
            moved.rebuilder.rebuild(row),
        ):
            with pytest.raises(
                RedisMoved, match=rf"in the Redis at {former}, but .*/1: stop every"
            ):
                await work
        assert await client.keys("*") == []
        assert await shop.row(sold.sale_id) == row
        assert await ledger.sale(shop.pool, unseen.sale_id) is None

        environ = {"FLASHSALE_REDIS_URL": moved_url, "FLASHSALE_DATABASE_URL": database_url}
        assert await asyncio.to_thread(run, ["adopt-redis"], environ) == 0
        address = moved.inventory.address
        assert capsys.readouterr().out == (
            f"the sales move from the Redis at {former} to {address}: the operator rebuilds them; "
            "without an operator, run `flashsalectl rebuild --all`\n"
        )
        report = await moved.apply(sold)
        assert (report.state, report.ready) == (SaleState.SELLING, True)
        assert await moved.buy(sold.item_id, "a", "d") == [Outcome.LIMIT_REACHED, Outcome.ACCEPTED]
        with pytest.raises(RedisMoved):
            await shop.apply(sold)

        # The former Redis has kept its keys, and the ledger knows more than they do.
        await moved.record(sold.item_id)
        environ["FLASHSALE_REDIS_URL"] = f"redis://{former}"
        assert await asyncio.to_thread(run, ["adopt-redis"], environ) == 0
        report = await shop.apply(sold)
        assert report.rebuilt is not None
        assert report.rebuilt.redis_lacked == 1
        assert await shop.buy(sold.item_id, "d") == [Outcome.LIMIT_REACHED]
    finally:
        await client.aclose()


async def test_a_redis_that_the_sales_return_to_sells_nothing_before_it_is_rebuilt(
    shop: SimulatedShop,
    sold: SaleSpec,
    redis_server: RedisServer,
    database_url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No operator runs. One sale was rebuilt at the other Redis, and one was closed there."""
    unseen = SaleSpec("default/unseen", f"{sold.item_id}-2", 5)
    await shop.apply(unseen)
    async with shop.at_another_redis(sold, redis_server.url):
        await shop.pool.execute(
            "UPDATE sales SET closed = true, revision = revision + 1 WHERE sale_id = $1",
            unseen.sale_id,
        )
    environ = {"FLASHSALE_REDIS_URL": redis_server.url, "FLASHSALE_DATABASE_URL": database_url}
    assert await asyncio.to_thread(run, ["adopt-redis"], environ) == 0
    assert await shop.buy(sold.item_id, "z") == [Outcome.FENCED]
    assert await shop.buy(unseen.item_id, "z") == [Outcome.ENDED]
    assert capsys.readouterr().err == ""


async def test_a_redis_of_another_engine_cannot_be_adopted(
    shop: SimulatedShop,
    sold: SaleSpec,
    other_pool: ledger.Pool,
    other_database_url: str,
    redis_server: RedisServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environ = {
        "FLASHSALE_REDIS_URL": url_of(redis_server, OPERATOR),
        "FLASHSALE_DATABASE_URL": other_database_url,
    }
    assert await asyncio.to_thread(run, ["adopt-redis"], environ) == 1
    error = capsys.readouterr().err
    assert await id_of(shop.pool) in error
    assert await id_of(other_pool) in error
    assert error.count("\n") == 1
    assert (await shop.apply(sold)).ready
