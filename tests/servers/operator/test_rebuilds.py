"""Rebuilds in the background of the reconciles."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import pytest

from flashsale import ledger
from flashsale.errors import LedgerUnavailable
from flashsale.keys import ItemKeys
from flashsale.ledger import SaleRow
from flashsale.reservations import Outcome
from flashsale.sale import Predecessor, SaleSpec, SaleState
from flashsale_operator.app import CONNECTIONS
from flashsale_operator.kubernetes import rebuilds
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import Key, Queue, Requeue
from flashsale_operator.kubernetes.rebuilds import Rebuilds
from flashsale_operator.sales.decision import Reason, StillFenced
from flashsale_operator.sales.offsets import KafkaUnavailable, SharedSpans, Span
from flashsale_operator.sales.rebuild import Rebuilt
from flashsale_operator.sales.reconciler import Reconciler
from flashsale_operator.sales.recovery import Recovery, Trusted
from tests.support.eventually import until
from tests.support.simulated_shop import QUICK, SimulatedShop


async def woken(queue: Queue) -> str:
    """Wait for the next FlashSale in the queue and return its sale id."""
    async with asyncio.timeout(30):
        return (await queue.take()).sale_id


async def nothing() -> Mapping[int, Span]:
    return {0: Span(0, 0)}


async def without_kafka() -> Mapping[int, Span]:
    raise KafkaUnavailable("Kafka is away: no answer in time")


@pytest.fixture
async def fenced(shop: SimulatedShop, spec: SaleSpec) -> SaleSpec:
    """A sale with one unit sold and recorded, after a restart of Redis."""
    await shop.apply(spec)
    await shop.buy(spec.item_id, "ada")
    await shop.record(spec.item_id)
    await shop.redis.hset(ItemKeys.of(spec.item_id).sale, "run_id", "0" * 40)
    return spec


async def test_a_rebuild_wakes_its_flashsale_and_returns_its_result_once(
    shop: SimulatedShop, fenced: SaleSpec
) -> None:
    queue = Queue()
    own = Rebuilds(shop.inventory, shop.pool, nothing, queue, Metrics(), patience=QUICK)
    row = await shop.row(fenced.sale_id)
    assert str(await own.rebuild(row)).startswith("being rebuilt from the ledger: ")
    assert await woken(queue) == fenced.sale_id
    assert own.outcome(fenced.sale_id, wakes=False) is None, "its FlashSale reports the result"
    done = own.outcome(fenced.sale_id)
    assert done is not None
    assert (done.accepted, done.reservations) == (1, 1)
    assert own.outcome(fenced.sale_id) is done, "until it is reported"
    own.reported(fenced.sale_id, done)
    assert own.outcome(fenced.sale_id) is None
    await own.close()


async def test_a_reconcile_that_read_redis_before_the_end_of_a_rebuild_loses_no_outcome(
    shop: SimulatedShop, fenced: SaleSpec
) -> None:
    queue = Queue()
    own = Rebuilds(shop.inventory, shop.pool, nothing, queue, Metrics(), patience=QUICK)
    row = await shop.row(fenced.sale_id)
    for _ in range(2):
        # To the second call the sale is still fenced.
        await own.rebuild(row)
        assert await woken(queue) == fenced.sale_id
        queue.give_back(Key.of(fenced.sale_id), Requeue())
    done = own.outcome(fenced.sale_id)
    assert done is not None
    assert (done.accepted, done.reservations) == (1, 1)
    await own.close()


async def test_a_reconcile_that_sees_a_trusted_sale_before_its_rebuild_does_loses_no_outcome(
    shop: SimulatedShop, fenced: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust: Callable[..., Awaitable[Trusted]] = Recovery.trust
    trusted, answer = asyncio.Event(), asyncio.Event()

    async def late(*arguments: object, **counts: object) -> Trusted:
        found = await trust(*arguments, **counts)
        trusted.set()
        await answer.wait()
        return found

    monkeypatch.setattr(Recovery, "trust", late)
    queue = Queue()
    own = Rebuilds(shop.inventory, shop.pool, nothing, queue, Metrics(), patience=QUICK)
    await own.rebuild(await shop.row(fenced.sale_id))
    await trusted.wait()
    assert own.outcome(fenced.sale_id) is None
    answer.set()
    assert await woken(queue) == fenced.sale_id, "so that the outcome is reported"
    done = own.outcome(fenced.sale_id)
    assert done is not None
    assert (done.accepted, done.reservations) == (1, 1)
    await own.close()


async def test_a_sale_that_is_fenced_again_during_a_reconcile_has_the_outcome_of_both_rebuilds(
    shop: SimulatedShop, fenced: SaleSpec
) -> None:
    sale = ItemKeys.of(fenced.item_id).sale
    calls = 0

    async def rebuild(row: SaleRow, replaces: Predecessor | None) -> Rebuilt | StillFenced:
        nonlocal calls
        done = await shop.rebuilder.rebuild(row, replaces)
        calls += 1
        if calls <= 2:
            # Redis fails over, and has units that never reached the ledger.
            await shop.redis.hincrby(sale, "accepted", calls)
            await shop.redis.hset(sale, "run_id", "0" * 40)
        return done

    result = await Reconciler(shop.inventory, shop.pool, rebuild).reconcile(fenced)
    assert (result.state, calls) == (SaleState.SELLING, 3)
    assert result.rebuilt is not None
    assert result.rebuilt.lost == 1 + 2
    assert (await shop.row(fenced.sale_id)).lost == 1 + 2


async def test_a_report_of_one_rebuild_keeps_the_outcome_of_the_next(
    shop: SimulatedShop, fenced: SaleSpec
) -> None:
    """The sale was fenced again while the status was written."""
    queue, key = Queue(), Key.of(fenced.sale_id)
    own = Rebuilds(shop.inventory, shop.pool, nothing, queue, Metrics(), patience=QUICK)
    row = await shop.row(fenced.sale_id)
    outcomes: list[Rebuilt] = []
    for _ in range(2):
        await own.rebuild(row)
        assert await woken(queue) == fenced.sale_id
        queue.give_back(key, Requeue(gone=True))
        outcomes += [done] if (done := own.outcome(fenced.sale_id)) else []
        await shop.redis.hset(ItemKeys.of(fenced.item_id).sale, "run_id", "0" * 40)
    first, second = outcomes
    own.reported(fenced.sale_id, first)
    assert own.outcome(fenced.sale_id) is second


async def test_a_sale_that_needs_no_rebuild_any_more_gives_up_its_turn(
    shop: SimulatedShop, fenced: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process rebuilt it, or it was closed."""
    monkeypatch.setattr(rebuilds, "REBUILDS_AT_ONCE", 0)
    own = Rebuilds(shop.inventory, shop.pool, nothing, Queue(), Metrics(), patience=QUICK)
    row, before = await shop.row(fenced.sale_id), asyncio.all_tasks()
    await own.rebuild(row)
    assert str(await own.rebuild(row)).endswith("waiting for its turn")
    assert asyncio.all_tasks() > before
    assert own.outcome(fenced.sale_id) is None
    await until(lambda: asyncio.all_tasks() == before, "the rebuild is gone")


