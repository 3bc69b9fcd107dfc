"""The operator's Prometheus metrics. The number of FlashSales bounds their labels."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from flashsale import monitoring
from flashsale.keys import DEFAULT_ENGINE
from flashsale.sale import Sale, SaleState
from flashsale_operator.sales.reconciler import Result


class Backlog:
    """How long the oldest accepted unit had waited for the ledger at the last sample.

    Without samples the age does not grow: the operator cannot know that the unit still waits.
    """

    def __init__(self) -> None:
        # Times, and the units that were accepted at that time but not recorded.
        self._samples: deque[tuple[float, int]] = deque()
        self._recorded = 0
        self._now = 0.0

    def sample(self, now: float, accepted: int, recorded: int | None) -> None:
        """Adds the counts at a time. `recorded` is None while the ledger does not answer."""
        self._now = now
        if recorded is not None:
            self._recorded = recorded
        samples = self._samples
        while samples and samples[0][1] <= self._recorded:
            samples.popleft()
        while samples and samples[-1][1] > accepted:  # Redis has lost some
            samples.pop()
        if accepted > max(self._recorded, samples[-1][1] if samples else 0):
            samples.append((now, accepted))

    @property
    def seconds(self) -> float:
        return self._now - self._samples[0][0] if self._samples else 0.0


@dataclass(slots=True)
class _Entry:
    result: Result
    sale: Sale | None = None
    backlog: Backlog = field(default_factory=Backlog)


class SaleMetrics(Collector):
    """The gauges of each sale, from its last reconcile."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], _Entry] = {}

    def update(self, key: tuple[str, str], result: Result) -> None:
        entry = self._entries.setdefault(key, _Entry(result))
        entry.result = result
        if result.state is not SaleState.FENCED:  # A fenced sale can lack any unit.
            entry.sale = result.own_sale
        if entry.sale is not None:
            entry.backlog.sample(time.monotonic(), entry.sale.accepted, result.recorded)

    def forget(self, key: tuple[str, str]) -> None:
        self._entries.pop(key, None)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        # Scrapes run in a thread.
        entries = list(self._entries.items())
        counts = dict.fromkeys(SaleState, 0)
        for _, entry in entries:
            counts[entry.result.state] += 1
        by_state = GaugeMetricFamily(
            "flashsale_operator_sales", "FlashSales by state.", labels=["state"]
        )
        for state, number in counts.items():
            by_state.add_metric([state], number)
        yield by_state
        current = GaugeMetricFamily(
            "flashsale_sale_state",
            "1 for the current state of the sale.",
            labels=["sale", "item", "state"],
        )
        ready = _of_a_sale("flashsale_sale_ready", "1 if the ledger and Redis match the spec.")
        waiting = _of_a_sale(
            "flashsale_sale_unrecorded_seconds",
            "How long the oldest accepted unit has waited for the ledger, sampled every 5 s.",
        )
        allocated = _of_a_sale("flashsale_sale_allocated_units", "Units that the sale may sell.")
        accepted = _of_a_sale("flashsale_sale_accepted_units", "Units ever accepted by the sale.")
        available = _of_a_sale("flashsale_sale_available_units", "Units that are still for sale.")
        recorded = _of_a_sale("flashsale_sale_recorded_units", "Accepted units in the ledger.")
        lost = _of_a_sale(
            "flashsale_sale_lost_units",
            "Units that Redis had accepted and that rebuilds of the sale found nowhere.",
        )
        for key, entry in entries:
            result = entry.result
            labels = ["/".join(key), result.item_id]
            current.add_metric([*labels, result.state], 1)
            ready.add_metric(labels, result.ready)
            if result.row is not None:
                lost.add_metric(labels, result.row.lost)
            if (sale := entry.sale) is not None:
                waiting.add_metric(labels, entry.backlog.seconds)
                allocated.add_metric(labels, sale.allocated)
                accepted.add_metric(labels, sale.accepted)
                available.add_metric(labels, sale.available)
                if result.row is not None:  # only next to the counts of the same sale
                    recorded.add_metric(labels, result.row.accepted)
        yield from (current, ready, allocated, accepted, available, recorded, lost, waiting)


def _of_a_sale(name: str, documentation: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, labels=["sale", "item"])


class Metrics:
    """The operator's metrics, in their own registry."""

    def __init__(self, engine: str = DEFAULT_ENGINE) -> None:
        self.registry = monitoring.registry("operator", engine)
        self.sales = SaleMetrics()
        self.registry.register(self.sales)
        counter = partial(Counter, registry=self.registry)
        self.reconciles = counter("flashsale_operator_reconciles", "Reconciles of FlashSales.")
        self.failures = counter(
            "flashsale_operator_failures",
            "Failed reconciles and resyncs, by the server that was away: redis, ledger, kafka, "
            "kubernetes, other.",
            ["server"],
        )
        for server in ("redis", "ledger", "kafka", "kubernetes", "other"):
            self.failures.labels(server)
        self.reconcile_seconds = Histogram(
            "flashsale_operator_reconcile_seconds",
            "Duration of a reconcile.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.freed = counter(
            "flashsale_operator_sales_freed", "Closed sales whose keys were deleted from Redis."
        )
        self.fences = counter("flashsale_operator_fences", "Times a sale was found fenced.")
        self.rebuilds = counter(
            "flashsale_operator_rebuilds", "Fenced sales that were rebuilt and are trusted again."
        )
        self.lost = counter(
            "flashsale_operator_lost_units",
            "Units that Redis had accepted and that rebuilds found nowhere.",
        )
        self.last_success = Gauge(
            "flashsale_operator_last_success_timestamp_seconds",
            "When a resync of all FlashSales last succeeded, in Unix seconds.",
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
