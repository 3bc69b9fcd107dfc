"""The consumer's spans: how a sampled event reached the ledger.

Names and attributes follow OpenTelemetry's semantic conventions for messaging and databases. Spans
are made after a batch is committed, so failed attempts leave none.
"""

import time
from collections.abc import Mapping
from itertools import chain
from typing import Final

from aiokafka import ConsumerRecord, TopicPartition
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

from flashsale import events
from flashsale.tracing import Tracing, sampled

_PROCESS: Final = {
    "messaging.system": "kafka",
    "messaging.operation.name": "process",
    "messaging.operation.type": "process",
}
_INSERT: Final = {
    "db.system.name": "postgresql",
    "db.operation.name": "INSERT",
    "db.collection.name": "reservations",
}


class Spans:
    """The source of all spans of a process."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def recorded(
        self,
        batch: Mapping[TopicPartition, list[ConsumerRecord]],
        results: Mapping[int, str],
        group_id: str,
        seconds: float,
    ) -> None:
        """Makes the spans of a batch that was just committed, after a transaction of `seconds`.

        `results` has the result of each record that was not recorded, by the record's `id()`.
        """
        size = sum(len(records) for records in batch.values())
        ended_ns = time.time_ns()
        began_ns = ended_ns - int(seconds * 1e9)
        for record in chain.from_iterable(batch.values()):
            traceparent = events.traceparent(record.headers)
            if not sampled(traceparent):
                continue
            result = results.get(id(record), "recorded")
            span = self._tracing.tracer.start_span(
                f"process {record.topic}",
                self._tracing.remote(traceparent),
                SpanKind.CONSUMER,
                {
                    **_PROCESS,
                    "messaging.destination.name": record.topic,
                    "messaging.destination.partition.id": str(record.partition),
                    "messaging.kafka.offset": record.offset,
                    "messaging.consumer.group.name": group_id,
                    "messaging.batch.message_count": size,
                    "flashsale.result": result,
                },
                start_time=began_ns,
            )
            if result != "recorded":
                span.set_attribute("error.type", result)
                span.set_status(Status(StatusCode.ERROR))
            self._tracing.tracer.start_span(
                "INSERT reservations",
                set_span_in_context(span),
                SpanKind.CLIENT,
                {**_INSERT, "db.operation.batch.size": size},
                start_time=began_ns,
            ).end(ended_ns)
            span.end(ended_ns)

    def close(self) -> None:
        """Sends the remaining spans, for at most 2 s."""
        self._tracing.close()
