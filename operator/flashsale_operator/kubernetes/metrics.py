"""What the operator measures, for Prometheus. Labels are bounded by the FlashSales there are."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from flashsale import telemetry
from flashsale.sale import SaleState
from flashsale_operator.kubernetes.status import Counts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Figures:
    """What the last reconcile of a FlashSale found; `recorded` is the units that the ledger has."""

    item_id: str
    state: SaleState
    ready: bool
    counts: Counts | None
    recorded: int | None = None


class Backlog:
    """How long the oldest accepted unit has waited for the ledger, as far as samples tell."""

    def __init__(self) -> None:
        # Moments, and the units that had been accepted by then and not recorded.
        self._samples: deque[tuple[float, int]] = deque()
        self._recorded = 0

    def sample(self, now: float, accepted: int, recorded: int | None) -> None:
        """`recorded` is None while the ledger does not say."""
        if recorded is not None:
            self._recorded = recorded
        samples = self._samples
        while samples and samples[0][1] <= self._recorded:
            samples.popleft()
        while samples and samples[-1][1] > accepted:  # Redis has lost some
            samples.pop()
        if accepted > max(self._recorded, samples[-1][1] if samples else 0):
            samples.append((now, accepted))

    def seconds(self, now: float) -> float:
        return now - self._samples[0][0] if self._samples else 0.0


@dataclass(slots=True)
class _Known:
    figures: Figures
    backlog: Backlog = field(default_factory=Backlog)


class Sales(Collector):
    """The sales as they were found last; one that is gone is not told of any more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._known: dict[tuple[str, str], _Known] = {}
        self._clock = clock

    def __len__(self) -> int:
        return len(self._known)

    def found(self, key: tuple[str, str], figures: Figures) -> None:
        known = self._known.setdefault(key, _Known(figures))
        known.figures = figures
        if figures.counts is not None:
            known.backlog.sample(self._clock(), figures.counts.accepted, figures.recorded)

    def forget(self, key: tuple[str, str]) -> None:
        self._known.pop(key, None)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        states = dict.fromkeys(SaleState, 0)
        for known in self._known.values():
            states[known.figures.state] += 1
        numbers = GaugeMetricFamily(
            "flashsale_operator_sales", "FlashSales by state.", labels=["state"]
        )
        for state, number in states.items():
            numbers.add_metric([state], number)
        yield numbers
        doing = GaugeMetricFamily(
            "flashsale_sale_state",
            "1 for the state that the sale is in.",
            labels=["sale", "item", "state"],
        )
        ready = _of_a_sale("flashsale_sale_ready", "1 if Redis and ledger are as the spec asks.")
        waiting = _of_a_sale(
            "flashsale_unrecorded_seconds",
            "How long the oldest accepted unit has not been in the ledger, as seen every 5 s.",
        )
        allocated = _of_a_sale("flashsale_allocated", "Units that the sale may sell.")
        accepted = _of_a_sale("flashsale_accepted", "Units ever accepted by the sale.")
        available = _of_a_sale("flashsale_available", "Units left of the sale.")
        recorded = _of_a_sale("flashsale_recorded", "Accepted units that the ledger has.")
        now = self._clock()
        for key, known in self._known.items():
            figures, counts = known.figures, known.figures.counts
            labels = ["/".join(key), figures.item_id]
            doing.add_metric([*labels, figures.state], 1)
            ready.add_metric(labels, figures.ready)
            if figures.recorded is not None:
                recorded.add_metric(labels, figures.recorded)
            if counts is not None:
                waiting.add_metric(labels, known.backlog.seconds(now))
                allocated.add_metric(labels, counts.allocated)
                accepted.add_metric(labels, counts.accepted)
                available.add_metric(labels, counts.available)
        yield from (doing, ready, allocated, accepted, available, recorded, waiting)


def _of_a_sale(name: str, documentation: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, labels=["sale", "item"])


class Metrics:
    """The operator's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = telemetry.registry("operator")
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
        self.fences = Counter(
            "flashsale_operator_fences",
            "Times a sale was found fenced.",
            registry=self.registry,
        )
        self.rebuilds = Counter(
            "flashsale_operator_rebuilds",
            "Fenced sales that were rebuilt and are trusted again.",
            registry=self.registry,
        )
        self.lost = Counter(
            "flashsale_operator_lost_units",
            "Units that Redis had accepted and rebuilds found nowhere.",
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
