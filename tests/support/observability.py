"""The rules, the documented metrics, and a running engine whose metrics and logs tests read."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dev.crowd import attempts, stampede
from dev.services import ApiServer, ConsumerServer, OperatorServer
from tests.support.cluster import World
from tests.support.paths import CHART_FILES, DOCS

COMPONENTS: Final = ("api", "consumer", "operator")
ALERTS: Final = CHART_FILES / "alerts.yaml"
RULES: Final[dict[str, dict[str, Any]]] = {
    rule["alert"]: rule
    for group in yaml.safe_load(ALERTS.read_text())["groups"]
    for rule in group["rules"]
}


class Metric(NamedTuple):
    name: str
    component: str
    type: str
    labels: frozenset[str]


def documented() -> list[Metric]:
    """Return the rows of docs/metrics.md. A row of "all" counts once per component."""
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| (\w+) \| (.*?) \|",
        (DOCS / "metrics.md").read_text(),
        re.MULTILINE,
    )
    return [
        Metric(name, component, kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, of, kind, labels in rows
        for component in (COMPONENTS if of == "all" else (of,))
    ]


def exposed(texts: Mapping[str, str]) -> list[Metric]:
    """Return the metrics in the text that each component serves."""
    return [
        Metric(
            f"{family.name}_total" if family.type == "counter" else family.name,
            component,
            family.type,
            frozenset(label for sample in family.samples for label in sample.labels) - {"le"},
        )
        for component, text in texts.items()
        for family in text_string_to_metric_families(text)
    ]


@dataclass(frozen=True, slots=True)
class ObservedEngine:
    """An API, a consumer and an operator with one FlashSale."""

    world: World
    api: ApiServer
    consumer: ConsumerServer
    operator: OperatorServer
    item: str

    @property
    def targets(self) -> dict[str, str]:
        """The address of each component's metrics."""
        return {
            "api": self.api.metrics_url,
            "consumer": f"{self.consumer.url}/metrics",
            "operator": f"http://127.0.0.1:{self.operator.port}/metrics",
        }

    def metrics(self) -> dict[str, str]:
        """Return the text that each component serves."""
        return {name: httpx.get(url).text for name, url in self.targets.items()}

    def crowd(self, users: int = 60) -> None:
        """Send ten requests per user, valid and invalid ones."""
        wanted = attempts(self.item, users, seed=9)
        asyncio.run(stampede([self.api.url], wanted, connections=20))

    def order(self, user: str) -> None:
        """Reserve a unit and confirm the reservation as the shop's order service does."""
        self.confirm(self.reserve(user), f"order-of-{user}")

    def reserve(self, user: str) -> str:
        """Reserve a unit. Return the path of the reservation."""
        body = {"userId": user, "itemId": self.item, "quantity": 1}
        path: str = httpx.post(f"{self.api.url}/reserve", json=body).headers["location"]
        return path

    def confirm(self, path: str, order_ref: str) -> None:
        """Confirm a reservation as the shop's order service does."""
        token = self.api.order_tokens.partition(",")[0]
        httpx.post(
            f"{self.api.orders_url}{path}/confirm",
            json={"orderRef": order_ref},
            headers={"Authorization": f"Bearer {token}"},
        ).raise_for_status()
