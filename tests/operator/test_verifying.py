"""Verifications that run beside the reconciles."""

import asyncio
from collections.abc import Callable, Mapping

import pytest

from flashsale import ledger
from flashsale.errors import LedgerUnavailable
from flashsale.sale import SaleSpec
from flashsale_operator.reconcile import Differs, State, Verified
from flashsale_operator.steward import Steward
from flashsale_operator.topic import KafkaUnavailable, Span
from flashsale_operator.verifying import Shared, Verifications
from tests.operator.conftest import QUICK, Shop


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def nothing() -> Mapping[int, Span]:
    return {}


async def without_kafka() -> Mapping[int, Span]:
    raise KafkaUnavailable("Kafka is away: no answer in time")


async def test_a_verification_is_begun_and_its_result_given_once(
    shop: Shop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    woken: list[str] = []
    own = Verifications(shop.redis, shop.pool, nothing, woken.append, patience=QUICK)
    first = await own.verify(spec.sale_id, spec.item_id)
    assert isinstance(first, Differs)
    assert first.differences[0].startswith("verifying that nothing is missing: ")
    await until(lambda: woken == [spec.sale_id])
    assert await own.verify(spec.sale_id, spec.item_id) == Verified(
        0, (await shop.inventory.server()).run_id
    )
    assert isinstance(await own.verify(spec.sale_id, spec.item_id), Differs)
    await own.close()


async def test_a_difference_is_told_until_it_is_time_to_look_again(
    shop: Shop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "ada")
    await shop.record(spec.item_id, lose=1)
    woken: list[str] = []
    own = Verifications(shop.redis, shop.pool, nothing, woken.append, patience=QUICK)
    await own.verify(spec.sale_id, spec.item_id)
    await until(lambda: len(woken) == 1)
    for _ in range(3):
        assert await own.verify(spec.sale_id, spec.item_id) == Differs(
            ("Redis has 1 accepted units and the ledger 0",)
        )
    await own.close()


async def test_the_lack_of_kafka_is_noted(shop: Shop, spec: SaleSpec) -> None:
    woken: list[str] = []
    own = Verifications(shop.redis, shop.pool, without_kafka, woken.append, patience=QUICK)
    await own.verify(spec.sale_id, spec.item_id)
    assert not own.without_kafka(spec.sale_id)
    await until(lambda: len(woken) == 1)
    assert own.without_kafka(spec.sale_id)
    own.forget(spec.sale_id)
    assert not own.without_kafka(spec.sale_id)


async def test_a_server_that_is_away_is_raised_where_the_result_is_asked_for(
    shop: Shop, spec: SaleSpec
) -> None:
    pool = await ledger.connect("postgresql://nobody@127.0.0.1:1/none")
    woken: list[str] = []
    own = Verifications(shop.redis, pool, nothing, woken.append, patience=QUICK)
    await own.verify(spec.sale_id, spec.item_id)
    await until(lambda: len(woken) == 1)
    with pytest.raises(LedgerUnavailable):
        await own.verify(spec.sale_id, spec.item_id)
    pool.terminate()


async def test_a_fenced_sale_is_reopened_without_waiting_for_it(shop: Shop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    await shop.redis.hset(f"flashsale:{{{spec.item_id}}}:sale", "run_id", "0" * 40)
    woken: list[str] = []
    own = Verifications(shop.redis, shop.pool, nothing, woken.append, patience=QUICK)
    steward = Steward(shop.inventory, shop.pool, own.verify)
    assert (await steward.reconcile(spec)).state is State.FENCED
    await until(lambda: len(woken) == 1)
    assert (await steward.reconcile(spec)).state is State.SELLING
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
