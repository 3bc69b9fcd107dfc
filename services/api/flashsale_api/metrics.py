"""Prometheus metrics of the API. They are served on their own port."""

from collections.abc import Iterable, Mapping
from functools import partial

from prometheus_client import Counter, Gauge, Histogram, generate_latest

from flashsale import monitoring
from flashsale.inventory import Holds
from flashsale.keys import DEFAULT_ENGINE

# Fine steps from 1 to 50 ms, because most answers should take that long.
_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)
# These counters exist before their first event. Prometheus finds no increase in a counter that is
# above 0 at its first scrape, and a sale can sell out, or its holds expire, between two scrapes.
_OUTCOMES = ("accepted", "sold_out", "limit_reached")
_VERBS = ("confirm", "cancel", "expire")


class _Outcomes(dict[str, Counter]):
    """The counters of an item by outcome. Each one is made at its first use."""

    def __init__(self, requests: Counter, item_id: str) -> None:
        self._requests = requests
        self._item_id = item_id

    def __missing__(self, outcome: str) -> Counter:
        made = self[outcome] = self._requests.labels(self._item_id, outcome)
        return made


class Metrics:
    """The metrics and their registry. Durations are in seconds.

    Histograms have no items, because a histogram per item made a scrape of 2,000 sales 9 MB large.
    An item is a label only while it has a sale. Requests for other items are counted with an empty
    label, so that clients cannot add time series.
    """

    def __init__(self, engine: str = DEFAULT_ENGINE) -> None:
        self.registry = monitoring.registry("api", engine)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self._requests = counter(
            "flashsale_api_requests", "POST /reserve requests by outcome.", ["item", "outcome"]
        )
        seconds = histogram(
            "flashsale_api_request_seconds",
            "Time from reading the whole request to passing the answer to the server.",
            ["answer"],
            buckets=_SECONDS,
        )
        self.accepted = seconds.labels("accepted")
        self.rejected = seconds.labels("rejected")
        self.failed = seconds.labels("failed")
        self.batch_size = histogram(
            "flashsale_api_batch_size", "Requests in one script call.", buckets=_BATCH
        )
        self.script_seconds = histogram(
            "flashsale_api_script_seconds",
            "Duration of one script call, as measured by the API.",
            buckets=_SECONDS,
        )
        self.script_failures = counter(
            "flashsale_api_script_failures",
            "Script calls that Redis refused or did not answer in time.",
        )
        self.waiting = gauge(
            "flashsale_api_waiting_requests", "Requests that wait for a script call."
        )
        self.outbox_length = gauge(
            "flashsale_api_outbox_entries",
            "Accepted reservations in the outbox, as last seen by this pod.",
            ["item"],
        )
        self.outbox_age = gauge(
            "flashsale_api_outbox_age_seconds",
            "Age of the oldest entry in the outbox, as last seen by this pod. 0 if it is empty.",
            ["item"],
        )
        self.unacknowledged = gauge(
            "flashsale_api_unacknowledged_events",
            "Events in this pod's memory that Kafka has not acknowledged.",
        )
        self.published = counter(
            "flashsale_api_events_published", "Events that Kafka acknowledged to this pod."
        )
        self.publish_failures = counter(
            "flashsale_api_publish_failures", "Producers that were discarded because Kafka failed."
        )
        self.swept = counter(
            "flashsale_api_events_swept",
            "Events taken over from the outbox because no pod had published them.",
        )
        up = gauge(
            "flashsale_api_server_up",
            "1 if the last call to the server succeeded: redis, kafka.",
            ["server"],
        )
        self.redis_up, self.kafka_up = up.labels("redis"), up.labels("kafka")
        self.jwks_up = gauge(
            "flashsale_api_jwks_up",
            "0 if the last look for the keys of buyers' tokens failed, otherwise 1.",
        )
        self.jwks_up.set(1)  # an API without tokens needs no keys
        self.transitions = counter(
            "flashsale_api_transitions",
            "Calls to confirm or cancel a reservation, and expired holds, by outcome.",
            ["item", "verb", "outcome"],
        )
        self.order_seconds = histogram(
            "flashsale_api_order_call_seconds",
            "Time from reading a call to confirm or cancel to its answer.",
            ["verb", "answer"],
            buckets=(*_SECONDS, 2, 3),
        )
        self.waiting_order_calls = gauge(
            "flashsale_api_waiting_order_calls",
            "Calls to confirm or cancel that wait for a script call.",
            ["verb"],
        )
        self.unacknowledged_order_calls = gauge(
            "flashsale_api_unacknowledged_order_calls",
            "Calls to confirm or cancel that wait for Kafka's acknowledgement.",
            ["verb"],
        )
        self.open_holds = gauge(
            "flashsale_api_open_holds",
            "Reservations that are held, as last seen by this pod.",
            ["item"],
        )
        self.overdue_holds = gauge(
            "flashsale_api_overdue_holds",
            "Holds that can be expired and are not, as last seen by this pod.",
            ["item"],
        )
        self.overdue_seconds = gauge(
            "flashsale_api_overdue_hold_seconds",
            "How long the oldest overdue hold has been one, as last seen by this pod.",
            ["item"],
        )
        self._of_no_item = _Outcomes(self._requests, "")
        self._of_item: dict[str, _Outcomes] = {}
        self._listed: frozenset[str] = frozenset()
        self._with_holds: frozenset[str] = frozenset()

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def label(self, item_id: str) -> str:
        """Returns the item as a label. It is empty for an item without a sale."""
        return item_id if item_id in self._of_item else ""

    def outcomes(self, item_id: str) -> Mapping[str, Counter]:
        """Returns the counters of the requests for an item. Saves a lookup of the labels."""
        return self._of_item.get(item_id, self._of_no_item)

    def add_item(self, item_id: str) -> None:
        """Makes an item with a sale a label."""
        if item_id not in self._of_item:
            outcomes = self._of_item[item_id] = _Outcomes(self._requests, item_id)
            for outcome in _OUTCOMES:
                outcomes[outcome].inc(0)

    def set_holds(self, holds: Mapping[str, Holds], now_ms: Mapping[str, int]) -> None:
        """Sets the gauges of holds, and removes those of the other items.

        `now_ms` is the time by the clock of each item's server.
        """
        gauges = self.open_holds, self.overdue_holds, self.overdue_seconds
        for item_id in self._with_holds - holds.keys():
            for gauge in gauges:
                gauge.remove(item_id)
        for item_id, found in holds.items():
            for verb in _VERBS if found.open else ():
                self.transitions.labels(item_id, verb, "changed")
            self.open_holds.labels(item_id).set(found.open)
            self.overdue_holds.labels(item_id).set(found.overdue)
            overdue_ms = max(now_ms[item_id] - found.first_due_ms, 0) if found.overdue else 0
            self.overdue_seconds.labels(item_id).set(overdue_ms / 1000)
        self._with_holds = frozenset(holds)

    def set_items(self, item_ids: Iterable[str]) -> None:
        """Makes these items labels, and removes items of the previous call that are missing now."""
        listed = frozenset(item_ids)
        by_item = (
            self._requests,
            self.outbox_length,
            self.outbox_age,
            self.transitions,
        )
        for item_id in self._listed - listed:
            del self._of_item[item_id]
            for metric in by_item:
                metric.remove_by_labels({"item": item_id})
        for item_id in listed:
            self.add_item(item_id)
        self._listed = listed
