"""The API's spans: the request, its script call, and the sending of its event to Kafka.

Names and attributes follow OpenTelemetry's semantic conventions for HTTP, databases and messaging.
No attribute names a user.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Final

from opentelemetry.trace import (
    Link,
    Span,
    SpanKind,
    Status,
    StatusCode,
    get_current_span,
    set_span_in_context,
)

from flashsale.reservations import Request
from flashsale.tracing import Tracing, fields, traceparent_of

log = logging.getLogger(__name__)

_REQUEST: Final = {
    "http.request.method": "POST",
    "http.route": "/reserve",
    "url.path": "/reserve",
    "url.scheme": "http",
}
_CALL: Final = {
    "db.system.name": "redis",
    "db.operation.name": "EVALSHA",
    "db.stored_procedure.name": "reserve",
}
_SEND: Final = {
    "messaging.system": "kafka",
    "messaging.operation.name": "send",
    "messaging.operation.type": "send",
}


class Spans:
    """The source of all spans of a process. Every method is for sampled requests only."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._tracer = tracing.tracer
        self.samples = tracing.samples
        self.open: dict[str, Span] = {}
        """The spans of the requests that Redis is deciding, by their traceparent."""

    def begin(self, item_id: str, parent: str, caller: str, seconds: float) -> Span:
        """Starts the span of a request that began `seconds` ago.

        `parent` is the traceparent of a trusted caller. Without it the span begins a trace, with a
        link to the span of the `caller`.
        """
        return self._tracer.start_span(
            "POST /reserve",
            self._tracing.remote(parent),
            SpanKind.SERVER,
            {**_REQUEST, "flashsale.item_id": item_id},
            links=[] if parent else self._links(caller),
            start_time=time.time_ns() - int(seconds * 1e9),
        )

    def _links(self, caller: str) -> list[Link]:
        linked = get_current_span(self._tracing.remote(caller)).get_span_context()
        return [Link(linked)] if linked.is_valid else []

    def deciding(self, span: Span, request: Request) -> None:
        """Registers the request of a span before the script decides it."""
        span.set_attribute("flashsale.reservation_id", request.reservation_id)
        self.open[request.traceparent] = span
        log.debug("reservation %s is by user %s", request.reservation_id, request.user_id)

    def end(self, span: Span, outcome: str, status: int) -> None:
        """Ends the span of an answered request, and logs the answer."""
        traceparent = traceparent_of(span)
        self.open.pop(traceparent, None)
        span.set_attribute("flashsale.outcome", outcome)
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_attribute("error.type", outcome)
            span.set_status(Status(StatusCode.ERROR))
        span.end()
        log.log(
            logging.WARNING if status >= 500 else logging.DEBUG,
            "answered POST /reserve with %d (%s)",
            status,
            outcome,
            extra=fields(traceparent),
        )

    def called(self, requests: Sequence[Request], seconds: float) -> None:
        """Makes the spans of a script call that has just decided these requests in `seconds`."""
        ended = time.time_ns()
        for request in requests:
            parent = self.open.get(request.traceparent)
            if parent is not None:
                self._tracer.start_span(
                    "EVALSHA reserve",
                    set_span_in_context(parent),
                    SpanKind.CLIENT,
                    {**_CALL, "db.operation.batch.size": len(requests)},
                    start_time=ended - int(seconds * 1e9),
                ).end(ended)

    def sending(self, topic: str, reservation_id: str, traceparent: str) -> Span:
        """Starts the span of an event that is being sent. The record carries this span."""
        return self._tracer.start_span(
            f"send {topic}",
            self._tracing.remote(traceparent),
            SpanKind.PRODUCER,
            {
                **_SEND,
                "messaging.destination.name": topic,
                "messaging.kafka.message.key": reservation_id,
            },
        )

    def close(self) -> None:
        """Sends the remaining spans, for at most 2 s."""
        self._tracing.close()

    @staticmethod
    def sent(spans: Iterable[Span], events: int, partition: int) -> None:
        """Ends the spans of a batch of `events` that Kafka acknowledged."""
        for span in spans:
            span.set_attribute("messaging.batch.message_count", events)
            span.set_attribute("messaging.destination.partition.id", str(partition))
            span.end()

    @staticmethod
    def failed(spans: Iterable[Span], error: BaseException) -> None:
        """Ends the spans of a failed batch. The retry gets new spans."""
        for span in spans:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
            span.end()
