"""The API while Redis is stopped, slow, restarted, or loses the connection during a call."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis
from starlette.applications import Starlette

from dev.crowd import stampede
from dev.journal import Attempt, Journal
from dev.services import Addresses, ApiServer
from dev.stack.ports import free_port
from dev.stack.servers import RedisServer
from flashsale import redis_client, redis_facts
from flashsale.errors import RedisUnavailable
from flashsale.heartbeat import INTERVAL_SECONDS
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale.requirements import RedisFacts
from flashsale_api import app
from flashsale_api.servers import server_of
from tests.support import redis_users
from tests.support.api import OWN_SALE, accepted, problem, reserve
from tests.support.eventually import eventually, until
from tests.support.proxy import Proxy
from tests.support.redis_users import url_of
from tests.support.trace_collector import collecting

ITEM = OWN_SALE.item_id


async def test_a_call_whose_reply_was_lost_is_repeated_without_a_second_reservation(
    own_http: httpx.AsyncClient, own_inventory: Inventory, proxy: Proxy
) -> None:
    proxy.cut_replies(b"EVALSHA", 1)
    answer = await reserve(own_http, ITEM, quantity=2)
    assert proxy.left_to_cut == 0
    assert answer.status_code == 202
    assert await accepted(own_inventory, ITEM) == 2
    found = await own_http.get(answer.headers["location"])
    assert found.json() == {k: v for k, v in answer.json().items() if k != "userId"}


async def test_a_pod_logs_why_redis_refuses_its_calls(
    own_api: ApiServer, own_http: httpx.AsyncClient, own_redis: RedisServer
) -> None:
    client = redis_client.connect(own_redis.url)
    await client.config_set("maxmemory", "1")
    problem(await reserve(own_http, ITEM), 503, "redis-unavailable")
    await until(lambda: "a script call failed: Redis refused" in own_api.log.read_text())
    await until(lambda: "cannot send a heartbeat: Redis refused" in own_api.log.read_text())
    await client.config_set("maxmemory", "0")
    await client.aclose()
    await until(lambda: "Redis takes heartbeats again" in own_api.log.read_text())
    assert (await reserve(own_http, ITEM)).status_code == 202


async def test_an_unknown_outcome_returns_the_possible_location(
    own_http: httpx.AsyncClient, own_inventory: Inventory, proxy: Proxy
) -> None:
    proxy.cut_replies(b"EVALSHA", 2)
    answer = await reserve(own_http, ITEM, quantity=2, key="k")
    problem(answer, 503, "outcome-unknown")
    assert int(answer.headers["retry-after"]) >= 1
    assert await accepted(own_inventory, ITEM) == 2
    found = await own_http.get(answer.headers["location"])
    assert found.json()["quantity"] == 2
    again = await reserve(own_http, ITEM, quantity=2, key="k")
    assert (again.status_code, again.json()) == (202, {**found.json(), "userId": "ann"})
    assert await accepted(own_inventory, ITEM) == 2


async def test_a_hanging_redis_gives_timely_503s_and_no_duplicate_units(
    own_api: ApiServer, own_redis: RedisServer, own_inventory: Inventory
) -> None:
    wanted = [
        Attempt(f"u{n}", {"userId": f"u{n}", "itemId": ITEM, "quantity": 1}, f"key-{n}")
        for n in range(600)
    ]
    own_redis.pause()
    during = await stampede([own_api.url], wanted, connections=600)
    own_redis.resume()
    outcomes = Counter(entry.outcome for entry in during.entries)
    # A call that waited for a new connection was not sent, so its outcome is known.
    assert {"outcome-unknown"} <= set(outcomes)
    assert set(outcomes) <= {"outcome-unknown", "too-many-waiting", "redis-unavailable"}
    after = await stampede([own_api.url], wanted, tries=10, journal=Journal())
    assert {entry.status for entry in after.entries} <= {202, 503}
    assert len(after.accepted()) == 600
    assert await accepted(own_inventory, ITEM) == 600


async def test_a_stopped_redis_gives_503_and_a_restarted_one_is_fenced(
    own_http: httpx.AsyncClient, own_redis: RedisServer, own_inventory: Inventory
) -> None:
    bought = await reserve(own_http, ITEM, key="k")
    assert bought.status_code == 202
    own_redis.kill()
    answer = await reserve(own_http, ITEM, "bob")
    async with asyncio.timeout(20):
        # The first call may use the connection that is being closed.
        while answer.json()["type"].endswith("outcome-unknown"):
            answer = await reserve(own_http, ITEM, "bob")
    problem(answer, 503, "redis-unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    problem(await own_http.get(f"/sales/{ITEM}"), 503, "redis-unavailable")
    problem(await own_http.get(bought.headers["location"]), 503, "redis-unavailable")
    assert (await own_http.get("/healthz")).status_code == 200
    # The pod stays ready, so that buyers get its 503 and not one of the proxy.
    assert (await own_http.get("/readyz")).status_code == 200
    own_redis.start()
    async with asyncio.timeout(20):
        while answer.json()["type"].endswith("redis-unavailable"):
            answer = await reserve(own_http, ITEM, "bob")
    problem(answer, 503, "fenced")
    problem(await reserve(own_http, ITEM, key="k"), 503, "fenced")
    assert await accepted(own_inventory, ITEM) == 1


async def test_a_pod_without_a_heartbeat_accepts_nothing_until_it_has_sent_one(
    own_http: httpx.AsyncClient, own_inventory: Inventory, proxy: Proxy
) -> None:
    async def answer() -> str:
        return str((await reserve(own_http, ITEM)).json().get("type", "accepted"))

    async def fenced() -> bool:
        return (await answer()).endswith(":fenced")

    async def bought() -> bool:
        return await answer() == "accepted"

    assert await bought()
    proxy.cut_replies(b":pod:", 1_000)  # the key of a heartbeat
    await until(fenced)
    before = await accepted(own_inventory, ITEM)
    assert await fenced()
    assert await accepted(own_inventory, ITEM) == before
    proxy.cut_replies(b"", 0)
    await until(bought)


async def test_a_pod_names_redis_for_as_long_as_redis_does_not_answer(
    own_api: ApiServer, own_http: httpx.AsyncClient, own_redis: RedisServer
) -> None:
    """Also once the pod's heartbeat has expired and no call is made any more."""
    own_redis.kill()

    async def calls() -> str:
        """Answer a request. Return the number of calls that the pod has tried."""
        answer = await reserve(own_http, ITEM)
        assert answer.json()["type"].rpartition(":")[2] in {"redis-unavailable", "outcome-unknown"}
        async with httpx.AsyncClient() as http:
            text = (await http.get(own_api.metrics_url)).text
        return text.partition("flashsale_api_script_failures_total ")[2].partition("\n")[0]

    async def no_call_is_made() -> bool:
        return await calls() == await calls()

    await until(no_call_is_made, pause=0.2)
    problem(await reserve(own_http, ITEM), 503, "redis-unavailable")


