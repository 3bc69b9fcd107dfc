"""Prometheus metrics of the API. They are served on their own port."""

from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram

from flashsale import telemetry

# Fine steps from 1 to 50 ms, because most answers should take that long.
_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)


class _Outcomes(dict[str, Counter]):
    """The counters of an item by outcome. Each one is made at its first use."""

    def __init__(self, requests: Counter, item_id: str) -> None:
        self._requests = requests
        self._item_id = item_id

    def __missing__(self, outcome: str) -> Counter:
        made = self[outcome] = self._requests.labels(self._item_id, outcome)
        return made


class ItemMetrics:
    """The metrics of the requests for an item. Saves a lookup of the labels per request."""

    __slots__ = ("accepted", "failed", "outcomes", "rejected")

    def __init__(self, requests: Counter, seconds: Histogram, item_id: str) -> None:
        self.outcomes = _Outcomes(requests, item_id)
        self.accepted = seconds.labels(item_id, "accepted")
        self.rejected = seconds.labels(item_id, "rejected")
        self.failed = seconds.labels(item_id, "failed")


class Metrics:
    """The metrics and their registry. Durations are in seconds.

    An item is a label only while it has a sale. Requests for other items are counted with an empty
    label, so that clients cannot add time series.
    """

    def __init__(self) -> None:
        self.registry = telemetry.registry("api")
        self._requests = Counter(
            "flashsale_api_requests",
            "POST /reserve requests by outcome.",
            ["item", "outcome"],
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "flashsale_api_request_seconds",
            "Time from reading the whole request to passing the answer to the server.",
            ["item", "answer"],
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
            "Duration of one script call, as measured by the API.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.script_failures = Counter(
            "flashsale_api_script_failures",
            "Script calls that Redis refused or did not answer in time.",
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
        self.outbox_age = Gauge(
            "flashsale_api_outbox_age_seconds",
            "Age of the oldest entry in the outbox, as last seen by this pod. 0 if it is empty.",
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
        up = Gauge(
            "flashsale_api_server_up",
            "1 if the last call to the server succeeded: redis, kafka.",
            ["server"],
            registry=self.registry,
        )
        self.redis_up, self.kafka_up = up.labels("redis"), up.labels("kafka")
        self._of_no_item = ItemMetrics(self._requests, self._request_seconds, "")
        self._of_item: dict[str, ItemMetrics] = {}
        self._listed: frozenset[str] = frozenset()

    def of(self, item_id: str) -> ItemMetrics:
        """Returns the metrics of the requests for an item."""
        return self._of_item.get(item_id, self._of_no_item)

    def add_item(self, item_id: str) -> None:
        """Makes an item with a sale a label."""
        if item_id not in self._of_item:
            self._of_item[item_id] = ItemMetrics(self._requests, self._request_seconds, item_id)

    def set_items(self, item_ids: Iterable[str]) -> None:
        """Makes these items labels, and removes items of the previous call that are missing now."""
        listed = frozenset(item_ids)
        by_item = self._requests, self._request_seconds, self.outbox_length, self.outbox_age
        for item_id in self._listed - listed:
            del self._of_item[item_id]
            for metric in by_item:
                metric.remove_by_labels({"item": item_id})
        for item_id in listed:
            self.add_item(item_id)
        self._listed = listed
