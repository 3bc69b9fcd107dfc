"""What must be shown before a sale is trusted again, on real Redis and PostgreSQL."""

import asyncio
from dataclasses import replace

import pytest

from flashsale import heartbeat
from flashsale.heartbeat import Heartbeat
from flashsale.keys import PODS
from flashsale.sale import SaleSpec
from flashsale_operator.reconcile import Differs, Verification, Verified
from flashsale_operator.topic import KafkaUnavailable, Span
from flashsale_operator.verification import CALL_DEADLINE_MS, Barrier, Patience
from tests.operator.conftest import QUICK, Pool, Shop


@pytest.fixture
async def sold(shop: Shop, spec: SaleSpec) -> SaleSpec:
    """A sale with three units sold and recorded."""
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id)
    return spec


async def verify(shop: Shop, spec: SaleSpec) -> Verification:
    return await shop.barrier.verify(spec.sale_id, spec.item_id)


async def beat(
    shop: Shop, item_id: str, unacknowledged: int, later_ms: int = CALL_DEADLINE_MS + 60_000
) -> None:
    """A heartbeat from that much later, which spares the test the wait."""
    now_ms = (await shop.inventory.server()).now_ms
    held = {item_id: unacknowledged} if unacknowledged else {}
    await heartbeat.beat(shop.redis, Heartbeat("pod-1", held, now_ms + later_ms))


async def test_a_sale_that_is_recorded_whole_is_verified(shop: Shop, sold: SaleSpec) -> None:
    run_id = (await shop.inventory.server()).run_id
    assert await verify(shop, sold) == Verified(3, run_id)


async def test_what_a_living_pod_holds_may_be_of_the_sale(shop: Shop, sold: SaleSpec) -> None:
    await beat(shop, sold.item_id, unacknowledged=2)
    assert await verify(shop, sold) == Differs(("pod pod-1 holds 2 events",))
    await beat(shop, sold.item_id, unacknowledged=0)
    assert isinstance(await verify(shop, sold), Verified)


async def test_what_a_pod_holds_of_other_items_does_not_matter(shop: Shop, sold: SaleSpec) -> None:
    await beat(shop, "another-item", unacknowledged=2)
    assert isinstance(await verify(shop, sold), Verified)


async def test_a_heartbeat_from_before_says_nothing(shop: Shop, sold: SaleSpec) -> None:
    await beat(shop, sold.item_id, unacknowledged=0, later_ms=CALL_DEADLINE_MS - 100)
    assert await verify(shop, sold) == Differs(("pod pod-1 has not said what it holds",))


async def test_a_pod_that_is_not_seen_yet_is_waited_for(shop: Shop, sold: SaleSpec) -> None:
    """After a flush no pod is in the set until it beats again."""
    shop.barrier = Barrier(
        shop.redis, shop.pool, shop.spans, patience=replace(QUICK, unseen=0.5, quiet=0.5)
    )
    verifying = asyncio.create_task(verify(shop, sold))
    await asyncio.sleep(0.05)
    await beat(shop, sold.item_id, unacknowledged=1)
    assert await verifying == Differs(("pod pod-1 holds 1 events",))


async def test_the_ledger_is_waited_for_until_it_has_read_the_topic(
    shop: Shop, sold: SaleSpec
) -> None:
    shop.topic |= {0: Span(0, 5), 1: Span(2, 2)}
    await shop.read_to(0, 4)
    assert await verify(shop, sold) == Differs(
        (
            "the ledger has read partition 0 to 4 of 5",
            "the ledger has read partition 1 to 0 of 2",
        )
    )
    told: list[str] = []
    shop.barrier = Barrier(
        shop.redis,
        shop.pool,
        shop.spans,
        patience=replace(QUICK, recorded=30),
        progress=told.append,
    )
    verifying = asyncio.create_task(verify(shop, sold))
    while not any("partition" in line for line in told):
        await asyncio.sleep(0.01)
    await shop.read_to(0, 5)
    await shop.read_to(1, 2)
    assert isinstance(await verifying, Verified)
    assert told[0] == f"{sold.sale_id}: verifying: listening for API pods"


async def test_a_topic_that_lost_records_proves_nothing(shop: Shop, sold: SaleSpec) -> None:
    await shop.read_to(0, 9)
    shop.topic[0] = Span(0, 5)
    found = await verify(shop, sold)
    assert isinstance(found, Differs)
    assert found.differences[0].startswith("partition 0 ends at 5 and 9 are recorded")


async def test_without_kafka_nothing_is_verified(pool: Pool, shop: Shop, sold: SaleSpec) -> None:
    async def away() -> dict[int, Span]:
        raise KafkaUnavailable("Kafka is away: no answer in time")

    shop.barrier = Barrier(shop.redis, pool, away, patience=QUICK)
    assert await verify(shop, sold) == Differs(("Kafka is away: no answer in time",))


async def test_counts_must_be_equal_in_the_end(shop: Shop, sold: SaleSpec) -> None:
    await shop.pool.execute("UPDATE sales SET accepted = 2")
    assert await verify(shop, sold) == Differs(("Redis has 3 accepted units and the ledger 2",))
    await shop.redis.flushall()
    assert await verify(shop, sold) == Differs(("Redis has 0 accepted units and the ledger 2",))


@pytest.mark.slow
async def test_pods_have_their_expiry_to_be_seen(shop: Shop, sold: SaleSpec) -> None:
    """As it is run: a pod that beats every second is waited for until it holds nothing."""
    shop.barrier = Barrier(shop.redis, shop.pool, shop.spans, patience=Patience())
    await shop.redis.delete(PODS)
    began = (await shop.inventory.server()).now_ms

    async def pod() -> None:
        for left in [*range(4, 0, -1), *[0] * 20]:
            await asyncio.sleep(1)
            now_ms = (await shop.inventory.server()).now_ms
            await heartbeat.beat(
                shop.redis, Heartbeat("pod-1", {sold.item_id: left} if left else {}, now_ms)
            )

    beating = asyncio.create_task(pod())
    assert isinstance(await verify(shop, sold), Verified)
    beating.cancel()
    assert (await shop.inventory.server()).now_ms - began >= heartbeat.EXPIRY_SECONDS * 1000
