"""Rebuilds that run beside the reconciles."""

import asyncio
from collections.abc import Callable, Mapping

import pytest

from flashsale import ledger
from flashsale.errors import LedgerUnavailable
from flashsale.keys import ItemKeys
from flashsale.sale import SaleSpec, SaleState
from flashsale_operator.kubernetes.rebuilds import Rebuilds, Shared
from flashsale_operator.sales.decision import Kept
from flashsale_operator.sales.offsets import KafkaUnavailable, Span
from flashsale_operator.sales.reconciler import Steward
from tests.servers.operator.conftest import QUICK, Shop


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def nothing() -> Mapping[int, Span]:
    return {}


async def without_kafka() -> Mapping[int, Span]:
    raise KafkaUnavailable("Kafka is away: no answer in time")


@pytest.fixture
async def fenced(shop: Shop, spec: SaleSpec) -> SaleSpec:
    """A sale with one unit sold and recorded, after a restart of Redis."""
    await shop.apply(spec)
    await shop.buy(spec.item_id, "ada")
    await shop.record(spec.item_id)
    await shop.redis.hset(ItemKeys.of(spec.item_id).sale, "run_id", "0" * 40)
    return spec


async def test_a_rebuild_is_begun_and_its_result_given_once(shop: Shop, fenced: SaleSpec) -> None:
    woken: list[str] = []
    own = Rebuilds(shop.redis, shop.pool, nothing, woken.append, patience=QUICK)
    row = await shop.row(fenced.sale_id)
    assert str(await own.rebuild(row)).startswith("being rebuilt from the ledger: ")
    await until(lambda: woken == [fenced.sale_id])
    done = own.forget(fenced.sale_id)
    assert done is not None
    assert (done.accepted, done.reservations) == (1, 1)
    assert own.forget(fenced.sale_id) is None
    await own.close()


async def test_what_keeps_it_is_told_until_it_is_time_to_begin_again(
    shop: Shop, fenced: SaleSpec
) -> None:
    await shop.redis.xadd(ItemKeys.of(fenced.item_id).outbox, {"id": "x"})
    woken: list[str] = []
    own = Rebuilds(shop.redis, shop.pool, nothing, woken.append, patience=QUICK)
    row = await shop.row(fenced.sale_id)
    await own.rebuild(row)
    await until(lambda: len(woken) == 1)
    for _ in range(3):
        assert await own.rebuild(row) == Kept(("the outbox has 1 events that Kafka has not",))
    await own.close()


async def test_the_lack_of_kafka_is_noted(shop: Shop, fenced: SaleSpec) -> None:
    woken: list[str] = []
    own = Rebuilds(shop.redis, shop.pool, without_kafka, woken.append, patience=QUICK)
    row = await shop.row(fenced.sale_id)
    await own.rebuild(row)
    await until(lambda: len(woken) == 1)
    kept = await own.rebuild(row)
    assert kept == Kept(("Kafka is away: no answer in time",), without_kafka=True)
    own.forget(fenced.sale_id)
    await own.close()


async def test_a_server_that_is_away_is_raised_where_the_result_is_asked_for(
    shop: Shop, fenced: SaleSpec
) -> None:
    pool = await ledger.connect("postgresql://nobody@127.0.0.1:1/none")
    woken: list[str] = []
    own = Rebuilds(shop.redis, pool, nothing, woken.append, patience=QUICK)
    row = await shop.row(fenced.sale_id)
    await own.rebuild(row)
    await until(lambda: len(woken) == 1)
    with pytest.raises(LedgerUnavailable):
        await own.rebuild(row)
    pool.terminate()


async def test_a_fenced_sale_is_rebuilt_without_waiting_for_it(
    shop: Shop, fenced: SaleSpec
) -> None:
    woken: list[str] = []
    own = Rebuilds(shop.redis, shop.pool, nothing, woken.append, patience=QUICK)
    steward = Steward(shop.inventory, shop.pool, own.rebuild)
    report = await steward.reconcile(fenced)
    assert report.state is SaleState.FENCED
    assert report.kept is not None
    await until(lambda: len(woken) == 1)
    assert (await steward.reconcile(fenced)).state is SaleState.SELLING
    assert own.forget(fenced.sale_id) is not None
    await own.close()


async def test_those_who_ask_at_the_same_time_share_a_call_that_began_after_they_asked() -> None:
    calls = 0
    let_go = asyncio.Event()

    async def spans() -> Mapping[int, Span]:
        nonlocal calls
        calls += 1
        number = calls
        await let_go.wait()
        return {number: Span(0, 0)}

    shared = Shared(spans)
    first = asyncio.create_task(shared())
    await until(lambda: calls == 1)
    late = [asyncio.create_task(shared()) for _ in range(10)]
    await asyncio.sleep(0)
    late[0].cancel()
    let_go.set()
    assert await first == {1: Span(0, 0)}
    assert await asyncio.gather(*late[1:]) == [{2: Span(0, 0)}] * 9
    assert calls == 2


async def test_a_shared_call_that_fails_fails_for_those_who_asked_and_no_other() -> None:
    shared = Shared(without_kafka)
    with pytest.raises(KafkaUnavailable):
        await shared()
    with pytest.raises(KafkaUnavailable):
        await shared()
