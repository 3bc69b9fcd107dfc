"""The controller's reports during outages and about wrong manifests, on real Redis and ledger."""

import asyncio
from contextlib import suppress
from copy import deepcopy
from datetime import datetime

import pytest

from flashsale import ledger
from flashsale.errors import (
    ContractViolation,
    FlashsaleError,
    LedgerUnavailable,
    OtherEngine,
    RedisMoved,
    RedisUnavailable,
    UnmetRequirement,
)
from flashsale.keys import ItemKeys
from flashsale.reservations import Outcome
from flashsale.sale import SaleSpec, SaleState, rfc3339_of_ms
from flashsale_operator.kubernetes import rebuilds
from flashsale_operator.kubernetes.client import KubeForbidden, KubeUnavailable
from flashsale_operator.kubernetes.failures import result_of_error
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import Key, Requeue
from flashsale_operator.kubernetes.status import Counts
from flashsale_operator.sales.decision import Reason
from flashsale_operator.sales.offsets import Span
from tests.support.controllers import FakeKube, controller
from tests.support.eventually import until
from tests.support.observations import SPEC
from tests.support.simulated_shop import QUICK, SimulatedShop


async def test_redis_counts_are_reported_while_the_ledger_is_away(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube = FakeKube(spec)
    own, key = controller(shop, kube), Key.of(spec.sale_id)
    assert await own.reconcile(key) == Requeue()
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.pool.execute("ALTER TABLE sales RENAME TO away")
    assert (await own.reconcile(key)).failed
    assert kube.reasons() == {
        "Ready": "LedgerUnavailable",
        "Open": "Selling",
        "SoldOut": "Available",
        "Refused": "NoneRefused",
    }
    assert kube.status.counts == Counts(10, 3, 7, 0, 3)
    assert kube.events == ["Opened"]


async def test_a_flashsale_is_due_again_when_its_sale_begins_and_ends(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube = FakeKube(spec)
    window = {"startsAt": "2100-01-01T00:00:00Z", "endsAt": "2100-01-02T00:00:00Z"}
    kube.live["spec"] |= window
    begin, end = (int(datetime.fromisoformat(at).timestamp() * 1000) for at in window.values())
    assert await controller(shop, kube).reconcile(Key.of(spec.sale_id)) == Requeue(
        changes_ms=(begin, end)
    )


async def test_a_status_that_was_not_written_is_soon_written_again(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """Its FlashSale has changed since it was read."""
    kube = FakeKube(spec)
    own, key = controller(shop, kube), Key.of(spec.sale_id)
    assert await own.reconcile(key) == Requeue()
    kube.live["spec"]["paused"] = kube.changed = True
    assert await own.reconcile(key) == Requeue(failed=True)
    kube.changed = False
    assert await own.reconcile(key) == Requeue()
    assert kube.reasons()["Open"] == "Paused"


async def test_an_operator_that_stood_still_does_not_end_a_sale_that_goes_on(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """The owner has put off the end since, and another operator has made the change."""
    kube = FakeKube(spec)
    other, key = controller(shop, kube), Key.of(spec.sale_id)
    now_ms = (await shop.inventory.server()).now_ms
    former = deepcopy(kube.live)
    former["spec"]["endsAt"] = rfc3339_of_ms(now_ms - 1)
    kube.live["spec"]["endsAt"] = rfc3339_of_ms(now_ms + 3_600_000)
    kube.live["metadata"]["generation"] += 1
    await other.reconcile(key)
    former["status"] = kube.live["status"]
    kube.former = [former]
    assert (await controller(shop, kube).reconcile(key)).again
    await other.reconcile(key)
    assert kube.reasons()["Open"] == "Selling"
    assert await shop.buy(spec.item_id, "a") == [Outcome.ACCEPTED]


async def test_an_operator_that_stood_still_does_not_close_a_sale_that_was_applied_again(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """It has read that the FlashSale was deleted."""
    kube = FakeKube(spec)
    key = Key.of(spec.sale_id)
    await controller(shop, kube).reconcile(key)
    kube.former = [None]
    assert (await controller(shop, kube).reconcile(key)).failed
    assert await shop.buy(spec.item_id, "a") == [Outcome.ACCEPTED]
    assert kube.events == ["Opened"]


async def test_the_first_expired_hold_and_units_that_come_back_are_events(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube = FakeKube(spec)
    kube.live["spec"] |= {"stock": 3, "holdSeconds": 600}
    own, key, item_id = controller(shop, kube), Key.of(spec.sale_id), spec.item_id
    await own.reconcile(key)
    await shop.buy(item_id, "a", "b", "c")
    await own.reconcile(key)
    assert kube.status.counts == Counts(3, 3, 0, 3, 0)
    await shop.confirm(item_id, "a")
    await shop.cancel(item_id, "b")
    await shop.record(item_id)
    await own.reconcile(key)
    assert kube.events == ["Opened", "SoldOut", "SellingAgain"], "a cancelled hold did not expire"
    assert kube.status.counts == Counts(3, 3, 1, 1, 1)
    await shop.expire(item_id, "c")
    await own.reconcile(key)
    assert not kube.status.hold_expired, "the ledger does not have it yet"
    await shop.record(item_id)
    for restarted in (own, controller(shop, kube)):
        await restarted.reconcile(key)
    assert kube.events == ["Opened", "SoldOut", "SellingAgain", "HoldExpired"]
    assert kube.status.hold_expired
    assert kube.status.counts is not None
    assert kube.status.counts.released == 2


async def test_an_expired_hold_is_an_event_even_if_new_reservations_are_not_held_any_more(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube = FakeKube(spec)
    kube.live["spec"]["holdSeconds"] = 600
    own, key = controller(shop, kube), Key.of(spec.sale_id)
    await own.reconcile(key)
    await shop.buy(spec.item_id, "a")
    del kube.live["spec"]["holdSeconds"]
    await own.reconcile(key)
    await shop.expire(spec.item_id, "a")
    await shop.record(spec.item_id)
    await own.reconcile(key)
    assert kube.status.hold_expired
    assert kube.events == ["Opened", "HoldExpired"]


async def test_each_failover_of_a_sale_that_does_not_sell_has_its_own_events(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """Its condition Open stays False, so lastTransitionTime does not change."""
    kube = FakeKube(spec)
    kube.live["spec"]["startsAt"] = "2999-01-01T00:00:00Z"
    own, key, sale = controller(shop, kube), Key.of(spec.sale_id), ItemKeys.of(spec.item_id).sale
    await own.reconcile(key)
    for number in (1, 2):
        # Redis has a unit that never reached the ledger.
        await shop.redis.hset(sale, mapping={"run_id": "fenced", "accepted": 1})

        async def rebuilt(number: int = number) -> bool:
            await own.reconcile(key)
            return kube.events.count("Rebuilt") == number

        await until(rebuilt, "the sale is rebuilt")
    assert kube.events == ["Fenced", "Rebuilt"] * 2
    assert len(set(kube.names)) == 4


async def test_a_rebuild_has_its_event_if_the_kube_apiserver_was_away_at_its_end(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube = FakeKube(spec)
    own, key = controller(shop, kube), Key.of(spec.sale_id)
    await own.reconcile(key)
    kube.away = True
    await shop.redis.hset(
        ItemKeys.of(spec.item_id).sale, mapping={"run_id": "fenced", "accepted": 1}
    )

    async def refused() -> bool:
        with suppress(KubeUnavailable):
            await own.reconcile(key)
        return (await shop.row(spec.sale_id)).lost == 1 and await sells(shop, spec)

    await until(refused)
    for _ in range(3):
        with suppress(KubeUnavailable):
            await own.reconcile(key)
    kube.away = False
    await own.reconcile(key)
    assert kube.events.count("Rebuilt") == 1
    assert kube.messages[kube.events.index("Rebuilt")].endswith("lost: 1")


async def sells(shop: SimulatedShop, spec: SaleSpec) -> bool:
    sale = await shop.sale(spec.item_id)
    server = await shop.inventory.server()
    return sale is not None and sale.state(server.now_ms, server.run_id) is SaleState.SELLING


async def test_a_lost_sale_keeps_its_counts_in_the_status_until_it_is_rebuilt(
    shop: SimulatedShop, spec: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile Redis has a mark of the rebuild, with the whole stock and without units."""
    monkeypatch.setattr(rebuilds, "REBUILD_RETRY_SECONDS", 0.1)
    kube = FakeKube(spec)
    kube.live["spec"]["stock"] = 3
    own, key = controller(shop, kube), Key.of(spec.sale_id)
    await own.reconcile(key)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id)
    kube.live["spec"]["stock"] = 2
    await own.reconcile(key)
    before = kube.status.counts, kube.status.condition("SoldOut")
    assert before[0] == Counts(3, 3, 0, confirmed=3)
    await shop.redis.flushall()
    shop.topic = {0: Span(0, 5)}  # the ledger has not read it, so the sale stays fenced
    for _ in range(10):
        own._memories[key].written = float("-inf")
        await own.reconcile(key)
        await asyncio.sleep(QUICK.recorded / 5)
    assert kube.reasons()["Open"] == "Fenced"
    assert (kube.status.counts, kube.status.condition("SoldOut")) == before
    await shop.read_to(0, 5)

    async def rebuilt() -> bool:
        await own.reconcile(key)
        return kube.reasons()["Open"] == "SoldOut" and "Rebuilt" in kube.events

    await until(rebuilt)
    assert kube.events == ["Opened", "SoldOut", "Fenced", "Rebuilt"]


async def test_a_sale_whose_keys_are_not_there_yet_is_reported_as_lost_at_the_second_look(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """Another operator may have inserted the row just now, and be about to seed the keys."""
    kube = FakeKube(spec)
    own, key = controller(shop, kube), Key.of(spec.sale_id)
    await shop.apply(spec)
    await shop.redis.flushall()
    shop.topic = {0: Span(0, 5)}  # the ledger has not read it, so the sale stays fenced
    assert await own.reconcile(key) == Requeue(again=True)
    assert (kube.status.conditions, kube.events) == ((), [])
    await own.reconcile(key)
    assert (kube.reasons()["Open"], kube.events) == ("Fenced", ["Fenced"])


@pytest.mark.parametrize("ended", ["reconcile", "prepare"])
async def test_an_unexpected_error_is_reported_and_retried(
    shop: SimulatedShop,
    spec: SaleSpec,
    ended: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no\nunits")

    kube, metrics = FakeKube(spec), Metrics()
    own, key = controller(shop, kube, metrics=metrics), Key.of(spec.sale_id)
    with monkeypatch.context() as patch:
        patch.setattr(own if ended == "prepare" else own.reconciler, ended, fail)
        for _ in range(2):
            assert (await own.reconcile(key)).failed
    assert f'flashsale_sale_ready{{item="",sale="{spec.sale_id}"}} 0.0' in metrics.text().decode()
    ready = kube.status.condition("Ready")
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", "Failed")
    assert ready.message.endswith("see the operator's log: ZeroDivisionError: no units")
    assert len([each for each in caplog.records if each.exc_info]) == 1
    assert not (await own.reconcile(key)).failed
    assert kube.reasons()["Ready"] == "Applied"


async def test_an_unmet_requirement_is_reported(shop: SimulatedShop, spec: SaleSpec) -> None:
    kube = FakeKube(spec)
    own, key = controller(shop, kube), Key.of(spec.sale_id)
    await shop.redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        assert (await own.reconcile(key)).failed
    finally:
        await shop.redis.config_set("maxmemory-policy", "noeviction")
    ready = kube.status.condition("Ready")
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", "RequirementUnmet")
    assert ready.message.startswith("Redis has maxmemory-policy allkeys-lru, but needs")
    assert not (await own.reconcile(key)).failed
    assert kube.reasons()["Ready"] == "Applied"


async def test_an_invalid_spec_is_reported_and_retried(shop: SimulatedShop, spec: SaleSpec) -> None:
    kube = FakeKube(spec)
    kube.live["spec"]["stock"] = -1
    assert (await controller(shop, kube).reconcile(Key.of(spec.sale_id))).failed
    assert kube.reasons() == {
        "Ready": "InvalidSpec",
        "Open": "Unknown",
        "SoldOut": "Unknown",
        "Refused": "Unknown",
    }
    ready = kube.status.condition("Ready")
    assert ready is not None
    assert ready.message == "spec.stock: must be an integer from 0 to 100000000"


@pytest.mark.parametrize(("uid", "sells"), [("uid-2", False), ("uid-1", True)])
async def test_a_flashsale_that_is_replaced_by_one_with_a_wrong_spec_sells_no_more(
    shop: SimulatedShop, spec: SaleSpec, uid: str, sells: bool
) -> None:
    """It was deleted. A FlashSale whose own spec has become wrong keeps its former one."""
    kube = FakeKube(spec)
    own, key = controller(shop, kube), Key.of(spec.sale_id)
    await own.reconcile(key)
    kube.live["metadata"]["uid"] = uid
    kube.live["spec"]["stock"] = -1
    for _ in range(2):
        assert (await own.reconcile(key)).failed
    state = "Selling" if sells else "Unknown"
    assert kube.reasons() == kube.reasons() | {"Ready": "InvalidSpec", "Open": state}
    assert await shop.buy(spec.item_id, "a") == [Outcome.ACCEPTED if sells else Outcome.ENDED]
    assert (await shop.row(spec.sale_id)).closed is not sells
    kube.live["spec"]["stock"] = 10
    kube.live["metadata"]["generation"] += 1
    assert not (await own.reconcile(key)).failed
    assert await shop.buy(spec.item_id, "b") == [Outcome.ACCEPTED]


async def test_a_sale_whose_spec_has_become_wrong_goes_on_with_its_former_one(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """A rule of a new operator forbids its item, for example. Redis then loses the sale."""
    kube, metrics = FakeKube(spec), Metrics()
    key = Key.of(spec.sale_id)
    await controller(shop, kube).reconcile(key)
    await shop.buy(spec.item_id, "a")
    await shop.record(spec.item_id)
    await shop.redis.delete(*ItemKeys.of(spec.item_id).sold)
    own = controller(shop, kube, {"default": "other-"}, metrics)

    async def sells_again() -> bool:
        await own.reconcile(key)
        return kube.reasons()["Ready"] == "InvalidSpec" and "Rebuilt" in kube.events

    await until(sells_again)
    assert kube.reasons()["Open"] == "Selling"
    ready = kube.status.condition("Ready")
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", "InvalidSpec")
    assert ready.message.startswith("spec.itemId: must begin with other-")
    assert kube.status.counts == Counts(10, 1, 9, 0, 1)
    labels = f'{{item="{spec.item_id}",sale="{spec.sale_id}"}}'
    text = metrics.text().decode()
    assert f"flashsale_sale_recorded_units{labels} 1.0" in text
    assert f"flashsale_sale_ready{labels} 0.0" in text


async def test_the_state_of_a_sale_is_unknown_while_the_account_may_not_read_its_flashsale(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube, metrics = FakeKube(spec), Metrics()
    own, key = controller(shop, kube, metrics=metrics), Key.of(spec.sale_id)

    def ready(item_id: str) -> str:
        start = f'flashsale_sale_ready{{item="{item_id}",sale="{spec.sale_id}"}} '
        return metrics.text().decode().partition(start)[2].partition("\n")[0]

    await own.reconcile(key)
    assert ready(spec.item_id) == "1.0"
    kube.forbidden = True
    with pytest.raises(KubeForbidden):
        await own.reconcile(key)
    assert (ready(spec.item_id), ready("")) == ("", "0.0")
    kube.forbidden = False
    await own.reconcile(key)
    assert (ready(spec.item_id), ready("")) == ("1.0", "")
    kube.forbidden = True
    await shop.reconciler.close(spec.sale_id)  # its namespace is gone, and so is the right
    assert await own.reconcile(key) == Requeue(gone=True)
    assert (ready(spec.item_id), ready("")) == ("", "")


async def test_a_flashsale_outside_the_prefix_of_its_namespace_starts_no_sale(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube = FakeKube(spec)
    assert (
        await controller(shop, kube, {"default": "other-"}).reconcile(Key.of(spec.sale_id))
    ).failed
    assert kube.reasons()["Ready"] == "InvalidSpec"
    ready = kube.status.condition("Ready")
    assert ready is not None
    assert ready.message == (
        "spec.itemId: must begin with other- in the namespace default (operator.items)"
    )
    assert await ledger.sale(shop.pool, spec.sale_id) is None
    assert await shop.sale(spec.item_id) is None


async def test_a_terminating_flashsale_does_not_close_a_sale_of_flashsalectl(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.reconciler.reconcile(spec)
    kube = FakeKube(spec)
    kube.live["metadata"]["deletionTimestamp"] = "2026-11-27T09:00:00Z"
    own = controller(shop, kube)
    assert await own.reconcile(Key.of(spec.sale_id)) == Requeue()
    assert kube.reasons()["Ready"] == "Closed"
    assert await own.close_deleted(Key.of(spec.sale_id)) == Requeue(gone=True)
    assert not (await shop.row(spec.sale_id)).closed
    assert await shop.buy(spec.item_id, "a") == [Outcome.ACCEPTED]


async def test_reservations_that_the_ledger_refused_are_reported(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    kube = FakeKube(spec)
    own, key = controller(shop, kube), Key.of(spec.sale_id)
    await own.reconcile(key)
    assert kube.reasons()["Refused"] == "NoneRefused"
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id)
    await shop.pool.execute("UPDATE sales SET accepted = 1")
    await shop.pool.execute("UPDATE reservations SET state = 'refused' WHERE user_id <> 'a'")
    await own.reconcile(key)
    refused = kube.status.condition("Refused")
    assert refused is not None
    assert (refused.status, refused.reason) == ("True", "Refused")
    assert "2 reservations (2 units)" in refused.message
    assert kube.events == ["Opened", "Refused"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RedisUnavailable("Redis is away"), Reason.REDIS_UNAVAILABLE),
        (LedgerUnavailable("the ledger is away"), Reason.LEDGER_UNAVAILABLE),
        (ContractViolation("another format"), Reason.UNREADABLE),
        (OtherEngine("two engines"), Reason.OTHER_ENGINE),
        (RedisMoved("another address"), Reason.REDIS_MOVED),
        (UnmetRequirement("an old server"), Reason.REQUIREMENT_UNMET),
    ],
)
def test_the_reason_names_the_server_that_is_away(error: FlashsaleError, reason: Reason) -> None:
    result = result_of_error(SPEC, error)
    assert (result.ready, result.reason, result.message) == (False, reason, str(error))
