"""OpenTelemetry traces, which are off unless OTEL_* variables name an endpoint.

The API decides once per request whether to trace it. The decision travels in the `traceparent`
(W3C Trace Context) of the outbox entry and the Kafka record. An untraced request costs one branch.
"""

import random
import re
import threading
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from flashsale import __version__
from flashsale.errors import SettingsError
from flashsale.tls import relaxed

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span
    from requests import Session

DEFAULT_RATIO: Final = "0.01"
CLOSE_SECONDS: Final = 2.0
_EXPORTER: Final = "OTEL_TRACES_EXPORTER"
_SAMPLER: Final = "OTEL_TRACES_SAMPLER"
_ARGUMENT: Final = "OTEL_TRACES_SAMPLER_ARG"
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_CONTEXT: Final = "OTEL_PYTHON_CONTEXT"
_DETECTORS: Final = "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS"
_NUMBERS: Final = (
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_BSP_EXPORT_TIMEOUT",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
)
_HEADERS: Final = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
_HEADER: Final = re.compile(
    r"[!\x23-\x27*+.0-9A-Z\x5e-\x7a|~-]+[ \t]*=[ \t]*[ !\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]*"
)
"""A header as the SDK accepts it."""
# Last digits of flags with the sampled bit, which is the lowest bit.
_ODD: Final = frozenset("13579bdf")
# Per sampler: whether it follows the caller, and its ratio. None means OTEL_TRACES_SAMPLER_ARG.
_SAMPLERS: Final[dict[str, tuple[bool, float | None]]] = {
    "always_on": (False, 1.0),
    "always_off": (False, 0.0),
    "traceidratio": (False, None),
    "parentbased_always_on": (True, 1.0),
    "parentbased_always_off": (True, 0.0),
    "parentbased_traceidratio": (True, None),
}


def sampled(traceparent: str) -> bool:
    """Whether the request of this traceparent is traced. False for an empty string."""
    return traceparent[-1:] in _ODD


def fields(traceparent: str) -> dict[str, str]:
    """Returns the extra fields of a log line about a request: its trace id, if it is traced."""
    return {"trace_id": traceparent[3:35]} if sampled(traceparent) else {}


@dataclass(frozen=True, slots=True)
class Sampling:
    """Decides which requests to trace: as the caller decided if `follows`, else the share `ratio`.

    The SDK's own samplers decide the same way but cost many times more, because they need a
    context object per request.
    """

    follows: bool
    ratio: float

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Sampling":
        """Reads the standard OTEL_* variables. By default it samples one request in a hundred."""
        name = environ.get(_SAMPLER, "")
        try:
            follows, ratio = _SAMPLERS[name or "parentbased_traceidratio"]
        except KeyError:
            raise SettingsError(
                f"{_SAMPLER} is wrong: expected one of {', '.join(_SAMPLERS)}"
            ) from None
        if ratio is None:
            ratio = _ratio(environ.get(_ARGUMENT) or ("1" if name else DEFAULT_RATIO))
        return cls(follows, ratio)

    def __call__(self, traceparent: str) -> bool:
        if not traceparent:
            return random.random() < self.ratio  # noqa: S311 - not a secret
        if self.follows:
            return sampled(traceparent)
        # The trace id decides, so that every service decides the same.
        return int(traceparent[19:35], 16) < round(self.ratio * 2**64)


def wanted(environ: MutableMapping[str, str]) -> bool:
    """Whether tracing is on. Raises `SettingsError` for an unsupported setting.

    Removes newlines at the end of OTEL_* variables, which many Secrets have, and empty variables,
    which count as unset. The SDK reads these variables itself.
    """
    for name in [name for name in environ if name.startswith("OTEL_")]:
        environ[name] = environ[name].rstrip("\r\n")
        if not environ[name]:
            del environ[name]
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    named = any(environ.get(name) for name in _ENDPOINTS)
    exporter = environ.get(_EXPORTER) or ("otlp" if named else "none")
    if exporter not in ("otlp", "none"):
        raise SettingsError(f"{_EXPORTER} is wrong: expected otlp or none")
    if exporter == "none":
        return False
    for name in _PROTOCOLS:
        if environ.get(name, "http/protobuf") != "http/protobuf":
            raise SettingsError(f"{name} is wrong: only http/protobuf is supported")
    Sampling.of(environ)
    _check_values(environ)
    return True


