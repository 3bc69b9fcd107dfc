"""The wait for events in flight before a rebuild, on real Redis and PostgreSQL."""

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trustme
from redis.asyncio import Redis

from flashsale import heartbeat, ledger
from flashsale.clocks import ServerTime
from flashsale.sale import SaleSpec
from flashsale.settings import KafkaSettings
from flashsale_operator.sales.drain import SAMPLED_AFTER_MS, Drain, NotDrained, Patience, Progress
from flashsale_operator.sales.offsets import UNSEEN, KafkaUnavailable, Span, spans
from tests.support.eventually import until
from tests.support.simulated_shop import QUICK, SimulatedShop


async def not_drained(
    shop: SimulatedShop, spec: SaleSpec, progress: Progress = lambda _: None
) -> tuple[str, ...]:
    """Return the causes that the drain reports at its deadline, or none."""

    async def keep_fenced() -> None:
        pass

    try:
        await shop.drain.wait(spec.item_id, keep_fenced, progress)
    except NotDrained as error:
        return error.why
    return ()


async def beat(
    shop: SimulatedShop,
    item_id: str,
    unacknowledged: int,
    later_ms: int = SAMPLED_AFTER_MS + 2_000,
) -> None:
    """Beat with a later sample time, so that the test need not wait."""
    server = await shop.inventory.server()
    sampled = ServerTime(server.now_ms + later_ms, server.run_id)
    await heartbeat.beat(shop.redis, "pod-1", {item_id: unacknowledged}, {"": sampled})


async def test_a_fully_recorded_sale_is_drained(shop: SimulatedShop, sold: SaleSpec) -> None:
    shop.topic |= {0: Span(0, 5), 1: Span(0, 0)}
    await shop.read_to(0, 5)
    looks = 0

    async def keep_fenced() -> None:
        nonlocal looks
        looks += 1

    offsets = await shop.drain.wait(sold.item_id, keep_fenced)
    assert offsets == {0: 5, 1: 0}
    assert looks >= 2


async def test_the_drain_waits_for_the_outbox(shop: SimulatedShop, sold: SaleSpec) -> None:
    await shop.buy(sold.item_id, "d")
    assert await not_drained(shop, sold) == (
        "the outbox has 1 event that Kafka has not acknowledged",
    )


