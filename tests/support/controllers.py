"""A kube-apiserver with one FlashSale, and a controller that works with it."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from flashsale.sale import SaleSpec
from flashsale_operator.kubernetes.client import Kube, KubeForbidden, KubeUnavailable
from flashsale_operator.kubernetes.controller import Clients, Controller
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import Queue
from flashsale_operator.kubernetes.rebuilds import Rebuilds
from flashsale_operator.kubernetes.status import Status
from tests.support.bad_manifests import manifest
from tests.support.simulated_shop import QUICK, SimulatedShop


class FakeKube:
    """A kube-apiserver with one FlashSale, which keeps its status.

    `fields` are the fields of the status that its CRD has. `before_patch` is called before the
    first write. `changed`: the object has always changed since it was read. `away`: it creates no
    Event. `former` are the answers to the next reads, which are outdated. `forbidden`: the account
    may not read the object.
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
    forbidden = False
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
        self.former: list[dict[str, Any] | None] = []

    async def flash_sale(self, *_key: str) -> dict[str, Any] | None:
        if self.forbidden:
            raise KubeForbidden("the kube-apiserver refused: 403 forbidden")
        return self.former.pop(0) if self.former else self.live

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