def _check_values(environ: Mapping[str, str]) -> None:
    """Raises `SettingsError` for values that the SDK would replace, and log with a traceback."""
    for name in _NUMBERS:
        # Far larger numbers end the SDK's thread or the process with a traceback.
        if not re.fullmatch("[0-9]{1,9}", environ.get(name, "1")):
            raise SettingsError(f"{name} is wrong: expected an integer from 0 to 999999999")
    for name in _HEADERS:
        # The SDK and requests log a wrong header with its value, which is often a secret.
        headers = [header.strip() for header in environ.get(name, "").split(",")]
        if any(
            not _HEADER.fullmatch(header) or re.search(r"[\r\n]", unquote(header))
            for header in headers
            if header
        ):
            raise SettingsError(
                f"{name} is wrong: expected name=value[,name=value...], with special characters in "
                "percent-encoding"
            )
    if environ.get(_CONTEXT, "contextvars_context") != "contextvars_context":
        raise SettingsError(f"{_CONTEXT} is wrong: only contextvars_context is supported")
    if given := environ.get(_DETECTORS):
        known = {"*", *entry_points(group="opentelemetry_resource_detector").names}
        if {name.strip() for name in given.split(",")} - known - {""}:
            raise SettingsError(f"{_DETECTORS} is wrong: expected {', '.join(sorted(known))}")


class Tracing:
    """A process' tracer, exporter and sampler. Imports the SDK, so make it only if needed.

    Raises `SettingsError` for a value that the SDK refuses.
    """

    def __init__(self, service: str, environ: Mapping[str, str]) -> None:
        self.samples = Sampling.of(environ)
        attributes = {"service.version": __version__}
        if not environ.get("OTEL_SERVICE_NAME") and "service.name=" not in environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            attributes["service.name"] = service
        try:
            self._start(attributes)
        except (ValueError, RuntimeError) as error:  # the SDK reads some variables on import
            why = " ".join(str(error).split())
            raise SettingsError(f"a variable OTEL_* is wrong: {why}") from error

    def _start(self, attributes: Mapping[str, str]) -> None:
        # SDK and exporter take 0.25 s and 10 MB, so processes without tracing do not import them.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
            TraceContextTextMapPropagator,
        )

        resource = Resource.create(attributes)
        # `samples` has already decided: only sampled requests reach the SDK.
        self._provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(session=_session())
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self._provider.get_tracer("flashsale", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def remote(self, traceparent: str) -> "Context":
        """Returns the context of another process' span. It is empty for an empty traceparent."""
        return self._propagator.extract({"traceparent": traceparent})

    def close(self) -> None:
        """Sends the remaining spans. Gives up after `CLOSE_SECONDS`."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


def _session() -> "Session":
    """Returns a client of a collector, which accepts the certificates of `flashsale.tls`."""
    from requests import Session  # noqa: PLC0415 - only the exporter needs it
    from requests.adapters import HTTPAdapter  # noqa: PLC0415
    from urllib3.util.ssl_ import create_urllib3_context  # noqa: PLC0415

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *sizes: Any, **options: Any) -> None:  # noqa: ANN401
            context = relaxed(create_urllib3_context())
            super().init_poolmanager(*sizes, ssl_context=context, **options)

    session = Session()
    session.mount("https://", Adapter())
    return session


def traceparent_of(span: "Span") -> str:
    """Returns the traceparent that a span passes to its children in other processes."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise SettingsError(f"{_ARGUMENT} is wrong: expected a number from 0 to 1")
    return ratio
