"""Faults of the reference engine that no other test covers.

docs/reliability.md lists all of them, each with its test.
"""

import asyncio
import http.client
from urllib.parse import urlsplit

import httpx
import pytest
from aiokafka import AIOKafkaProducer

from dev.crowd import stampede
from dev.journal import Attempt
from dev.verdict import judge, quiet
from flashsale import events, redis_client
from tests.support.engine import Engine
from tests.support.eventually import until

pytestmark = pytest.mark.slow

OF_OTHER_FRAMEWORKS = (
    "/actuator",
    "/actuator/heapdump",
    "/actuator/env",
    "/actuator/configprops",
    "/env",
    "/debug/pprof/heap",
    "/debug/vars",
    "/server-status",
    "/config",
    "/.env",
    "/console",
)


async def test_an_item_id_reaches_no_key_of_another_application(engine: Engine, item: str) -> None:
    client = redis_client.connect(engine.redis.url)
    theirs = f"counter-{item}"
    await client.set(theirs, 5)
    await engine.apply(item, stock=1)  # before an engine has claimed Redis, every item may be lost
    async with httpx.AsyncClient(base_url=engine.urls[0]) as buyer:
        for item_id in (theirs, f"flashsale:{{{theirs}}}:sale", f"}}{theirs}{{"):
            body = {"userId": "ann", "itemId": item_id, "quantity": 1}

            async def refused() -> bool:
                answer = await buyer.post("/reserve", json=body)  # noqa: B023 - called at once
                return answer.status_code in (404, 422)

            await until(refused)
    assert await client.get(theirs) == "5"
    assert [key async for key in client.scan_iter(match=f"*{theirs}*")] == [theirs]
    await client.delete(theirs)
    await client.aclose()


async def test_no_port_shows_memory_or_settings(engine: Engine) -> None:
    secrets = {urlsplit(engine.addresses.database_url).password or "", "FLASHSALE_"}
    api, consumer = engine.apis[0], engine.consumers[0]
    metrics = urlsplit(api.metrics_url).port
    for port in (api.port, consumer.port, metrics):
        assert port is not None
        for path in ("/", *OF_OTHER_FRAMEWORKS, "/healthz", "/readyz", "/metrics", "/openapi.json"):
            status, text = await asyncio.to_thread(get, port, path)
            # On the metrics port, prometheus-client answers every path with the metrics.
            assert status == 404 or path not in OF_OTHER_FRAMEWORKS or port == metrics, path
            assert not [secret for secret in secrets if secret in text], (port, path)


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


async def test_records_that_cannot_be_read_stop_no_consumer_and_fill_no_log(
    engine: Engine, item: str
) -> None:
    await engine.apply(item, stock=500)
    before = [consumer.log.stat().st_size for consumer in engine.consumers]
    producer = AIOKafkaProducer(bootstrap_servers=engine.kafka.bootstrap, acks="all")
    await producer.start()
    bad, topic = 200, events.topic(engine.addresses.engine)
    for number in range(bad):
        await producer.send(topic, b"no event " * 1_000, partition=number % 12)
    await producer.flush()
    await producer.stop()
    wanted = [
        Attempt(f"u{n}", {"userId": f"u{n}", "itemId": item, "quantity": 1}) for n in range(500)
    ]
    journal = await stampede(engine.urls, wanted, connections=20)
    await quiet(engine.addresses, [item])
    verdict, _ = await judge(engine.addresses, f"default/{item}", journal)
    assert (verdict.kept, verdict.sold) == (True, 500)
    grown = sum(
        consumer.log.stat().st_size - size
        for consumer, size in zip(engine.consumers, before, strict=True)
    )
    assert grown < bad * 2_000, "a bad record is logged once, in one or two lines"


async def test_kafka_away_for_longer_than_any_client_waits_and_the_apis_killed_loses_nothing(
    engine: Engine, item: str
) -> None:
    """In the end no process has the reservations in memory. Only the outbox has them."""
    await engine.apply(item, stock=300)
    await asyncio.to_thread(engine.kafka.stop)
    wanted = [
        Attempt(f"u{n}", {"userId": f"u{n}", "itemId": item, "quantity": 1}, f"key-{n}")
        for n in range(300)
    ]
    journal = await stampede(engine.urls, wanted, connections=20, tries=5)
    assert {entry.status for entry in journal.entries} == {202}
    url = engine.apis[0].metrics_url
    await until(lambda: "publish_failures_total 0.0" not in httpx.get(url).text, pause=0.2)
    for api in engine.apis:
        assert (await asyncio.to_thread(get, api.port, "/healthz"))[0] == 200
        api.kill()
    await asyncio.to_thread(engine.kafka.start)
    for api in engine.apis:
        await asyncio.to_thread(api.start)
    await quiet(engine.addresses, [item])
    verdict, _ = await judge(engine.addresses, f"default/{item}", journal)
    assert (verdict.kept, verdict.sold) == (True, 300)
