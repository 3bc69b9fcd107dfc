"""What the operator measures, for Prometheus. Labels are bounded by the FlashSales there are."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from flashsale_operator.conditions import Counts
from flashsale_operator.reconcile import State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Figures:
    """What the last reconcile of a FlashSale found."""

    item_id: str
    state: State
    counts: Counts | None


class Sales(Collector):
    """The sales as they were found last; one that is gone is not told of any more."""

    def __init__(self) -> None:
        self._figures: dict[tuple[str, str], Figures] = {}

    def __len__(self) -> int:
        return len(self._figures)

    def found(self, key: tuple[str, str], figures: Figures) -> None:
        self._figures[key] = figures

    def forget(self, key: tuple[str, str]) -> None:
        self._figures.pop(key, None)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        states = dict.fromkeys(State, 0)
        for figures in self._figures.values():
            states[figures.state] += 1
        sales = GaugeMetricFamily(
            "flashsale_operator_sales", "FlashSales by state.", labels=["state"]
        )
        for state, number in states.items():
            sales.add_metric([state], number)
        yield sales
        for name, documentation in (
            ("allocated", "Units that the item's sale may sell."),
            ("accepted", "Units ever accepted by the item's sale."),
            ("available", "Units left of the item's sale."),
        ):
            family = GaugeMetricFamily(f"flashsale_{name}", documentation, labels=["item"])
            for figures in self._figures.values():
                if figures.counts is not None:
                    family.add_metric([figures.item_id], getattr(figures.counts, name))
            yield family


class Metrics:
    """The operator's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.sales = Sales()
        self.registry.register(self.sales)
        self.reconciles = Counter(
            "flashsale_operator_reconciles",
            "Reconciles of FlashSales.",
            registry=self.registry,
        )
        self.failures = Counter(
            "flashsale_operator_failures",
            "Reconciles and passes that failed, by what was away: redis, ledger, kafka, "
            "kubernetes, other.",
            ["server"],
            registry=self.registry,
        )
        for server in ("redis", "ledger", "kafka", "kubernetes", "other"):
            self.failures.labels(server)
        self.reconcile_seconds = Histogram(
            "flashsale_operator_reconcile_seconds",
            "Duration of a reconcile.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.freed = Counter(
            "flashsale_operator_sales_freed",
            "Closed sales whose keys were deleted from Redis.",
            registry=self.registry,
        )
        self.last_success = Gauge(
            "flashsale_operator_last_success_timestamp_seconds",
            "When a pass over all FlashSales last succeeded, in Unix seconds.",
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