async def test_a_buyer_who_disconnects_does_not_cancel_the_other_requests(
    own_api: ApiServer,
    own_http: httpx.AsyncClient,
    own_redis: RedisServer,
    own_inventory: Inventory,
) -> None:
    own_redis.pause()
    body = f'{{"userId":"gone","itemId":"{ITEM}","quantity":1}}'
    head = (
        "POST /reserve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    disconnected = []
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", own_api.port)
        writer.write((head + body).encode())
        await writer.drain()
        disconnected.append(writer)
    staying = asyncio.create_task(reserve(own_http, ITEM, "bob", key="k"))
    for writer in disconnected:
        writer.close()
    own_redis.resume()
    answer = await staying
    assert answer.status_code == 202, answer.text
    # A request is decided at most once, even if its buyer has disconnected.
    assert 1 <= await accepted(own_inventory, ITEM) <= 21


async def test_the_api_starts_without_redis_and_is_ready_once_redis_answers(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path / "redis")
    api = ApiServer(tmp_path / "api", Addresses(redis.url, f"127.0.0.1:{free_port()}", ""))
    starting = asyncio.create_task(asyncio.to_thread(api.start))
    async with httpx.AsyncClient(base_url=api.url, timeout=10) as http:
        async with asyncio.timeout(30):
            while True:
                try:
                    alive = await http.get("/healthz")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
        assert alive.status_code == 200

        async def says_why() -> bool:
            unready = await http.get("/readyz")
            assert unready.status_code == 503
            return unready.text.startswith("waiting for Redis: ") and "connect" in unready.text

        await until(says_why)
        problem(await reserve(http, ITEM), 503, "redis-unavailable")
        await asyncio.to_thread(redis.start)
        await starting
        assert (await http.get("/readyz")).status_code == 200
        problem(await reserve(http, ITEM), 503, "fenced")  # nothing says that Redis lost nothing
    api.kill()
    redis.stop()


async def test_a_pod_is_not_ready_while_redis_may_evict_a_sale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "CHECK_SECONDS", 0.1)
    with RedisServer(tmp_path / "redis", options=("--maxmemory-policy", "allkeys-lru")) as redis:
        client = redis_client.connect(redis.url)
        check = app.RedisCheck(Inventory(client), Outbox(client))
        task = asyncio.create_task(check.run())
        line = "Redis has maxmemory-policy allkeys-lru, but needs maxmemory-policy noeviction: "
        await until(lambda: check.problem.startswith(line), lambda: check.problem)
        await until(lambda: len(caplog.records) > 0)
        await client.config_set("maxmemory-policy", "noeviction")
        await until(lambda: not check.problem, lambda: check.problem)
        await task
        await client.aclose()
    errors = [each for each in caplog.records if each.levelname == "ERROR"]
    assert len(errors) == 1


