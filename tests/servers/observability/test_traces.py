"""Traces from the HTTP request to the ledger, received as OTLP over HTTP."""

import asyncio
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.ports import free_port
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from flashsale import redis_client
from flashsale.inventory import Applied, Inventory
from flashsale.sale import SaleSpec
from tests.support import redis_users
from tests.support.eventually import eventually
from tests.support.servers import database
from tests.support.trace_collector import Collector, Span, collecting

WAY = (
    "POST /reserve",
    "EVALSHA reserve",
    "send traces.reservations",
    "process traces.reservations",
    "INSERT reservations",
)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that receives the traces of all processes that start from now on."""
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
        monkeypatch.setenv("FLASHSALE_TRUST_TRACEPARENT", "true")
        yield collector


@pytest.fixture(scope="module")
def addresses(
    redis_server: RedisServer, kafka_server: KafkaServer, postgres_server: PostgresServer
) -> Iterator[Addresses]:
    """An engine of this module, because other modules share its Kafka with other ledgers."""
    with database(postgres_server) as url:
        redis_url = redis_users.url_of(redis_server, redis_users.OPERATOR)
        yield Addresses(redis_url, kafka_server.bootstrap, url, "traces")


def seed(addresses: Addresses, item: str) -> None:
    async def apply() -> None:
        redis = redis_client.connect(addresses.redis_url)
        spec = SaleSpec(f"default/{item}", item, 10)
        inventory = Inventory(redis, addresses.engine)
        assert await inventory.apply(spec, 1, seed_until_ms=2**53) is Applied.SEEDED
        await redis.aclose()

    asyncio.run(apply())


def reserve(api: ApiServer, item: str, *, sampled: bool) -> tuple[str, str]:
    """Reserve a unit in a caller's trace. Returns the ids of the trace and the caller's span."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    answer = httpx.post(
        f"{api.url}/reserve",
        json={"userId": f"buyer-{trace_id}", "itemId": item, "quantity": 1},
        headers={"traceparent": f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"},
        timeout=30,
    )
    assert answer.status_code == 202, answer.text
    return trace_id, span_id


def whole(collector: Collector, trace_id: str) -> dict[str, Span]:
    """Return the spans of a request by name, once all of them have arrived."""
    return eventually(
        lambda: way if (way := collector.way_to(WAY[-1], trace_id)).keys() == set(WAY) else None,
        lambda: str(collector.spans),
    )


def assert_joined(trace: dict[str, Span], caller: str) -> None:
    assert trace.keys() == set(WAY)
    request, call, send, process, insert = (trace[name] for name in WAY)
    kinds = [span.kind for span in (request, call, send, process, insert)]
    assert kinds == ["SERVER", "CLIENT", "PRODUCER", "CONSUMER", "CLIENT"]
    assert request.parent_id == caller
    assert call.parent_id == send.parent_id == request.span_id
    assert process.parent_id == send.span_id
    assert insert.parent_id == process.span_id
    assert {span.resource["service.name"] for span in (request, call, send)} == {"flashsale-api"}
    assert {span.resource["service.name"] for span in (process, insert)} == {"flashsale-consumer"}
    assert all(span.began_ns <= span.ended_ns for span in trace.values())
    assert not any(span.failed for span in trace.values())


@pytest.mark.slow
def test_one_trace_goes_from_the_request_to_the_ledger(
    collector: Collector, addresses: Addresses, item: str, tmp_path: Path
) -> None:
    seed(addresses, item)
    with (
        ConsumerServer(tmp_path / "consumer", addresses),
        ApiServer(tmp_path / "api", redis_users.of_api(addresses)) as api,
    ):
        trace_id, caller = reserve(api, item, sampled=True)
        trace = whole(collector, trace_id)
    assert_joined(trace, caller)
    request, call, send, process, insert = (trace[name].attributes for name in WAY)
    assert request["http.request.method"] == "POST"
    assert request["http.route"] == "/reserve"
    assert request["http.response.status_code"] == 202
    assert request["flashsale.item_id"] == item
    assert request["flashsale.outcome"] == "accepted"
    assert call["db.system.name"] == "redis"
    assert send["messaging.system"] == process["messaging.system"] == "kafka"
    assert send["messaging.kafka.message.key"] == request["flashsale.reservation_id"]
    assert (
        send["messaging.destination.partition.id"] == process["messaging.destination.partition.id"]
    )
    assert process["messaging.consumer.group.name"] == "traces-ledger"
    assert process["flashsale.result"] == "recorded"
    assert insert["db.system.name"] == "postgresql"
    values = [value for span in trace.values() for value in span.attributes.values()]
    assert not any("buyer" in str(value) for value in values)


