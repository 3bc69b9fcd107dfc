"""Rebuilds during which something else happens, on real Redis and PostgreSQL."""

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest

from flashsale import heartbeat, ledger
from flashsale.clocks import ServerTime
from flashsale.errors import LedgerUnavailable, RedisUnavailable
from flashsale.inventory import Closed, Inventory
from flashsale.keys import ItemKeys
from flashsale.reservations import Outcome
from flashsale.sale import Sale, SaleSpec, SaleState
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.sales.decision import StillFenced, spec_of
from flashsale_operator.sales.drain import Drain, Patience
from flashsale_operator.sales.offsets import Span
from flashsale_operator.sales.rebuild import Rebuilder, Rebuilt
from flashsale_operator.sales.reconciler import Reconciler
from flashsale_operator.sales.recovery import Fenced, Recovery, Step, Trusted
from tests.support.eventually import until
from tests.support.proxy import Proxy
from tests.support.simulated_shop import SimulatedShop


async def begin(shop: SimulatedShop, spec: SaleSpec, claim: int) -> None:
    """Run a rebuild up to its first write."""
    recovery, row = Recovery(shop.redis), await shop.row(spec.sale_id)
    assert await recovery.fence(spec_of(row), claim) is Fenced.FENCED
    assert await recovery.fence(spec_of(row), claim, step="begin") is Fenced.BEGUN


@pytest.mark.parametrize("step", ["fence", "wait", "begin"])
async def test_a_rebuild_ends_if_the_server_has_another_run(
    shop: SimulatedShop, sold: SaleSpec, step: Step
) -> None:
    """The heartbeats on another server say nothing about the pods that this one waited for."""
    await shop.redis.hset(ItemKeys.of(sold.item_id).sale, "run_id", "0" * 40)
    recovery, row = Recovery(shop.redis), await shop.row(sold.sale_id)
    claim, run_id = row.revision + 1, (await shop.inventory.server()).run_id
    assert await recovery.fence(spec_of(row), claim, run_id=run_id) is Fenced.FENCED
    answer = await recovery.fence(spec_of(row), claim, step=step, run_id="another")
    assert answer is Fenced.SUPERSEDED
    again = await recovery.fence(spec_of(row), claim, step="wait", run_id=run_id)
    assert again is Fenced.FENCED


async def end_lease(shop: SimulatedShop, spec: SaleSpec) -> None:
    """Let the lease of the rebuild run out."""
    await shop.redis.hset(ItemKeys.of(spec.item_id).sale, "rebuild_until_ms", "1")


async def test_an_overtaken_rebuild_cannot_write(shop: SimulatedShop, sold: SaleSpec) -> None:
    recovery = Recovery(shop.redis)
    await shop.redis.flushall()
    run_id = (await shop.inventory.server()).run_id
    await begin(shop, sold, 1)
    assert await shop.rebuild(sold) == StillFenced(
        ("another operator or flashsalectl is rebuilding it",)
    )
    await end_lease(shop, sold)
    assert isinstance(await shop.rebuild(sold), Rebuilt)
    assert await shop.buy(sold.item_id, "d") == [Outcome.ACCEPTED]
    before = await shop.sale(sold.item_id)
    row = spec_of(await shop.row(sold.sale_id))
    assert await recovery.fence(row, 1) is Fenced.TRUSTED
    assert await recovery.fence(row, 1, step="begin") is Fenced.SUPERSEDED
    assert await recovery.restore(sold.item_id, 1, buyers={"e": (1, 0)}) is Trusted.SUPERSEDED
    ended = await recovery.trust(
        sold.item_id, 1, run_id, accepted=0, released=0, held=0, reservations=0, buyers=0, holds=0
    )
    assert ended is Trusted.SUPERSEDED
    assert await shop.sale(sold.item_id) == before


async def test_a_page_renews_the_lease_of_its_rebuild(shop: SimulatedShop, sold: SaleSpec) -> None:
    recovery = Recovery(shop.redis)
    await shop.redis.flushall()
    await begin(shop, sold, 9)
    await end_lease(shop, sold)
    assert await recovery.restore(sold.item_id, 9) is Trusted.RESTORED
    assert await recovery.rebuilding(sold.item_id)