async def test_each_cause_of_a_wait_for_redis_is_logged_once(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    causes = ["refused", "refused", "timed out", "timed out", "refused"]
    read = redis_facts.read

    async def away(redis: "Redis", engine: str) -> list[RedisFacts]:
        if causes:
            raise RedisUnavailable(causes.pop(0))
        return await read(redis, engine)

    monkeypatch.setattr(app, "RETRY_SECONDS", 0)
    monkeypatch.setattr(redis_facts, "read", away)
    caplog.set_level("INFO", app.__name__)
    client = redis_client.connect(own_redis.url)
    await app.RedisCheck(Inventory(client), Outbox(client)).run()
    await client.aclose()
    lines = [each.message for each in caplog.records if each.name == app.__name__]
    assert lines == [f"waiting for Redis: {cause}" for cause in ("refused", "timed out", "refused")]


async def test_a_redis_that_hides_its_run_leaves_the_pod_alive_and_not_ready(
    own_redis: RedisServer,
) -> None:
    """Such as the proxies of some providers, whose INFO has other fields."""
    async with Proxy(own_redis.port).serve() as proxy:
        proxy.rename(b"master_replid2:", b"master_replidX:")
        redis = {"FLASHSALE_REDIS_URL": url_of(own_redis, redis_users.API, proxy.port)}
        environment = good_environment() | redis
        ready = f"http://{environment['FLASHSALE_LISTEN']}/readyz"
        command = (sys.executable, "-m", "flashsale_api")
        running = await asyncio.create_subprocess_exec(*command, env={**os.environ, **environment})

        async def refused() -> bool:
            async with httpx.AsyncClient() as http:
                return "(INFO has no master_replid2)" in (await http.get(ready)).text

        try:
            await until(refused, ignoring=(httpx.TransportError,))
            await asyncio.sleep(2 * INTERVAL_SECONDS)
            assert await refused()
        finally:
            with contextlib.suppress(ProcessLookupError):
                running.terminate()
            code = await running.wait()
        assert code == 0


def good_environment() -> dict[str, str]:
    return {
        "FLASHSALE_REDIS_URL": "redis://127.0.0.1:1/0",
        "FLASHSALE_KAFKA_BOOTSTRAP": "127.0.0.1:1",
        "FLASHSALE_LISTEN": f"127.0.0.1:{free_port()}",
        "FLASHSALE_METRICS_LISTEN": f"127.0.0.1:{free_port()}",
    }


def run_api(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FLASHSALE_")}
    return subprocess.run(
        [sys.executable, "-m", "flashsale_api", *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FLASHSALE_REDIS_URL", None),
        ("FLASHSALE_REDIS_URL", "localhost:6379"),
        ("FLASHSALE_REDIS_URL", "http://user:secret@localhost"),
        ("FLASHSALE_KAFKA_BOOTSTRAP", None),
        ("FLASHSALE_KAFKA_BOOTSTRAP", "localhost"),
        ("FLASHSALE_KAFKA_BOOTSTRAP", "localhost:9092,"),
        ("FLASHSALE_LISTEN", "8080"),
        ("FLASHSALE_LISTEN", ":8080"),
        ("FLASHSALE_LISTEN", "0.0.0.0:http"),
        ("FLASHSALE_LISTEN", "0.0.0.0:99999"),
        ("FLASHSALE_METRICS_LISTEN", "nonsense"),
        ("FLASHSALE_ORDERS_LISTEN", "8083"),
        ("FLASHSALE_ORDER_TOKENS", ""),
        ("FLASHSALE_ORDER_TOKENS", "secret"),
        ("FLASHSALE_ORDER_TOKENS", "secret secret " * 6),
        ("FLASHSALE_ORDER_TOKENS", "secret" * 6 + ","),
        ("FLASHSALE_ORDER_TOKENS", "secret" * 6 + ",secret"),
        ("FLASHSALE_ORDER_TOKENS", ",".join(["secret" * 6] * 3)),
    ],
)
def test_a_wrong_setting_stops_the_process_with_one_line(variable: str, value: str | None) -> None:
    environment = good_environment()
    if value is None:
        del environment[variable]
    else:
        environment[variable] = value
    done = run_api(environment)
    assert done.returncode == 2
    assert done.stderr.startswith(variable)
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_a_variable_of_other_servers_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Platforms set it for Gunicorn and uvicorn."""
    monkeypatch.setenv("WEB_CONCURRENCY", "auto")
    assert server_of(Starlette(), "127.0.0.1", 0).config.workers == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_api_sends_its_last_spans_and_exits_with_0(number: signal.Signals) -> None:
    with collecting() as collector:
        environment = good_environment() | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_TRACES_SAMPLER": "always_on",
            "OTEL_BSP_SCHEDULE_DELAY": "600000",
        }
        url = f"http://{environment['FLASHSALE_LISTEN']}"
        command = (sys.executable, "-m", "flashsale_api")
        with subprocess.Popen(command, env={**os.environ, **environment}) as running:
            eventually(lambda: _serves(url))
            body = {"userId": "ann", "itemId": "phone", "quantity": 1}
            assert httpx.post(f"{url}/reserve", json=body).status_code == 503
            running.send_signal(number)
            assert running.wait(60) == 0
        assert [span.name for span in collector.spans] == ["POST /reserve"]


def _serves(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/healthz").status_code == 200
    return False


@pytest.mark.parametrize("variable", ["FLASHSALE_METRICS_LISTEN", "FLASHSALE_ORDERS_LISTEN"])
def test_a_port_in_use_stops_the_process_with_one_line(
    redis_server: RedisServer, variable: str
) -> None:
    taken = {variable: f"127.0.0.1:{redis_server.port}", "FLASHSALE_ORDER_TOKENS": "secret" * 6}
    done = run_api(
        good_environment() | {"FLASHSALE_ORDERS_LISTEN": f"127.0.0.1:{free_port()}"} | taken
    )
    assert done.returncode == 1
    assert f"{variable} cannot be served" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_help_lists_the_settings() -> None:
    done = run_api({}, "--help")
    assert done.returncode == 0
    for variable in (*good_environment(), "FLASHSALE_ORDERS_LISTEN", "FLASHSALE_ORDER_TOKENS"):
        assert variable in done.stdout