async def test_a_finished_sale_that_is_applied_again_does_not_wait_for_finished_sales(
    shop: SimulatedShop, fenced: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilds, "FINISHED_AT_ONCE", 0)
    queue = Queue()
    own = Rebuilds(shop.inventory, shop.pool, nothing, queue, Metrics(), patience=QUICK)
    row = await shop.row(fenced.sale_id)
    await own.rebuild(replace(row, closed=True), wakes=False)
    await own.rebuild(row)
    assert await woken(queue) == fenced.sale_id
    assert own.outcome(fenced.sale_id) is not None
    await own.close()


async def test_a_closed_sale_with_open_holds_does_not_wait_for_finished_sales(
    shop: SimulatedShop, fenced: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holds end only after its rebuild."""
    monkeypatch.setattr(rebuilds, "FINISHED_AT_ONCE", 0)
    queue = Queue()
    own = Rebuilds(shop.inventory, shop.pool, nothing, queue, Metrics(), patience=QUICK)
    await own.rebuild(replace(await shop.row(fenced.sale_id), closed=True, held=1))
    assert await woken(queue) == fenced.sale_id
    await own.close()


async def test_rebuilds_leave_connections_to_the_ledger_for_reconciles(
    shop: SimulatedShop, spec: SaleSpec, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart of Redis, many large sales are written at once."""
    specs = [
        replace(spec, sale_id=f"{spec.sale_id}-{n}", item_id=f"{spec.item_id}-{n}")
        for n in range(12)
    ]
    for each in specs:
        await shop.apply(each)
        await shop.buy(each.item_id, "ada")
        await shop.record(each.item_id)
        await shop.redis.hset(ItemKeys.of(each.item_id).sale, "run_id", "0" * 40)
    restore: Callable[..., Awaitable[Trusted]] = Recovery.restore
    writing, done = 0, asyncio.Event()

    async def slow(*arguments: object, **records: object) -> Trusted:
        nonlocal writing
        writing += 1
        await done.wait()
        return await restore(*arguments, **records)

    monkeypatch.setattr(Recovery, "restore", slow)
    pool = await ledger.connect(database_url, max_connections=CONNECTIONS)
    own = Rebuilds(shop.inventory, pool, nothing, Queue(), Metrics(), patience=QUICK)
    for each in specs:
        await own.rebuild(await shop.row(each.sale_id))
    await until(lambda: writing)
    await asyncio.sleep(2 * QUICK.quiet)
    async with asyncio.timeout(30):
        assert await ledger.sale(pool, spec.sale_id) is None
    done.set()
    await until(lambda: all(own.outcome(each.sale_id) for each in specs))
    await own.close()
    pool.terminate()


async def test_the_cause_of_a_failed_rebuild_is_reported_until_the_retry(
    shop: SimulatedShop, fenced: SaleSpec
) -> None:
    await shop.redis.xadd(ItemKeys.of(fenced.item_id).outbox, {"id": "x"})
    queue = Queue()
    own = Rebuilds(shop.inventory, shop.pool, nothing, queue, Metrics(), patience=QUICK)
    row = await shop.row(fenced.sale_id)
    await own.rebuild(row)
    await woken(queue)
    for _ in range(3):
        assert await own.rebuild(row) == StillFenced(
            ("the outbox has 1 event that Kafka has not acknowledged",)
        )
    await own.close()


async def test_a_rebuild_without_kafka_reports_kafka(shop: SimulatedShop, fenced: SaleSpec) -> None:
    queue = Queue()
    own = Rebuilds(shop.inventory, shop.pool, without_kafka, queue, Metrics(), patience=QUICK)
    row = await shop.row(fenced.sale_id)
    await own.rebuild(row)
    await woken(queue)
    still_fenced = await own.rebuild(row)
    assert still_fenced == StillFenced(("Kafka is away: no answer in time",), without_kafka=True)
    own.forget(fenced.sale_id)
    await own.close()


async def test_an_outage_during_a_rebuild_is_raised_by_the_next_call(
    shop: SimulatedShop, fenced: SaleSpec
) -> None:
    pool = await ledger.connect("postgresql://nobody@127.0.0.1:1/none")
    queue = Queue()
    own = Rebuilds(shop.inventory, pool, nothing, queue, Metrics(), patience=QUICK)
    row = await shop.row(fenced.sale_id)
    await own.rebuild(row)
    await woken(queue)
    with pytest.raises(LedgerUnavailable):
        await own.rebuild(row)
    assert str(await own.rebuild(row)).startswith("being rebuilt"), "the next call starts again"
    await own.close()
    pool.terminate()


async def test_an_unexpected_error_during_a_rebuild_is_logged_reported_and_retried(
    shop: SimulatedShop,
    fenced: SaleSpec,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(rebuilds, "REBUILD_RETRY_SECONDS", 0.1)
    broken = True

    async def spans() -> Mapping[int, Span]:
        if broken:
            raise ZeroDivisionError
        return await nothing()

    queue = Queue()
    own = Rebuilds(shop.inventory, shop.pool, spans, queue, Metrics(), patience=QUICK)
    row = await shop.row(fenced.sale_id)
    await own.rebuild(row)
    assert await woken(queue) == fenced.sale_id
    assert await own.rebuild(row) == StillFenced(("the rebuild failed: see the operator's log",))
    assert "ZeroDivisionError" in caplog.text
    broken = False

    async def sells() -> bool:
        await own.rebuild(row)
        return await shop.buy(fenced.item_id, "bob") == [Outcome.ACCEPTED]

    await until(sells)
    await own.close()


async def test_a_reconcile_does_not_wait_for_the_rebuild_of_its_sale(
    shop: SimulatedShop, fenced: SaleSpec
) -> None:
    queue = Queue()
    own = Rebuilds(shop.inventory, shop.pool, nothing, queue, Metrics(), patience=QUICK)
    reconciler = Reconciler(shop.inventory, shop.pool, own.rebuild)
    result = await reconciler.reconcile(fenced)
    assert (result.state, result.reason) == (SaleState.FENCED, Reason.FENCED)
    await woken(queue)
    assert (await reconciler.reconcile(fenced)).state is SaleState.SELLING
    assert own.outcome(fenced.sale_id) is not None
    await own.close()


async def test_concurrent_callers_share_a_call_that_began_after_they_asked() -> None:
    calls = 0
    let_go = asyncio.Event()

    async def spans() -> Mapping[int, Span]:
        nonlocal calls
        calls += 1
        number = calls
        await let_go.wait()
        return {number: Span(0, 0)}

    shared = SharedSpans(spans)
    first = asyncio.create_task(shared())
    await until(lambda: calls == 1, pause=0.005)
    late = [asyncio.create_task(shared()) for _ in range(10)]
    await asyncio.sleep(0)
    late[0].cancel()
    let_go.set()
    assert await first == {1: Span(0, 0)}
    assert await asyncio.gather(*late[1:]) == [{2: Span(0, 0)}] * 9
    assert calls == 2


async def test_a_failed_shared_call_does_not_affect_later_callers() -> None:
    shared = SharedSpans(without_kafka)
    with pytest.raises(KafkaUnavailable):
        await shared()
    with pytest.raises(KafkaUnavailable):
        await shared()
