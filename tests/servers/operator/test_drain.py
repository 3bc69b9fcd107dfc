"""What is waited for before a sale is rebuilt, on real Redis and PostgreSQL."""

import asyncio
from dataclasses import replace

import pytest

from flashsale import heartbeat
from flashsale.heartbeat import Heartbeat
from flashsale.keys import PODS
from flashsale.sale import SaleSpec
from flashsale_operator.sales.drain import CALL_DEADLINE_MS, Barrier, Patience, Unsettled
from flashsale_operator.sales.offsets import KafkaUnavailable, Span
from tests.servers.operator.conftest import QUICK, Pool, Shop


async def unsettled(shop: Shop, spec: SaleSpec) -> tuple[str, ...]:
    """What the barrier finds at its deadline."""

    async def look_after() -> None:
        pass

    try:
        await shop.barrier.settled(spec.sale_id, spec.item_id, look_after)
    except Unsettled as error:
        return error.why
    return ()


async def beat(
    shop: Shop, item_id: str, unacknowledged: int, later_ms: int = CALL_DEADLINE_MS + 60_000
) -> None:
    """A heartbeat from that much later, which spares the test the wait."""
    now_ms = (await shop.inventory.server()).now_ms
    held = {item_id: unacknowledged} if unacknowledged else {}
    await heartbeat.beat(shop.redis, Heartbeat("pod-1", held, now_ms + later_ms))


async def test_a_sale_that_is_recorded_whole_is_settled(shop: Shop, sold: SaleSpec) -> None:
    shop.topic |= {0: Span(0, 5), 1: Span(0, 0)}
    await shop.read_to(0, 5)
    looks = 0

    async def look_after() -> None:
        nonlocal looks
        looks += 1

    offsets = await shop.barrier.settled(sold.sale_id, sold.item_id, look_after)
    assert offsets == {0: 5, 1: 0}
    assert looks >= 2


async def test_an_outbox_that_is_not_drained_is_waited_for(shop: Shop, sold: SaleSpec) -> None:
    await shop.buy(sold.item_id, "d")
    assert await unsettled(shop, sold) == ("the outbox has 1 events that Kafka has not",)


async def test_what_a_living_pod_holds_may_be_of_the_sale(shop: Shop, sold: SaleSpec) -> None:
    await beat(shop, sold.item_id, unacknowledged=2)
    assert await unsettled(shop, sold) == ("pod pod-1 holds 2 events",)
    await beat(shop, sold.item_id, unacknowledged=0)
    assert not await unsettled(shop, sold)


async def test_what_a_pod_holds_of_other_items_does_not_matter(shop: Shop, sold: SaleSpec) -> None:
    await beat(shop, "another-item", unacknowledged=2)
    assert not await unsettled(shop, sold)


async def test_a_heartbeat_from_before_says_nothing(shop: Shop, sold: SaleSpec) -> None:
    await beat(shop, sold.item_id, unacknowledged=0, later_ms=CALL_DEADLINE_MS - 100)
    assert await unsettled(shop, sold) == ("pod pod-1 has not said what it holds",)


async def test_a_pod_that_is_not_seen_yet_is_waited_for(shop: Shop, sold: SaleSpec) -> None:
    """After a flush no pod is in the set until it beats again."""
    shop.barrier = Barrier(
        shop.redis, shop.pool, shop.spans, patience=replace(QUICK, unseen=0.5, quiet=0.5)
    )
    waiting = asyncio.create_task(unsettled(shop, sold))
    await asyncio.sleep(0.05)
    await beat(shop, sold.item_id, unacknowledged=1)
    assert await waiting == ("pod pod-1 holds 1 events",)


async def test_the_ledger_is_waited_for_until_it_has_read_the_topic(
    shop: Shop, sold: SaleSpec
) -> None:
    shop.topic |= {0: Span(0, 5), 1: Span(2, 2)}
    await shop.read_to(0, 4)
    assert await unsettled(shop, sold) == (
        "the ledger has read partition 0 to 4 of 5",
        "the ledger has read partition 1 to 0 of 2",
    )
    told: list[str] = []
    shop.barrier = Barrier(
        shop.redis,
        shop.pool,
        shop.spans,
        patience=replace(QUICK, recorded=30),
        progress=told.append,
    )
    waiting = asyncio.create_task(unsettled(shop, sold))
    while not any("partition" in line for line in told):
        await asyncio.sleep(0.01)
    await shop.read_to(0, 5)
    await shop.read_to(1, 2)
    assert not await waiting
    assert told[0] == f"{sold.sale_id}: listening for API pods"


async def test_a_topic_that_lost_records_proves_nothing(shop: Shop, sold: SaleSpec) -> None:
    await shop.read_to(0, 9)
    shop.topic[0] = Span(0, 5)
    found = await unsettled(shop, sold)
    assert found[0].startswith("partition 0 ends at 5 and 9 are recorded")


async def test_without_kafka_nothing_is_settled(pool: Pool, shop: Shop, sold: SaleSpec) -> None:
    async def away() -> dict[int, Span]:
        raise KafkaUnavailable("Kafka is away: no answer in time")

    shop.barrier = Barrier(shop.redis, pool, away, patience=QUICK)
    with pytest.raises(KafkaUnavailable):
        await unsettled(shop, sold)


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
    assert not await unsettled(shop, sold)
    beating.cancel()
    assert (await shop.inventory.server()).now_ms - began >= heartbeat.EXPIRY_SECONDS * 1000
