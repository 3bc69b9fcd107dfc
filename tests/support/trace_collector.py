"""Receives traces as OTLP over HTTP and keeps them in memory."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True, slots=True)
class Span:
    """A received span. Ids are in hex."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    began_ns: int
    ended_ns: int
    failed: bool
    linked_traces: tuple[str, ...]
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Collector:
    """The spans that were received so far."""

    url: str
    spans: list[Span] = field(default_factory=list)

    def way_to(self, name: str, trace_id: str) -> dict[str, Span]:
        """Return the span `name`, its ancestors, and the client spans of all of these, by name.

        A trace can have several spans of a name, because events can repeat. The first one counts.
        """
        found = {span.span_id: span for span in self.spans if span.trace_id == trace_id}
        span = next((span for span in found.values() if span.name == name), None)
        way: dict[str, Span] = {}
        while span is not None:
            way[span.name] = span
            for called in found.values():
                if called.parent_id == span.span_id and called.kind == "CLIENT":
                    way.setdefault(called.name, called)
            span = found.get(span.parent_id)
        return way


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector on a free loopback port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            known = self.path == "/v1/traces"
            if known:
                collector.spans += _spans(ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    name=span.name,
                    kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    began_ns=span.start_time_unix_nano,
                    ended_ns=span.end_time_unix_nano,
                    failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                    linked_traces=tuple(link.trace_id.hex() for link in span.links),
                    attributes=_values(span.attributes),
                    resource=_values(resource.resource.attributes),
                )


def _values(attributes: Any) -> dict[str, Any]:  # noqa: ANN401 - protobuf's own container
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