@pytest.mark.slow
def test_an_event_swept_by_another_pod_stays_in_the_trace_of_its_request(
    collector: Collector, addresses: Addresses, item: str, tmp_path: Path
) -> None:
    seed(addresses, item)
    cut_off = replace(addresses, kafka_bootstrap=f"127.0.0.1:{free_port()}")
    first = ApiServer(tmp_path / "first", redis_users.of_api(cut_off))
    first.start()
    try:
        trace_id, caller = reserve(first, item, sampled=True)
        eventually(lambda: collector.way_to("POST /reserve", trace_id))
    finally:
        first.kill()
    with (
        ConsumerServer(tmp_path / "consumer", addresses),
        ApiServer(tmp_path / "second", redis_users.of_api(addresses)),
    ):
        trace = whole(collector, trace_id)
    assert_joined(trace, caller)
    accepted_by, published_by = (
        trace[name].resource["service.instance.id"] for name in (WAY[0], WAY[2])
    )
    assert accepted_by != published_by


@pytest.mark.slow
def test_a_request_that_its_caller_does_not_sample_leaves_no_span(
    collector: Collector, addresses: Addresses, item: str, tmp_path: Path
) -> None:
    seed(addresses, item)
    with (
        ConsumerServer(tmp_path / "consumer", addresses),
        ApiServer(tmp_path / "api", redis_users.of_api(addresses)) as api,
    ):
        unsampled = {reserve(api, item, sampled=False)[0] for _ in range(5)}
        trace_id, _ = reserve(api, item, sampled=True)
        whole(collector, trace_id)
    # The topic belongs to the whole session, so the consumer may read other events, too.
    assert not unsampled & {span.trace_id for span in collector.spans}
    (request,) = (span for span in collector.spans if span.name == "POST /reserve")
    assert request.trace_id == trace_id


@pytest.mark.slow
def test_a_caller_that_is_not_trusted_decides_nothing(
    collector: Collector,
    addresses: Addresses,
    item: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FLASHSALE_TRUST_TRACEPARENT")
    seed(addresses, item)
    with ConsumerServer(tmp_path / "consumer", addresses):
        with ApiServer(tmp_path / "none", redis_users.of_api(addresses)) as api:
            wanted = {reserve(api, item, sampled=True)[0] for _ in range(5)}
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1")
        with ApiServer(tmp_path / "all", redis_users.of_api(addresses)) as api:
            unwanted, _ = reserve(api, item, sampled=False)
            (request,) = eventually(
                lambda: [span for span in collector.spans if span.name == "POST /reserve"]
            )
            whole(collector, request.trace_id)
    assert request.parent_id == ""
    assert request.linked_traces == (unwanted,)
    assert not (wanted | {unwanted}) & {span.trace_id for span in collector.spans}


@pytest.mark.slow
def test_requests_without_a_traceparent_are_sampled_by_the_ratio(
    collector: Collector,
    addresses: Addresses,
    item: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1")
    seed(addresses, item)
    with ApiServer(tmp_path / "api", redis_users.of_api(addresses)) as api:
        body = {"userId": "buyer", "itemId": item, "quantity": 1}
        assert httpx.post(f"{api.url}/reserve", json=body, timeout=30).status_code == 202
        eventually(lambda: "POST /reserve" in {span.name for span in collector.spans})
    (request,) = (span for span in collector.spans if span.name == "POST /reserve")
    assert request.parent_id == ""


def test_without_a_collector_the_api_answers_and_shuts_down(
    redis_server: RedisServer, item: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("FLASHSALE_LOG_LEVEL", "debug")
    monkeypatch.setenv("FLASHSALE_TRUST_TRACEPARENT", "true")
    redis_url = redis_users.url_of(redis_server, redis_users.OPERATOR)
    addresses = Addresses(redis_url, f"127.0.0.1:{free_port()}", "")
    seed(addresses, item)
    api = ApiServer(tmp_path / "api", redis_users.of_api(addresses))
    api.start()
    try:
        trace_id, _ = reserve(api, item, sampled=True)
        eventually(lambda: "exporting span" in api.log.read_text())
        assert f'"trace_id":"{trace_id}"' in api.log.read_text()
    finally:
        api.kill()


def test_without_an_endpoint_no_exporter_is_imported() -> None:
    code = "import flashsale_api.__main__, flashsale_consumer.app, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "flashsale.tracing" in done.stdout
    assert "opentelemetry.exporter" not in done.stdout
