"""The decisions of a resync, the namespaces that it serves, and the readiness of the operator."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from redis.asyncio import Redis

from dev.stack.servers import PostgresServer
from flashsale import keys, ledger, redis_client
from flashsale.errors import RedisMoved
from flashsale.keys import DEFAULT_ENGINE
from flashsale.ledger import SaleRow
from flashsale.reservations import Outcome
from flashsale.sale import Sale, SaleSpec
from flashsale_operator.kubernetes import resync
from flashsale_operator.kubernetes.client import KubeForbidden
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import Key, Queue
from flashsale_operator.kubernetes.resync import Resync, left_behind, may_be_freed, unclosed
from tests.support.eventually import until
from tests.support.fake_kube import FakeKube, resync_of
from tests.support.ledgers import connected, database, migrate_to, opened, waits
from tests.support.observations import a_row, a_sale
from tests.support.simulated_shop import SimulatedShop

HOUR, NOTHING = timedelta(hours=1), timedelta()
CLOSED = a_sale(stored_state="closed", revision=2)
CLOSED_ROW = a_row(closed=True, revision=2)


def test_an_unclosed_sale_of_a_deleted_flashsale_is_found() -> None:
    rows = [a_row(sale_id="shop/here"), a_row(sale_id="shop/gone"), a_row(sale_id="yard/gone")]
    present = [Key("shop", "here"), Key("yard", "here")]
    assert left_behind(rows, {None: present}) == [Key("shop", "gone"), Key("yard", "gone")]


def test_sales_of_namespaces_that_were_not_listed_are_left_open() -> None:
    rows = [a_row(sale_id="shop/gone"), a_row(sale_id="yard/gone")]
    assert left_behind(rows, {"yard": []}) == [Key("yard", "gone")]


@pytest.mark.parametrize(
    ("row", "sale", "expected"),
    [
        (CLOSED_ROW, a_sale(), True),
        (CLOSED_ROW, a_sale(stored_state="ended"), True),
        (CLOSED_ROW, CLOSED, False),
        (CLOSED_ROW, a_sale(stored_state="ended", revision=2), False),
        (a_row(), a_sale(), False),
        (a_row(), CLOSED, False),
    ],
)
def test_a_close_that_redis_lacks_is_found(row: SaleRow, sale: Sale, expected: bool) -> None:
    assert unclosed(row, sale) is expected


def test_a_closed_sale_may_be_freed_if_it_is_recorded_and_old_enough() -> None:
    assert may_be_freed(CLOSED_ROW, CLOSED, HOUR, HOUR)
    assert not may_be_freed(CLOSED_ROW, CLOSED, HOUR - timedelta(seconds=1), HOUR)
    assert not may_be_freed(a_row(), a_sale(), HOUR, NOTHING)
    assert not may_be_freed(CLOSED_ROW, a_sale(stored_state="closed"), HOUR, NOTHING)
    assert not may_be_freed(replace(CLOSED_ROW, held=1), CLOSED, HOUR, NOTHING)
    for sale in (
        replace(CLOSED, outbox_length=1),
        replace(CLOSED, accepted=1),
        replace(CLOSED, released=1),
        replace(CLOSED, held=1),
    ):
        assert not may_be_freed(CLOSED_ROW, sale, HOUR, NOTHING)


async def test_an_operator_that_migrates_a_large_ledger_is_not_stuck(
    redis: "Redis", postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes would end it, and the migration would begin again."""
    monkeypatch.setattr(resync, "STUCK_SECONDS", 0.0)
    async with database(postgres_server) as url, opened(url) as former, connected(url) as reader:
        await migrate_to(former.pool, 4)
        own = resync_of(SimulatedShop(redis, former.pool), FakeKube(), Queue())
        assert own.stuck
        async with reader.transaction():
            await reader.execute("LOCK TABLE reservations")
            working = asyncio.create_task(own.resync())
            await until(lambda: waits(reader), "the ledger is being migrated")
            assert not own.stuck
        await working
        assert own.stuck


