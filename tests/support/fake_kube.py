"""A kube-apiserver that lists FlashSales, and a resync that works with it."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

from flashsale_operator.kubernetes.client import Kube, KubeForbidden
from flashsale_operator.kubernetes.controller import Clients, Controller
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import Key, Queue
from flashsale_operator.kubernetes.rebuilds import Rebuilds
from flashsale_operator.kubernetes.resync import Resync
from tests.support.simulated_shop import QUICK, SimulatedShop


class FakeKube:
    """A kube-apiserver with FlashSales. It refuses to list the namespaces in `refused`."""

    def __init__(self, *present: Key, refused: Sequence[str] = ()) -> None:
        self.present = present
        self.refused = refused
        self.unlisted: Sequence[Key] = ()
        """FlashSales that are there only when they are read by their names."""
        self.events: list[str] = []

    async def flash_sales(self, namespace: str | None) -> list[dict[str, Any]]:
        if namespace in self.refused:
            raise KubeForbidden("the kube-apiserver refused: 403 forbidden")
        return [
            {"metadata": key._asdict()}
            for key in self.present
            if namespace in (None, key.namespace)
        ]

    async def flash_sale(self, namespace: str, name: str) -> dict[str, Any] | None:
        key = Key(namespace, name)
        return {"metadata": key._asdict()} if key in (*self.present, *self.unlisted) else None

    async def create_event(self, _namespace: str, event: Mapping[str, str]) -> bool:
        self.events.append(event["reason"])
        return True


def resync_of(
    shop: SimulatedShop,
    kube: FakeKube | None = None,
    queue: Queue | None = None,
    *served: str,
    metrics: Metrics | None = None,
) -> Resync:
    """Return the resync of an operator that frees closed sales after an hour."""
    kube, queue, metrics = kube or FakeKube(), queue or Queue(), metrics or Metrics()
    clients = Clients(cast("Kube", kube), shop.inventory, shop.pool, metrics)
    rebuilds = Rebuilds(shop.inventory, shop.pool, shop.spans, queue, metrics, patience=QUICK)
    own = Controller(clients, queue, rebuilds)
    return Resync(clients, own, queue, rebuilds, served=served, keep_closed=timedelta(hours=1))
