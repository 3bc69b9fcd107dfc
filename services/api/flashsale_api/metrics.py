"""Prometheus metrics of the API, served on their own port."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Resolves 1 to 50 ms, where the answers must be.
_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics and the registry that holds them. Durations are seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "flashsale_api_requests",
            "POST /reserve requests by outcome.",
            ["outcome"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "flashsale_api_request_seconds",
            "Time from the request's first byte read to its answer handed to the server.",
            ["answer"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "flashsale_api_batch_size",
            "Requests in one script call.",
            buckets=_BATCH,
            registry=self.registry,
        )
        self.script_seconds = Histogram(
            "flashsale_api_script_seconds",
            "Time of one script call, as the API sees it.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.waiting = Gauge(
            "flashsale_api_waiting_requests",
            "Requests that wait for a script call.",
            registry=self.registry,
        )
        self.outbox_length = Gauge(
            "flashsale_api_outbox_entries",
            "Accepted reservations in the outbox, as last seen by this pod.",
            ["item"],
            registry=self.registry,
        )
        self.unacknowledged = Gauge(
            "flashsale_api_unacknowledged_events",
            "Events in this pod's memory that Kafka has not acknowledged.",
            registry=self.registry,
        )
        self.published = Counter(
            "flashsale_api_events_published",
            "Events that Kafka acknowledged to this pod.",
            registry=self.registry,
        )
        self.publish_failures = Counter(
            "flashsale_api_publish_failures",
            "Producers that were discarded because Kafka failed.",
            registry=self.registry,
        )
        self.swept = Counter(
            "flashsale_api_events_swept",
            "Events taken over from the outbox because no pod had published them.",
            registry=self.registry,
        )