async def test_a_sale_of_a_deleted_namespace_is_closed_by_an_operator_that_may_list_it(
    shop: SimulatedShop, item: str
) -> None:
    gone, here = SaleSpec("gone/phone", item, 5), SaleSpec("yard/phone", f"{item}-2", 5)
    for spec in (gone, here):
        await shop.reconciler.reconcile(spec, "uid-1")
    queue = Queue()
    kube = FakeKube(Key("yard", "phone"), refused=["gone"])
    await resync_of(shop, kube, queue, "shop").resync()
    assert not (await shop.row(gone.sale_id)).closed, "the operator cannot see that it is gone"
    kube.refused = ()
    await resync_of(shop, kube, queue, "shop").resync()
    assert (await shop.row(gone.sale_id)).closed
    assert not (await shop.row(here.sale_id)).closed
    assert kube.events == ["Closed"]
    for spec in (gone, here):
        assert Key.of(spec.sale_id) not in queue, "another operator serves the namespace"


async def test_a_flashsale_that_is_there_at_the_second_look_was_not_deleted(
    shop: SimulatedShop, item: str
) -> None:
    """It was created again after its namespace was listed. The other operator carries it out."""
    spec = SaleSpec("gone/phone", item, 5)
    await shop.reconciler.reconcile(spec, "uid-1")
    kube = FakeKube()
    kube.unlisted = (Key.of(spec.sale_id),)
    await resync_of(shop, kube, Queue(), "shop").resync()
    assert not (await shop.row(spec.sale_id)).closed


