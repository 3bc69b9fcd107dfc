"""The controller's reports during outages and about wrong manifests, on real Redis and ledger."""

from collections.abc import Mapping
from typing import Any, cast

import pytest

from flashsale.errors import (
    ContractViolation,
    FlashsaleError,
    LedgerUnavailable,
    RedisUnavailable,
)
from flashsale.sale import SaleSpec
from flashsale_operator.kubernetes.client import Kube
from flashsale_operator.kubernetes.controller import Clients, Controller, result_of_error
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import Key, Queue, Requeue
from flashsale_operator.kubernetes.rebuilds import Rebuilds
from flashsale_operator.kubernetes.status import Counts, Status
from flashsale_operator.sales.decision import Reason
from tests.support.bad_manifests import manifest
from tests.support.observations import SPEC
from tests.support.simulated_shop import QUICK, SimulatedShop


class FakeKube:
    """A kube-apiserver with one FlashSale, which keeps its status."""

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

    async def flash_sale(self, *_key: str) -> dict[str, Any] | None:
        return self.live

    async def patch_status(
        self, _namespace: str, _name: str, status: Mapping[str, object], _version: str
    ) -> bool:
        self.live["status"] = {name: value for name, value in status.items() if value is not None}
        return True

    async def create_event(self, _namespace: str, event: Mapping[str, str]) -> bool:
        self.events.append(event["reason"])
        return True

    @property
    def status(self) -> Status:
        return Status.parse(self.live["status"])

    def reasons(self) -> dict[str, str]:
        return {condition.type: condition.reason for condition in self.status.conditions}


def controller(shop: SimulatedShop, kube: FakeKube) -> Controller:
    queue = Queue()
    clients = Clients(cast("Kube", kube), shop.inventory, shop.pool, Metrics())
    rebuilds = Rebuilds(shop.inventory, shop.pool, shop.spans, queue, patience=QUICK)
    return Controller(clients, queue, rebuilds)


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
    }
    assert kube.status.counts == Counts(10, 3, 7)
    assert kube.events == ["Opened"]


async def test_an_invalid_spec_is_reported_and_retried(shop: SimulatedShop, spec: SaleSpec) -> None:
    kube = FakeKube(spec)
    kube.live["spec"]["stock"] = -1
    assert (await controller(shop, kube).reconcile(Key.of(spec.sale_id))).failed
    assert kube.reasons() == {"Ready": "InvalidSpec", "Open": "Unknown", "SoldOut": "Unknown"}
    ready = kube.status.condition("Ready")
    assert ready is not None
    assert ready.message == "spec.stock: must be an integer from 0 to 100000000"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RedisUnavailable("Redis is away"), Reason.REDIS_UNAVAILABLE),
        (LedgerUnavailable("the ledger is away"), Reason.LEDGER_UNAVAILABLE),
        (ContractViolation("another format"), Reason.UNREADABLE),
    ],
)
def test_the_reason_names_the_server_that_is_away(error: FlashsaleError, reason: Reason) -> None:
    result = result_of_error(SPEC, error)
    assert (result.ready, result.reason, result.message) == (False, reason, str(error))
