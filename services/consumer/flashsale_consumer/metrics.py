"""The consumer's Prometheus metrics."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from flashsale import monitoring
from flashsale.keys import DEFAULT_ENGINE


class Metrics:
    """The consumer's metrics, in their own registry."""

    def __init__(self, engine: str = DEFAULT_ENGINE) -> None:
        self._registry = monitoring.registry("consumer", engine)
        counter = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        self.batches = counter(
            "flashsale_consumer_batches_total", "Batches that were committed to the ledger."
        )
        self.events = counter(
            "flashsale_consumer_events_total", "Events read, by result.", ["result"]
        )
        for result in ("recorded", "duplicate", "refused", "dead_lettered"):
            self.events.labels(result)
        self.voided = counter(
            "flashsale_consumer_voided_total",
            "Events of known reservations that their sale's last rebuild did not find.",
        )
        self.deleted = counter(
            "flashsale_consumer_deleted_events_total",
            "Events that Kafka deleted before they were recorded.",
        )
        self.batch_size = histogram(
            "flashsale_consumer_batch_size",
            "Events in a committed batch.",
            buckets=(1, 5, 25, 100, 250, 500, 1_000, 2_500, 5_000),
        )
        self.record_seconds = histogram(
            "flashsale_consumer_record_seconds",
            "Duration of a batch's transaction.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )
        self.end_to_end = Ages(
            "flashsale_consumer_end_to_end_seconds",
            "Time from a reservation or a confirmation in Redis to its commit in the ledger.",
            bounds=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
        )
        self._registry.register(self.end_to_end)
        self.lag = gauge(
            "flashsale_consumer_lag",
            "Events of an assigned partition that the ledger does not have yet.",
            ["partition"],
        )
        self.unannounced = gauge(
            "flashsale_consumer_unannounced_events",
            "Events of an assigned partition that are recorded and not announced yet.",
            ["partition"],
        )
        self.unannounced_seconds = gauge(
            "flashsale_consumer_unannounced_seconds",
            "How long the oldest recorded event has waited to be announced, 0 if none waits.",
        )
        self.announced = counter(
            "flashsale_consumer_announced_total",
            "Messages that Kafka acknowledged in the topic of recorded reservations.",
        )
        self.server_up = gauge(
            "flashsale_consumer_server_up",
            "1 if the last call to the server succeeded: ledger, kafka, dead_letters, recorded.",
            ["server"],
        )

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class Ages(Collector):
    """A histogram that observes the values of a whole batch at once.

    A call of `Histogram.observe` per event would take a tenth of the consumer's CPU time.
    """

    def __init__(self, name: str, documentation: str, *, bounds: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = [*bounds, float("inf")]
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe_all(self, seconds: Iterable[float]) -> None:
        for value in seconds:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        buckets = [
            ("+Inf" if bound == float("inf") else str(float(bound)), count)
            for bound, count in zip(self._bounds, accumulate(self._counts), strict=True)
        ]
        yield HistogramMetricFamily(
            self._name, self._documentation, buckets=buckets, sum_value=self._sum
        )