async def test_a_rebuild_that_waits_for_its_turn_to_write_renews_its_lease(
    shop: SimulatedShop, sold: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = asyncio.Semaphore(0)
    drained = asyncio.Event()

    async def wait(*_: object) -> dict[int, int]:
        drained.set()
        return {}

    monkeypatch.setattr(shop.drain, "wait", wait)
    monkeypatch.setattr(shop.rebuilder, "_writes", turns)
    await shop.redis.flushall()
    rebuilding = asyncio.create_task(shop.rebuild(sold))
    await drained.wait()
    await end_lease(shop, sold)
    await until(lambda: Recovery(shop.redis).rebuilding(sold.item_id))
    turns.release()
    assert isinstance(await rebuilding, Rebuilt)


async def test_a_ledger_replaced_by_an_older_copy_after_the_wait_ends_the_rebuild(
    shop: SimulatedShop, sold: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rebuilt sale would lack events that Kafka still has, and the ledger would refuse them."""
    shop.topic[0] = Span(0, 5)
    await shop.read_to(0, 5)
    await shop.redis.flushall()
    wait = shop.drain.wait

    async def wait_and_go_back(*arguments: Any) -> dict[int, int]:  # noqa: ANN401
        offsets = await wait(*arguments)
        await shop.read_to(0, 4)
        return offsets

    monkeypatch.setattr(shop.drain, "wait", wait_and_go_back)
    assert await shop.rebuild(sold) == StillFenced(
        ("another process changed or rebuilt it: the rebuild starts again",)
    )
    assert (await shop.row(sold.sale_id)).rebuilt_revision == 0
    assert await shop.buy(sold.item_id, "d") == [Outcome.FENCED]


async def test_a_lease_under_the_clock_of_a_former_server_is_void(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """The rebuild died before Redis failed over to a server whose clock is a minute behind."""
    recovery, row = Recovery(shop.redis), await shop.row(sold.sale_id)
    await shop.redis.flushall()
    await begin(shop, sold, 9)
    until_ms = (await shop.inventory.server()).now_ms + 60_000
    await shop.redis.hset(ItemKeys.of(sold.item_id).sale, "rebuild_until_ms", str(until_ms))
    assert not await recovery.rebuilding(sold.item_id)
    assert await recovery.fence(spec_of(row), 8) is Fenced.FENCED
    assert await recovery.rebuilding(sold.item_id)
    assert await recovery.fence(spec_of(row), 7) is Fenced.REBUILDING


async def test_a_rebuild_suspended_during_a_wipe_of_redis_cannot_begin(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """Its wait ended before later reservations, which Redis has lost."""
    recovery, row = Recovery(shop.redis), await shop.row(sold.sale_id)
    await shop.redis.flushall()
    assert await recovery.fence(spec_of(row), 7) is Fenced.FENCED
    await end_lease(shop, sold)
    assert isinstance(await shop.rebuild(sold), Rebuilt)
    await shop.redis.flushall()
    assert await recovery.fence(spec_of(row), 7, step="begin") is Fenced.SUPERSEDED


async def test_a_wipe_of_redis_during_the_wait_ends_the_rebuild(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """The wipe deletes the heartbeat of a pod that still has to publish an event."""
    server = await shop.inventory.server()
    sampled = ServerTime(server.now_ms + 4_000, server.run_id)
    await heartbeat.beat(shop.redis, "pod-1", {sold.item_id: 1}, {"": sampled})
    waiting: list[tuple[str, str]] = []
    drain = Drain(shop.inventory, shop.pool, shop.spans, patience=Patience(unseen=0.5))
    rebuilder = Rebuilder(
        shop.inventory, shop.pool, drain, lambda sale_id, step: waiting.append((sale_id, step))
    )
    await shop.redis.delete(*ItemKeys.of(sold.item_id).sold)
    row = await shop.row(sold.sale_id)
    rebuilding = asyncio.create_task(rebuilder.rebuild(row))
    await until(lambda: waiting)
    assert waiting == [(sold.sale_id, "pod pod-1 has 1 unacknowledged event")]
    await shop.redis.flushall()
    assert await rebuilding == StillFenced(
        ("another process changed or rebuilt it: the rebuild starts again",)
    )
    # The ledger noted no rebuild, so it does not refuse the event of the pod.
    assert await shop.pool.fetchval("SELECT max(rebuilt_revision) FROM sales") in (None, 0)
    assert await shop.buy(sold.item_id, "z") != [Outcome.ACCEPTED]


async def test_a_sale_closed_during_its_rebuild_stays_closed(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    recovery, row = Recovery(shop.redis), await shop.row(sold.sale_id)
    await shop.redis.flushall()
    claim = row.revision + 1
    assert await recovery.fence(spec_of(row), claim) is Fenced.FENCED
    assert await shop.inventory.close(sold.item_id, sold.sale_id, claim + 1) is Closed.CLOSED
    assert await recovery.fence(spec_of(row), claim, step="begin") is Fenced.SUPERSEDED


async def test_a_rebuild_fails_if_redis_restarts_during_it(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    recovery = Recovery(shop.redis)
    await shop.redis.flushall()
    await begin(shop, sold, 5)
    ended = await recovery.trust(
        sold.item_id,
        5,
        "an earlier run",
        accepted=0,
        released=0,
        held=0,
        reservations=0,
        buyers=0,
        holds=0,
    )
    assert ended is Trusted.RESTARTED
    run_id = (await shop.inventory.server()).run_id
    ended = await recovery.trust(
        sold.item_id, 5, run_id, accepted=3, released=0, held=0, reservations=3, buyers=3, holds=0
    )
    assert ended is Trusted.INCOMPLETE
    assert await shop.buy(sold.item_id, "z") == [Outcome.FENCED]


async def test_a_sale_that_is_recorded_during_the_look_is_not_fenced(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    class Selling(Inventory):
        """Sells and records a unit after each read of Redis."""

        async def observe(self, item_id: str) -> tuple[Sale | None, ServerTime]:
            found = await super().observe(item_id)
            await shop.buy(sold.item_id, str(uuid.uuid4()))
            await shop.record(sold.item_id)
            return found

    reconciler = Reconciler(Selling(shop.redis), shop.pool, shop.rebuilder.rebuild)
    report = await reconciler.reconcile(sold)
    assert (report.state, report.ready, report.rebuilt) == (SaleState.SELLING, True, None)
    assert report.sale is not None
    assert report.row is not None
    assert report.row.accepted > report.sale.accepted


async def lost_in_rebuild(shop: SimulatedShop, spec: SaleSpec) -> int:
    done = await shop.rebuild(spec)
    assert isinstance(done, Rebuilt)
    return done.lost


@pytest.mark.parametrize("fault", ["not sent", "no reply", "failover"])
async def test_lost_units_are_counted_once_if_redis_fails_during_the_rebuild(
    shop: SimulatedShop, spec: SaleSpec, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Redis fails when the ledger has counted them and the keys are about to be emptied."""
    sale = ItemKeys.of(spec.item_id).sale
    fence = Recovery.fence

    async def fail(self: Recovery, *arguments: Any, **options: Any) -> Fenced:  # noqa: ANN401
        if options["step"] == "begin":
            before: Any = await shop.redis.hgetall(sale)
            if fault != "not sent":
                assert await fence(self, *arguments, **options) is Fenced.BEGUN
            if fault == "failover":  # to a replica that lagged
                await shop.redis.hset(sale, mapping=before)
            raise RedisUnavailable(fault)
        return await fence(self, *arguments, **options)

    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id, lose=1)
    await shop.change_run(spec.item_id)
    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "fence", fail)
        for _ in range(2):
            with pytest.raises(RedisUnavailable, match=fault):
                await shop.rebuild(spec)
            await end_lease(shop, spec)
    assert await lost_in_rebuild(shop, spec) == 1
    assert (await shop.row(spec.sale_id)).lost == 1
    # The next loss counts again.
    assert await shop.buy(spec.item_id, "d", "e") == [Outcome.ACCEPTED] * 2
    await shop.record(spec.item_id, lose=1)
    await shop.change_run(spec.item_id)
    assert await lost_in_rebuild(shop, spec) == 1
    assert (await shop.row(spec.sale_id)).lost == 2