async def test_the_drain_waits_for_unacknowledged_events_of_a_living_pod(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await beat(shop, sold.item_id, unacknowledged=2)
    assert await not_drained(shop, sold) == ("pod pod-1 has 2 unacknowledged events",)
    await beat(shop, sold.item_id, unacknowledged=0)
    assert not await not_drained(shop, sold)


async def test_the_drain_waits_for_unacknowledged_events_of_a_pod_of_the_previous_version(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """It beats only in a key of its own, for all items, and names no run."""
    server = await shop.inventory.server()
    report = {
        "podId": "former",
        "unacknowledged": {sold.item_id: 2},
        "sampledMs": server.now_ms + SAMPLED_AFTER_MS + 60_000,
    }
    await shop.redis.sadd("flashsale:pods", "former")
    await shop.redis.set("flashsale:pod:former", json.dumps(report), ex=60)
    assert await not_drained(shop, sold) == ("pod former has 2 unacknowledged events",)


async def test_the_drain_ignores_events_of_other_items(shop: SimulatedShop, sold: SaleSpec) -> None:
    await beat(shop, "another-item", unacknowledged=2)
    assert not await not_drained(shop, sold)


async def test_the_drain_waits_for_a_heartbeat_after_the_fence(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await beat(shop, sold.item_id, unacknowledged=0, later_ms=SAMPLED_AFTER_MS - 100)
    assert await not_drained(shop, sold) == (
        "pod pod-1 has not reported its unacknowledged events yet",
    )


async def test_the_drain_ignores_a_heartbeat_under_the_clock_of_a_former_server(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """The pod died before Redis failed over to a server whose clock is a minute behind."""
    sampled = ServerTime((await shop.inventory.server()).now_ms + 60_000, "another run")
    await heartbeat.beat(shop.redis, "dead", {sold.item_id: 1}, {"": sampled})
    assert not await not_drained(shop, sold)


async def test_the_drain_ignores_a_heartbeat_from_before_the_clock_was_set_back(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await beat(shop, sold.item_id, unacknowledged=1, later_ms=3_600_000)
    assert not await not_drained(shop, sold)


@pytest.mark.parametrize("step_ms", [-60_000, 60_000])
async def test_a_wait_in_which_the_clock_was_set_proves_nothing(
    shop: SimulatedShop, sold: SaleSpec, monkeypatch: pytest.MonkeyPatch, step_ms: int
) -> None:
    """A living pod's heartbeat looks expired or is from the future, until it sends the next one."""
    inventory, began = shop.inventory, await shop.inventory.server()
    read = inventory.server

    async def then_set(_: str) -> ServerTime:
        monkeypatch.setattr(inventory, "server", read)
        return ServerTime(began.now_ms - step_ms, began.run_id)

    monkeypatch.setattr(inventory, "server", then_set)
    assert await not_drained(shop, sold) == ("Redis' clock was set during the wait for events",)


async def test_the_drain_waits_for_pods_that_have_not_beaten_yet(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """After a flush of Redis, a pod is unknown until its next heartbeat."""
    shop.drain = Drain(
        shop.inventory, shop.pool, shop.spans, patience=replace(QUICK, unseen=300, quiet=300)
    )
    reported: list[str] = []
    waiting = asyncio.create_task(not_drained(shop, sold, reported.append))
    await until(lambda: reported, "a first look")
    await beat(shop, sold.item_id, unacknowledged=1)
    await until(lambda: len(reported) > 1 or waiting.done(), "a look after the heartbeat")
    assert not waiting.done()
    waiting.cancel()
    assert reported == [
        "waiting for heartbeats of API pods",
        "pod pod-1 has 1 unacknowledged event",
    ]


async def test_an_operator_that_stands_still_after_a_look_waits_for_the_pods_of_that_time(
    shop: SimulatedShop, sold: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a flush of Redis it reads no heartbeat. Then the whole wait passes at once."""
    shop.drain = Drain(
        shop.inventory, shop.pool, shop.spans, patience=replace(QUICK, unseen=0.5, quiet=0.5)
    )
    living = heartbeat.living

    async def then_stands_still(
        redis: "Redis", item_id: str, server: ServerTime, engine: str
    ) -> list[heartbeat.Report]:
        monkeypatch.undo()
        found = await living(redis, item_id, server, engine)
        time.sleep(0.6)  # noqa: ASYNC251 - no task runs
        await beat(shop, item_id, unacknowledged=1)
        return found

    monkeypatch.setattr(heartbeat, "living", then_stands_still)
    assert await not_drained(shop, sold) == ("pod pod-1 has 1 unacknowledged event",)


async def test_the_drain_waits_until_the_ledger_has_read_the_topic(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    shop.topic |= {0: Span(0, 5), 1: Span(2, 2)}
    await shop.read_to(0, 4)
    assert await not_drained(shop, sold) == (
        "the ledger has read partition 0 to offset 4 of 5",
        "the ledger has read partition 1 to offset 0 of 2",
    )
    reported: list[str] = []
    shop.drain = Drain(shop.inventory, shop.pool, shop.spans, patience=replace(QUICK, recorded=30))
    waiting = asyncio.create_task(not_drained(shop, sold, reported.append))
    await until(lambda: any("partition" in line for line in reported))
    await shop.read_to(0, 5)
    await shop.read_to(1, 2)
    assert not await waiting
    assert reported[0] == "waiting for heartbeats of API pods"


async def test_the_sale_is_kept_fenced_while_the_ledger_reads_the_topic(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """Without a lease, another rebuild could begin."""
    shop.topic[0] = Span(0, 5)
    drain = Drain(shop.inventory, shop.pool, shop.spans, patience=replace(QUICK, recorded=30))
    reported: list[str] = []
    looks = 0

    async def keep_fenced() -> None:
        nonlocal looks
        looks += 1

    waiting = asyncio.create_task(drain.wait(sold.item_id, keep_fenced, reported.append))
    await until(lambda: any("partition" in line for line in reported))
    before = looks
    await until(lambda: looks > before)
    await shop.read_to(0, 5)
    await waiting


async def test_another_sale_that_goes_on_selling_is_no_loss(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """While the ledger catches up with one partition, another one moves on."""
    shop.topic |= {0: Span(0, 5), 1: Span(0, 9)}
    await shop.read_to(0, 5)
    await shop.read_to(1, 2)
    shop.drain = Drain(shop.inventory, shop.pool, shop.spans, patience=replace(QUICK, recorded=30))

    reported: list[str] = []
    waiting = asyncio.create_task(not_drained(shop, sold, reported.append))
    await until(lambda: any("partition 1" in line for line in reported))
    shop.topic[0] = Span(0, 50)
    await shop.read_to(0, 50)
    await shop.read_to(1, 9)
    assert not await waiting


async def test_a_topic_that_lost_records_is_never_drained(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.read_to(0, 9)
    shop.topic[0] = Span(0, 5)
    found = await not_drained(shop, sold)
    assert found[0].startswith("partition 0 ends at offset 5, but the ledger has read to 9")


async def test_a_topic_that_kafka_does_not_show_is_never_drained(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """It hides a topic that the user may not describe, and the ledger can lack its events."""
    shop.topic.clear()
    assert await not_drained(shop, sold) == (UNSEEN,)


async def test_without_kafka_the_drain_fails(
    pool: ledger.Pool, shop: SimulatedShop, sold: SaleSpec
) -> None:
    async def away() -> dict[int, Span]:
        raise KafkaUnavailable("Kafka is away: no answer in time")

    shop.drain = Drain(shop.inventory, pool, away, patience=QUICK)
    with pytest.raises(KafkaUnavailable):
        await not_drained(shop, sold)


async def test_a_certificate_that_is_wrong_after_its_renewal_is_an_outage(tmp_path: Path) -> None:
    trusted = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(trusted)
    kafka = KafkaSettings(kafka_bootstrap="127.0.0.1:1", kafka_tls=True, kafka_ca_file=str(trusted))
    trusted.write_text("half a certificate")
    with pytest.raises(KafkaUnavailable, match="KAFKA_CA_FILE is wrong"):
        await spans(kafka)


@pytest.mark.slow
async def test_the_drain_waits_at_least_as_long_as_a_heartbeat_lives(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """With the real timing, a pod beats every second until it has no unacknowledged event."""
    shop.drain = Drain(shop.inventory, shop.pool, shop.spans, patience=Patience())
    began = (await shop.inventory.server()).now_ms

    async def pod() -> None:
        for left in [*range(4, 0, -1), *[0] * 20]:
            await asyncio.sleep(1)
            sampled = await shop.inventory.server()
            await heartbeat.beat(shop.redis, "pod-1", {sold.item_id: left}, {"": sampled})

    beating = asyncio.create_task(pod())
    assert not await not_drained(shop, sold)
    beating.cancel()
    assert (await shop.inventory.server()).now_ms - began >= heartbeat.EXPIRY_SECONDS * 1000
