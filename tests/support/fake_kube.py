"""A kube-apiserver that lists FlashSales, for tests of the resync."""

from collections.abc import Mapping, Sequence
from typing import Any

from flashsale_operator.kubernetes.client import KubeForbidden
from flashsale_operator.kubernetes.queue import Key


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
