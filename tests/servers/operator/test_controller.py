"""The controller's reports during outages and about wrong manifests, on real Redis and ledger."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, cast

import pytest

from dev.stack.redis_cluster import RedisCluster
from dev.stack.servers import RedisServer
from flashsale import ledger, redis_client
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
from flashsale.sale import SaleSpec, SaleState
from flashsale_operator.kubernetes import rebuilds
from flashsale_operator.kubernetes.client import Kube, KubeUnavailable
from flashsale_operator.kubernetes.controller import Clients, Controller
from flashsale_operator.kubernetes.failures import result_of_error
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import Key, Queue, Requeue
from flashsale_operator.kubernetes.rebuilds import Rebuilds
from flashsale_operator.kubernetes.status import Counts, Status
from flashsale_operator.sales.decision import Reason
from flashsale_operator.sales.offsets import Span
from tests.support.bad_manifests import manifest
from tests.support.eventually import until
from tests.support.observations import SPEC
from tests.support.simulated_shop import QUICK, SimulatedShop

OTHER_ID = str(uuid.UUID(int=7))


class FakeKube:
    """A kube-apiserver with one FlashSale, which keeps its status.

    `fields` are the fields of the status that its CRD has. `before_patch` is called before the
    first write. `changed`: the object has always changed since it was read. `away`: it creates no
    Event.
    """

    fields = frozenset(
        [
            "observedGeneration",
            "saleId",
            "engine",
            "conditions",
            "allocated",
            "accepted",
            "available",
            "held",
            "confirmed",
            "holdExpired",
        ]
    )
    changed = False
    away = False
    before_patch: Callable[[], Awaitable[None]] | None = None

    def __init__(self, spec: SaleSpec) -> None:
        self.live = manifest()
        self.live["metadata"] = {
            "name": spec.sale_id.split("/")[1],
            "namespace": "default",
            "uid": "uid-1",
            "generation": 1,
            "resourceVersion": "1",
        }
        self.live["spec"] = {"itemId": spec.item_id, "stock": spec.stock}
        self.events: list[str] = []
        self.messages: list[str] = []
        self.names: list[str] = []
        self.patches = 0

    async def flash_sale(self, *_key: str) -> dict[str, Any] | None:
        return self.live

    async def patch_status(
        self, _namespace: str, _name: str, status: Mapping[str, object], _version: str
    ) -> dict[str, Any] | None:
        if self.before_patch is not None:
            does, self.before_patch = self.before_patch, None
            await does()
        if self.changed:
            return None
        self.patches += 1
        merged = {**self.live.get("status", {}), **status}
        self.live["status"] = {
            name: value
            for name, value in merged.items()
            if value is not None and name in self.fields
        }
        return self.live

    async def create_event(self, _namespace: str, event: Mapping[str, Any]) -> bool:
        if self.away:
            raise KubeUnavailable("the kube-apiserver is away")
        self.events.append(event["reason"])
        self.messages.append(event["message"])
        self.names.append(event["metadata"]["name"])
        return True

    @property
    def status(self) -> Status:
        return Status.parse(self.live["status"])

    def reasons(self) -> dict[str, str]:
        return {condition.type: condition.reason for condition in self.status.conditions}


def controller(
    shop: SimulatedShop,
    kube: FakeKube,
    prefixes: Mapping[str, str] | None = None,
    metrics: Metrics | None = None,
) -> Controller:
    queue, metrics = Queue(), metrics or Metrics()
    clients = Clients(cast("Kube", kube), shop.inventory, shop.pool, metrics)
    background = Rebuilds(shop.inventory, shop.pool, shop.spans, queue, metrics, patience=QUICK)
    return Controller(clients, queue, background, prefixes=prefixes or {})


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
        return kube.reasons()["Open"] == "SoldOut"

    await until(rebuilt)
    assert kube.events == ["Opened", "SoldOut", "Fenced", "Rebuilt"]


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
    assert kube.status.engine == await shop.inventory.engine_id()


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
    assert await shop.inventory.engine_id() in kube.messages[0]


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


async def test_a_redis_that_the_sales_have_left_sells_no_unit_again(
    shop: SimulatedShop, sold: SaleSpec, redis_server: RedisServer
) -> None:
    """A rollback starts the API at the former address, at which the sale was never paused."""
    client = redis_client.connect(f"{redis_server.url.rpartition('/')[0]}/1")
    moved = SimulatedShop(client, shop.pool)
    kube = FakeKube(sold)
    former = controller(shop, kube)
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
            await shop.reconciler.fence_outdated(spec.sale_id, "")
            assert await shop.buy(item, "z") == [Outcome.FENCED], node
            left.add(node)
    finally:
        await client.aclose()


async def test_a_crd_without_the_engine_is_reported(shop: SimulatedShop, spec: SaleSpec) -> None:
    kube = FakeKube(spec)
    kube.fields = kube.fields - {"engine"}
    assert (await controller(shop, kube).reconcile(Key.of(spec.sale_id))).failed
    ready = kube.status.condition("Ready")
    assert ready is not None
    assert ready.message.startswith("the CustomResourceDefinition has no status.engine: install")
    assert await ledger.sale(shop.pool, spec.sale_id) is None


@pytest.mark.parametrize("ended", ["reconcile", "prepare"])
async def test_an_unexpected_error_is_reported_and_retried(
    shop: SimulatedShop,
    spec: SaleSpec,
    ended: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError("no\nunits")

    kube, metrics = FakeKube(spec), Metrics()
    own, key = controller(shop, kube, metrics=metrics), Key.of(spec.sale_id)
    with monkeypatch.context() as patch:
        patch.setattr(own if ended == "prepare" else own._reconciler, ended, fail)
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
