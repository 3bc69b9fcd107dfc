"""The controller and FlashSales, Redis and ledgers of other engines, on real Redis and ledger."""

import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest

from dev.stack.redis_cluster import RedisCluster
from dev.stack.servers import RedisServer
from flashsale import ledger, redis_client
from flashsale.reservations import Outcome
from flashsale.sale import SaleSpec
from flashsale_operator.kubernetes.queue import Key, Requeue
from flashsale_operator.kubernetes.status import Counts
from flashsale_operator.sales.offsets import Span
from tests.support.controllers import FakeKube, controller
from tests.support.eventually import until
from tests.support.simulated_shop import SimulatedShop

OTHER_ID = str(uuid.UUID(int=7))
_COPIED = ("sale_id", "reservation_id", "user_id", "quantity", "state", "version", "accepted_at")


async def test_the_status_names_the_engine_before_anything_else_is_written(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube = FakeKube(spec)

    async def nothing_is_written() -> None:
        assert await ledger.sale(shop.pool, spec.sale_id) is None
        assert await shop.sale(spec.item_id) is None

    kube.before_patch = nothing_is_written
    await controller(shop, kube).reconcile(Key.of(spec.sale_id))
    assert kube.before_patch is None
    assert kube.reasons()["Open"] == "Selling"
    assert kube.status.engine == await shop.inventory.index.engine_id()


async def test_a_flashsale_that_changed_before_the_engine_is_named_is_read_again(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """Another engine may have named itself."""
    kube = FakeKube(spec)
    kube.changed = True
    assert (await controller(shop, kube).reconcile(Key.of(spec.sale_id))).failed
    assert await ledger.sale(shop.pool, spec.sale_id) is None
    assert await shop.sale(spec.item_id) is None


async def test_a_flashsale_of_another_engine_is_left_alone_with_one_event(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube = FakeKube(spec)
    kube.live["status"] = {"engine": OTHER_ID}
    own = controller(shop, kube)
    for _ in range(3):
        assert await own.reconcile(Key.of(spec.sale_id)) == Requeue()
    assert (kube.live["status"], kube.patches) == ({"engine": OTHER_ID}, 0)
    assert await ledger.sale(shop.pool, spec.sale_id) is None
    assert await shop.sale(spec.item_id) is None
    assert kube.events == ["OtherEngine"]
    assert OTHER_ID in kube.messages[0]
    assert await shop.inventory.index.engine_id() in kube.messages[0]


async def test_a_sale_whose_flashsale_another_engine_has_taken_is_closed(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube = FakeKube(spec)
    own = controller(shop, kube)
    await own.reconcile(Key.of(spec.sale_id))
    kube.live["metadata"] |= {"uid": "uid-2"}
    kube.live["status"] = {"engine": OTHER_ID}
    patches = kube.patches
    assert await own.reconcile(Key.of(spec.sale_id)) == Requeue()
    assert (await shop.row(spec.sale_id)).closed
    assert await shop.buy(spec.item_id, "ann") == [Outcome.ENDED]
    assert kube.patches == patches


async def test_a_flashsale_that_returns_with_another_item_closes_the_former_sale(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube = FakeKube(spec)
    own, key = controller(shop, kube), Key.of(spec.sale_id)
    await own.reconcile(key)
    kube.live["metadata"] |= {"uid": "uid-2"}
    kube.live["spec"] |= {"itemId": f"{spec.item_id}-b"}
    del kube.live["status"]
    for _ in range(2):
        await own.reconcile(key)
        assert kube.reasons()["Ready"] == "ItemChanged"
        row = await shop.row(spec.sale_id)
        assert (row.closed, row.revision, row.resource_uid) == (True, 2, "uid-1")
    assert await shop.buy(spec.item_id, "ann") == [Outcome.ENDED]
    kube.live["metadata"] |= {"uid": "uid-3"}
    kube.live["spec"] |= {"itemId": spec.item_id}
    await own.reconcile(key)
    assert await shop.buy(spec.item_id, "ann") == [Outcome.ACCEPTED]


@pytest.mark.parametrize("uid", ["uid-1", None])
async def test_a_sale_continues_if_no_other_flashsale_declared_it(
    shop: SimulatedShop, spec: SaleSpec, uid: str | None
) -> None:
    """Its own FlashSale has a mistake, or the sale belongs to flashsalectl."""
    await shop.reconciler.reconcile(spec, uid)
    kube = FakeKube(spec)
    kube.live["spec"] |= {"itemId": f"{spec.item_id}-b"}
    await controller(shop, kube).reconcile(Key.of(spec.sale_id))
    assert kube.reasons()["Ready"] == "ItemChanged"
    assert (await shop.row(spec.sale_id)).resource_uid == uid
    assert await shop.buy(spec.item_id, "ann") == [Outcome.ACCEPTED]


async def test_without_ledger_and_redis_a_flashsale_of_any_engine_is_left_alone(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """The operator cannot know yet whether it is its own."""
    kube = FakeKube(spec)
    kube.live["status"] = {"engine": OTHER_ID}
    await shop.pool.execute("ALTER TABLE engine RENAME TO away")
    assert (await controller(shop, kube).reconcile(Key.of(spec.sale_id))).failed
    assert (kube.patches, kube.events) == (0, [])


async def test_an_operator_makes_no_new_ledger_while_a_person_restores_the_backup(
    shop: SimulatedShop, spec: SaleSpec, caplog: pytest.LogCaptureFixture
) -> None:
    """The new ledger would be that of another engine, and the backup could not be restored."""
    kube = FakeKube(spec)
    own, key = controller(shop, kube), Key.of(spec.sale_id)
    await own.reconcile(key)
    await shop.pool.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    for _ in range(3):
        assert (await own.reconcile(key)).failed
    assert await own.close_deleted(key) == Requeue(failed=True)
    assert await shop.pool.fetchval("SELECT to_regclass('engine') IS NULL")
    assert kube.reasons()["Ready"] == "LedgerUnavailable"
    assert "the database has lost the ledger's tables: restore the backup" in caplog.text


async def test_a_sale_that_the_ledger_and_redis_have_lost_is_not_sold_again(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """The backup is older than the sale, whose events Kafka still has."""
    kube = FakeKube(sold)
    own, key = controller(shop, kube), Key.of(sold.sale_id)
    await own.reconcile(key)
    rows = await shop.pool.fetch("DELETE FROM reservations RETURNING *")
    await shop.pool.execute("DELETE FROM sales")
    await shop.redis.flushall()
    shop.topic = {0: Span(0, 3)}

    async def waits_for_the_ledger() -> bool:
        await own.reconcile(key)
        assert Outcome.ACCEPTED not in await shop.buy(sold.item_id, "d")
        message = kube.status.conditions[0].message
        return "the ledger has read partition 0 to offset 0 of 3" in message

    async def sells() -> bool:
        await own.reconcile(key)
        return kube.reasons()["Open"] == "Selling"

    assert len(rows) == 3
    await until(waits_for_the_ledger, "the rebuild waits for the events")
    await shop.pool.executemany(
        "INSERT INTO reservations (sale_id, reservation_id, user_id, quantity, state, version, "
        "accepted_at, confirmed_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $7)",
        [tuple(row[name] for name in _COPIED) for row in rows],
    )
    await shop.pool.execute("UPDATE sales SET accepted = 3")
    await shop.read_to(0, 3)
    await until(sells, "the sale is rebuilt", seconds=15)
    assert kube.status.counts == Counts(10, 3, 7, 0, 3)
    assert await shop.buy(sold.item_id, "a") == [Outcome.LIMIT_REACHED]


async def test_a_ledger_of_another_name_is_reported(shop: SimulatedShop, spec: SaleSpec) -> None:
    await shop.pool.execute("UPDATE engine SET name = 'brand'")
    kube = FakeKube(spec)
    assert (await controller(shop, kube).reconcile(Key.of(spec.sale_id))).failed
    assert kube.reasons()["Ready"] == "OtherEngine"
    assert kube.status.engine is None


async def test_a_redis_at_another_address_is_reported(shop: SimulatedShop, spec: SaleSpec) -> None:
    await shop.pool.execute("UPDATE engine SET redis_address = 'former:6379/0'")
    kube = FakeKube(spec)
    assert (await controller(shop, kube).reconcile(Key.of(spec.sale_id))).failed
    assert kube.reasons()["Ready"] == "RedisMoved"
    assert await ledger.sale(shop.pool, spec.sale_id) is None
    assert await shop.redis.keys("*") == []


@pytest.mark.parametrize("prefix", ["", "other-"])
async def test_a_redis_that_the_sales_have_left_sells_no_unit_again(
    shop: SimulatedShop, sold: SaleSpec, redis_server: RedisServer, prefix: str
) -> None:
    """A rollback starts the API at the former address, at which the sale was never paused."""
    client = redis_client.connect(f"{redis_server.url.rpartition('/')[0]}/1")
    moved = SimulatedShop(client, shop.pool)
    kube = FakeKube(sold)
    await controller(shop, kube).reconcile(Key.of(sold.sale_id))
    former = controller(shop, kube, {"default": prefix} if prefix else {})
    try:
        await ledger.adopt_redis(shop.pool, moved.inventory.address)
        # It lacks no unit of the ledger, so it may be the right Redis by another name.
        await former.reconcile(Key.of(sold.sale_id))
        assert await shop.buy(sold.item_id, "d") == [Outcome.ACCEPTED]
        await shop.record(sold.item_id)
        await moved.apply(sold)
        assert await moved.buy(sold.item_id, "e", "f") == [Outcome.ACCEPTED] * 2
        await moved.record(sold.item_id)
        await former.reconcile(Key.of(sold.sale_id))
        assert await shop.buy(sold.item_id, "g") == [Outcome.FENCED]
        assert kube.reasons()["Ready"] == "RedisMoved"
        await ledger.adopt_redis(shop.pool, shop.inventory.address)
        await shop.apply(sold)
        assert await shop.buy(sold.item_id, "f", "g") == [
            Outcome.LIMIT_REACHED,
            Outcome.ACCEPTED,
        ]
    finally:
        await client.aclose()


async def test_every_node_of_a_cluster_that_the_sales_have_left_is_fenced(
    redis_cluster: RedisCluster, pool: ledger.Pool, new_item: Callable[[], str]
) -> None:
    client = redis_client.connect(redis_cluster.url)
    shop, left = SimulatedShop(client, pool), set[str]()
    try:
        await shop.inventory.nodes.all()
        while len(left) < 2:
            item = new_item()
            if (node := shop.inventory.node_of(item)) in left:
                continue
            spec = SaleSpec(f"default/{item}", item, 10)
            await shop.apply(spec)
            # Three units were sold at another Redis.
            await pool.execute("UPDATE sales SET accepted = 3 WHERE sale_id = $1", spec.sale_id)
            await shop.reconciler.stop_outdated(spec.sale_id, "")
            assert await shop.buy(item, "z") == [Outcome.FENCED], node
            left.add(node)
    finally:
        await client.aclose()


async def test_a_former_redis_is_fenced_if_it_is_from_before_the_last_rebuild(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """It lacks no unit, but a buyer can have given one back at another Redis."""
    await shop.pool.execute("UPDATE sales SET rebuilt_revision = revision")
    await shop.reconciler.stop_outdated(sold.sale_id, "")
    assert await shop.buy(sold.item_id, "d") == [Outcome.FENCED]


async def test_a_former_redis_with_an_open_hold_is_not_fenced_if_it_lacks_nothing(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(replace(spec, hold_seconds=600))
    await shop.buy(spec.item_id, "a")
    await shop.record(spec.item_id)
    await shop.reconciler.stop_outdated(spec.sale_id, "")
    assert await shop.buy(spec.item_id, "b") == [Outcome.ACCEPTED]


async def test_a_crd_without_the_engine_is_reported(shop: SimulatedShop, spec: SaleSpec) -> None:
    kube = FakeKube(spec)
    kube.fields = kube.fields - {"engine"}
    assert (await controller(shop, kube).reconcile(Key.of(spec.sale_id))).failed
    ready = kube.status.condition("Ready")
    assert ready is not None
    assert ready.message.startswith("the CustomResourceDefinition has no status.engine: install")
    assert await ledger.sale(shop.pool, spec.sale_id) is None