async def test_lost_units_are_reported_if_the_reply_to_their_commit_is_lost(
    shop: SimulatedShop, spec: SaleSpec, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id, lose=1)
    await shop.change_run(spec.item_id)
    url = urlsplit(database_url)
    async with Proxy(url.port or 5432).serve() as proxy:
        host = url.netloc.rpartition(":")[0]
        pool = await ledger.connect(url._replace(netloc=f"{host}:{proxy.port}").geturl())
        rebuilder = Rebuilder(shop.inventory, pool, shop.drain)
        wait = shop.drain.wait

        async def cut_the_next_commit(*arguments: Any) -> Mapping[int, int]:  # noqa: ANN401
            drained = await wait(*arguments)
            proxy.cut_replies(b"COMMIT;", 1)
            return drained

        with monkeypatch.context() as patch:
            patch.setattr(shop.drain, "wait", cut_the_next_commit)
            with pytest.raises(LedgerUnavailable):
                await rebuilder.rebuild(await shop.row(spec.sale_id))
        assert (await shop.row(spec.sale_id)).lost == 1
        await end_lease(shop, spec)
        done = await rebuilder.rebuild(await shop.row(spec.sale_id))
        await pool.close()
    assert isinstance(done, Rebuilt)
    assert done.lost == 1


async def test_lost_units_are_in_the_metrics_if_the_operator_dies_during_the_rebuild(
    shop: SimulatedShop, spec: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id, lose=1)
    await shop.change_run(spec.item_id)

    async def die(*_: object, **__: object) -> Trusted:
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "restore", die)
        with pytest.raises(asyncio.CancelledError):
            await shop.rebuild(spec)
    await end_lease(shop, spec)
    result = await SimulatedShop(shop.redis, shop.pool).apply(spec)
    assert (result.ready, result.rebuilt and result.rebuilt.lost) == (True, 0)
    metrics = Metrics()
    metrics.sales.update(("shop", "phones"), result)
    labels = f'{{item="{spec.item_id}",sale="shop/phones"}}'
    assert f"flashsale_sale_lost_units{labels} 1.0" in metrics.text().decode()


async def test_concurrent_rebuilds_give_one_correct_sale(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.redis.flushall()
    done = await asyncio.gather(*(shop.rebuild(sold) for _ in range(5)))
    assert any(isinstance(each, Rebuilt) for each in done)
    sale = await shop.sale(sold.item_id)
    assert sale is not None
    assert (sale.accepted, sale.available, sale.torn) == (3, 7, False)