@pytest.mark.parametrize("end", ["listed", "closed"])
async def test_an_open_sale_of_a_namespace_that_was_taken_out_of_the_setting_is_unknown(
    shop: SimulatedShop, spec: SaleSpec, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    """Its FlashSale can be changed or deleted, and the operator cannot see it."""
    former = SaleSpec("yard/phone", f"{spec.item_id}-2", 5)
    for each in (spec, former):
        await shop.reconciler.reconcile(each, "uid-1")
    kube, queue, metrics = FakeKube(Key("yard", "phone"), refused=["yard"]), Queue(), Metrics()
    own = resync_of(shop, kube, queue, "default", metrics=metrics)

    def shown() -> list[str]:
        lines = metrics.text().decode().splitlines()
        return [line for line in lines if line.startswith("flashsale_sale") and "phone" in line]

    for _ in range(2):
        await own.resync()
        assert shown() == [
            'flashsale_sale_state{item="",sale="yard/phone",state="Unknown"} 1.0',
            'flashsale_sale_ready{item="",sale="yard/phone"} 0.0',
        ]
    assert caplog.text.count("namespace yard is left out") == 1
    assert Key.of(former.sale_id) not in queue
    if end == "listed":  # another operator serves the namespace
        kube.refused = ()
    else:
        await shop.reconciler.close(former.sale_id)
    await own.resync()
    assert shown() == []


async def test_one_refused_namespace_does_not_stop_the_others(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.reconciler.reconcile(spec, "uid-1")
    queue = Queue()
    kube = FakeKube(refused=["yard"])
    await resync_of(shop, kube, queue, "default", "yard").resync()
    assert await queue.take() == Key.of(spec.sale_id)
    kube.refused = ("default", "yard")
    with pytest.raises(KubeForbidden, match="no FlashSales in default, yard"):
        await resync_of(shop, kube, queue, "default", "yard").resync()


async def test_open_sales_of_a_refused_namespace_are_reconciled_to_show_that_they_are_unknown(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """The operator has just started, so nothing else tells it of them."""
    other = SaleSpec("yard/phone", f"{spec.item_id}-2", 5)
    for each in (spec, other):
        await shop.reconciler.reconcile(each, "uid-1")
    queue = Queue()
    kube = FakeKube(Key.of(spec.sale_id), refused=["yard"])
    await resync_of(shop, kube, queue, "default", "yard").resync()
    assert {await queue.take(), await queue.take()} == {
        Key.of(each.sale_id) for each in (spec, other)
    }


async def test_a_sale_without_a_flashsale_is_fenced_in_a_redis_that_the_sales_have_left(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await ledger.adopt_redis(shop.pool, "another.example:6379/0")
    own = resync_of(shop)
    for accepted, outcome in ((0, Outcome.ACCEPTED), (3, Outcome.FENCED)):  # in the other one
        await shop.pool.execute("UPDATE sales SET accepted = $1", accepted)
        with pytest.raises(RedisMoved):
            await own.resync()
        assert await shop.buy(spec.item_id, "a") == [outcome]


async def unready(shop: SimulatedShop, expected: str, own: Resync | None = None) -> Resync:
    """Run resyncs until one has ended and the operator's readiness has that text.

    An empty text means ready.
    """
    own = own or resync_of(shop)
    before = own.ended

    def look() -> bool:
        found = own.unready
        as_expected = expected in found if found and expected else not found and not expected
        return own.ended != before and as_expected

    running = asyncio.create_task(own.run())
    try:
        await until(look, lambda: f"{expected!r}, but {own.unready!r}", seconds=20)
    finally:
        running.cancel()
        await asyncio.wait([running])
    return own


async def test_the_operator_is_not_ready_until_every_server_has_answered(
    shop: SimulatedShop,
) -> None:
    kube = FakeKube(refused=["default"])
    own = await unready(
        shop, "the account may list no FlashSales", resync_of(shop, kube, Queue(), "default")
    )
    kube.refused = ()
    await unready(shop, "", own)
    away = redis_client.connect("redis://127.0.0.1:1/0")
    without_redis = SimulatedShop(away, shop.pool)
    await unready(
        without_redis, "Redis is unavailable", resync_of(without_redis, FakeKube(), Queue())
    )
    await away.aclose()


async def test_the_operator_is_ready_after_a_resync_and_during_later_outages(
    shop: SimulatedShop,
) -> None:
    await shop.pool.execute("ALTER TABLE sales RENAME TO away")
    own = await unready(shop, 'relation "sales" does not exist')
    await shop.pool.execute("ALTER TABLE away RENAME TO sales")
    await unready(shop, "", own)
    await shop.pool.execute("ALTER TABLE sales RENAME TO away")
    await unready(shop, "", own)


async def test_an_unexpected_error_does_not_end_the_resyncs(
    shop: SimulatedShop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = resync_of(shop)
    with monkeypatch.context() as patch:
        patch.setattr(FakeKube, "flash_sales", None)
        running = asyncio.create_task(own.run())
        await until(lambda: "TypeError" in str(own.unready))
    await until(lambda: own.unready is None)
    running.cancel()
    assert "Traceback" in caplog.text


async def test_the_operator_is_not_ready_while_two_engines_meet(shop: SimulatedShop) -> None:
    own = await unready(shop, "")
    await shop.redis.set(keys.engine_id(DEFAULT_ENGINE), "the-other")
    await unready(shop, "this Redis belongs to engine the-other, and the ledger to engine", own)
    await shop.redis.delete(keys.engine_id(DEFAULT_ENGINE))
    await unready(shop, "", own)
    await shop.pool.execute("UPDATE engine SET redis_address = 'former:6379/0'")
    await unready(shop, "the sales are in the Redis at former:6379/0", own)


async def test_the_row_of_a_sale_has_the_uid_of_its_flashsale(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.reconciler.reconcile(spec, "uid-1")
    assert (await shop.row(spec.sale_id)).resource_uid == "uid-1"
    await shop.apply(spec)
    assert (await shop.row(spec.sale_id)).resource_uid == "uid-1"
    await shop.reconciler.reconcile(spec, "uid-2")
    assert (await shop.row(spec.sale_id)).resource_uid == "uid-2"
    assert (await shop.row(spec.sale_id)).revision == 1


async def test_a_sale_that_flashsalectl_continues_has_no_flashsale_any_more(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """Otherwise the operator would close it again, because its FlashSale was deleted."""
    await shop.reconciler.reconcile(spec, "uid-1")
    kube, queue = FakeKube(), Queue()
    own = resync_of(shop, kube, queue)
    await own._controller.reconcile(Key.of(spec.sale_id))
    assert (await shop.row(spec.sale_id)).closed
    await shop.apply(spec)
    await own.resync()
    assert Key.of(spec.sale_id) not in queue
    await own._controller.reconcile(Key.of(spec.sale_id))
    assert await shop.buy(spec.item_id, "ann") == [Outcome.ACCEPTED]
    assert kube.events == ["Closed"]


async def test_a_flashsale_adopts_a_sale_of_flashsalectl(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    assert (await shop.row(spec.sale_id)).resource_uid is None
    await shop.reconciler.reconcile(spec, "uid-1")
    assert (await shop.row(spec.sale_id)).resource_uid == "uid-1"
