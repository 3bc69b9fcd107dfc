"""The standard OTEL_* variables select the requests to trace."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import (
    Decision,
    ParentBasedTraceIdRatio,
    Sampler,
    TraceIdRatioBased,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util import re as headers_of_sdk

from flashsale.errors import SettingsError
from flashsale.tracing import Sampling, fields, sampled, wanted
from tests.support.environments import without_servers

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}


@pytest.mark.parametrize(
    ("environ", "on"),
    [
        ({}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, False),
    ],
)
def test_tracing_is_off_unless_an_endpoint_or_exporter_is_set(
    environ: dict[str, str], on: bool
) -> None:
    assert wanted(dict(environ)) is on


def test_the_sdk_reads_no_newline_at_the_end_of_a_secret() -> None:
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": "api-key=secret"}
    environ = {
        name: f"{value}\n"
        for name, value in {**ENDPOINT, **headers, "OTEL_TRACES_EXPORTER": "otlp"}.items()
    }
    assert wanted(environ)
    assert environ == {**ENDPOINT, **headers, "OTEL_TRACES_EXPORTER": "otlp"}


def test_an_empty_variable_counts_as_unset() -> None:
    environ = {**ENDPOINT, "OTEL_BSP_SCHEDULE_DELAY": "", "OTEL_PYTHON_CONTEXT": "\n"}
    assert wanted(environ)
    assert environ == ENDPOINT


def test_the_detectors_of_the_sdk_are_accepted() -> None:
    assert wanted({**ENDPOINT, "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "otel, process,*,"})


@pytest.mark.parametrize(
    ("environ", "sampling"),
    [
        ({}, Sampling(True, 0.01)),
        ({"OTEL_TRACES_SAMPLER_ARG": "0.5"}, Sampling(True, 0.5)),
        ({"OTEL_TRACES_SAMPLER": "traceidratio"}, Sampling(False, 1)),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, Sampling(False, 0)),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_on"}, Sampling(True, 1)),
    ],
)
def test_one_request_in_a_hundred_is_traced_by_default(
    environ: dict[str, str], sampling: Sampling
) -> None:
    assert Sampling.of(environ) == sampling


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER_ARG", "2"),
        ("OTEL_TRACES_SAMPLER_ARG", "half"),
        ("OTEL_TRACES_SAMPLER_ARG", "nan"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_BSP_SCHEDULE_DELAY", "5s"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "1.5"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "-1"),
        ("OTEL_BSP_SCHEDULE_DELAY", "9999999999999"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "9223372036854775808"),
        ("OTEL_PYTHON_CONTEXT", "nope"),
        ("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "otel,nope"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key: secret"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=b,secret"),
        ("OTEL_EXPORTER_OTLP_HEADERS", 'api-key="secret"'),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "api-key=sec%0Aret"),
    ],
)
def test_an_error_names_the_wrong_variable(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{variable} is wrong: ") as refused:
        wanted({**ENDPOINT, variable: value})
    assert "secret" not in str(refused.value)


@given(st.text(st.sampled_from('aZ~-%_=,;:"\\/ \t\n(é')))
@example("Authorization=Bearer a b, X-Scope = 1,,")
@example("a=b\n,c=d")
def test_headers_are_refused_if_the_sdk_would_log_their_values(headers: str) -> None:
    own = {**ENDPOINT, "OTEL_EXPORTER_OTLP_HEADERS": headers}
    try:
        wanted(own)
    except SettingsError:
        refused = True
    else:
        refused = False
    with patch.object(headers_of_sdk, "_logger") as log:
        headers_of_sdk.parse_env_headers(headers.rstrip("\r\n"), liberal=True)
    logged = [call.args[1] for call in log.warning.call_args_list]
    assert refused == any(header.strip() for header in logged)


@pytest.mark.parametrize("module", ["flashsale_api", "flashsale_consumer"])
@pytest.mark.parametrize(
    ("variable", "value"),
    [("OTEL_BSP_MAX_QUEUE_SIZE", "0"), ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many")],
)
def test_a_value_that_the_sdk_refuses_ends_a_process_with_one_line(
    tmp_path: Path, module: str, variable: str, value: str
) -> None:
    done = ended(tmp_path, module, variable, value)
    assert done.returncode == 2
    assert done.stderr.startswith("a variable OTEL_* is wrong: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["flashsale_api", "flashsale_consumer"])
def test_the_value_of_a_wrong_header_is_not_logged(tmp_path: Path, module: str) -> None:
    done = ended(tmp_path, module, "OTEL_EXPORTER_OTLP_HEADERS", "api-key: secret")
    assert done.returncode == 2
    assert done.stderr.startswith("OTEL_EXPORTER_OTLP_HEADERS is wrong: expected name=value")
    assert "secret" not in done.stderr


def ended(
    tmp_path: Path, module: str, variable: str, value: str
) -> subprocess.CompletedProcess[str]:
    """Run a process with a variable until it ends."""
    environ = {
        **without_servers(tmp_path),
        "FLASHSALE_LISTEN": "127.0.0.1:0",
        "FLASHSALE_METRICS_LISTEN": "127.0.0.1:0",
        **ENDPOINT,
        variable: value,
    }
    return subprocess.run(
        [sys.executable, "-m", module],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@given(
    trace_id=st.integers(1, 2**128 - 1),
    flags=st.integers(0, 255),
    ratio=st.floats(0, 1),
    follows=st.booleans(),
)
@example(trace_id=2**63, flags=1, ratio=0.5, follows=False)
@example(trace_id=2**64, flags=0, ratio=2.2250738585072014e-308, follows=False)
def test_sampling_decides_as_the_opentelemetry_sdk_does(
    trace_id: int, flags: int, ratio: float, follows: bool
) -> None:
    traceparent = f"00-{trace_id:032x}-00f067aa0ba902b7-{flags:02x}"
    context = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
    sdk: Sampler = ParentBasedTraceIdRatio(ratio) if follows else TraceIdRatioBased(ratio)
    decided = sdk.should_sample(context, trace_id, "POST /reserve").decision
    expected = decided is Decision.RECORD_AND_SAMPLE
    assert Sampling(follows, ratio)(traceparent) is expected


def test_requests_without_a_traceparent_are_sampled_by_ratio() -> None:
    for follows in (True, False):
        traced = sum(Sampling(follows, 0.25)("") for _ in range(10_000))
        assert 2_000 < traced < 3_000
        assert not any(Sampling(follows, 0)("") for _ in range(1_000))
        assert all(Sampling(follows, 1)("") for _ in range(1_000))


def test_only_log_lines_of_traced_requests_have_a_trace_id() -> None:
    assert fields(f"00-{TRACE}-00f067aa0ba902b7-01") == {"trace_id": TRACE}
    assert fields(f"00-{TRACE}-00f067aa0ba902b7-00") == {}
    assert fields("") == {}
    assert not sampled("")
