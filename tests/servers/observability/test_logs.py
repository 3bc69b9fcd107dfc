"""The logs of real processes, with and without their servers."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis as redis_client

from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.ports import free_port
from dev.stack.process import Server
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from flashsale.keys import ItemKeys, items
from tests.support import redis_users
from tests.support.eventually import eventually
from tests.support.observability import ObservedEngine

PASSWORD = "s3cr3t"
BODY = {"userId": "buyer-7", "itemId": "phone", "quantity": 1}


def lines(server: Server) -> list[dict[str, Any]]:
    """Return the log. All of its lines must be JSON."""
    return [json.loads(line) for line in server.log.read_text().splitlines()]


@contextmanager
def killed(server: Server) -> Iterator[None]:
    try:
        yield
    finally:
        server.kill()


@pytest.fixture
def redis_with_password(tmp_path: Path) -> Iterator[RedisServer]:
    options = ("--requirepass", PASSWORD)
    server = RedisServer(tmp_path / "redis", options=options)
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.slow
def test_processes_log_few_lines_in_json_without_users(engine: ObservedEngine) -> None:
    for process in (engine.api, engine.consumer, engine.operator):
        logged = lines(process)
        assert logged
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in logged)
        assert len(logged) < 100
        assert "user-" not in process.log.read_text()


@pytest.mark.slow
def test_an_unreadable_outbox_entry_is_logged_without_its_buyer(engine: ObservedEngine) -> None:
    name = engine.world.addresses.engine
    keys = ItemKeys.of("torn", name)
    with redis_client.Redis.from_url(engine.world.redis.url) as client:
        fields = {"id": "x", "record": "accepted,1,1,buyer-7", "sale": "a,1,1,1"}
        client.xadd(keys.outbox, {**fields, "traceparent": ""}, id="1-1")
        client.sadd(items(name), "torn")
        try:
            eventually(
                lambda: "torn: outbox entry 1-1 cannot be read" in engine.api.log.read_text()
            )
        finally:
            client.srem(items(name), "torn")
            client.delete(keys.outbox)
    assert "not a reservation record" in engine.api.log.read_text()
    assert "buyer-7" not in engine.api.log.read_text()


def test_an_api_without_its_servers_logs_little(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis", options=redis_users.options()) as redis:
        redis_url = redis_users.url_of(redis, redis_users.API)
        addresses = Addresses(redis_url, f"127.0.0.1:{free_port()}", "")
        api = ApiServer(tmp_path / "api", addresses)
        with killed(api), httpx.Client(timeout=30) as http:
            api.start()
            redis.kill()
            statuses = {http.post(f"{api.url}/reserve", json=BODY).status_code for _ in range(100)}
            assert statuses == {503}
            failures = re.compile(
                r"^flashsale_api_publish_failures_total ([5-9]|\d\d+)\.", re.MULTILINE
            )
            eventually(lambda: failures.search(http.get(api.metrics_url).text))
            assert len(lines(api)) < 10
            assert "buyer-7" not in api.log.read_text()


def test_the_log_has_no_password_if_redis_rejects_it(
    tmp_path: Path, redis_with_password: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHSALE_LOG_LEVEL", "debug")
    redis_with_password.data.mkdir(parents=True)
    redis_with_password._spawn()
    wrong = redis_with_password.url.replace("//", "//:wr0ng@")
    api = ApiServer(tmp_path / "api", Addresses(wrong, f"127.0.0.1:{free_port()}", ""))
    api.data.mkdir(parents=True)
    with killed(api):
        api._spawn()
        eventually(lambda: "invalid username-password pair" in api.log.read_text())
        assert all(secret not in api.log.read_text() for secret in ("wr0ng", PASSWORD))


@pytest.mark.slow
def test_the_log_has_no_password_if_the_ledger_rejects_it(
    tmp_path: Path,
    kafka_server: KafkaServer,
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASHSALE_LOG_LEVEL", "debug")
    head, _, tail = postgres_server.url.partition("@")
    wrong = f"{head.rpartition(':')[0]}:wr0ng@{tail}"
    consumer = ConsumerServer(tmp_path / "consumer", Addresses("", kafka_server.bootstrap, wrong))
    consumer.data.mkdir(parents=True)
    with killed(consumer):
        consumer._spawn()
        eventually(lambda: "waiting for the ledger" in consumer.log.read_text())
        text = consumer.log.read_text()
        assert "password authentication failed" in text
        assert "wr0ng" not in text
        assert text.count("waiting for the ledger") == 1
