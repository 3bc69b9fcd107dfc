"""A pod that holds events and cannot send them, while Redis loses its keys and a rebuild begins."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dev.crowd import stampede
from dev.journal import Attempt, Journal
from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.ports import free_port
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from dev.verdict import judge, quiet
from flashsale import heartbeat, redis_client
from flashsale.errors import RedisUnavailable
from flashsale.inventory import Inventory
from tests.support.engine import flashsalectl, manifest
from tests.support.eventually import until
from tests.support.flood import Flood, Watch, allow_connections, patient
from tests.support.proxy import Proxy
from tests.support.redis_users import API, OPERATOR, of_api, url_of

pytestmark = pytest.mark.slow

ITEM, NONE = "phone", "none"
FLOOD_CONNECTIONS = 3_000


@dataclass(frozen=True)
class Scene:
    """An engine with two pods that cannot reach Kafka, and one that can reach everything.

    Requests of `silent` to Redis can be kept back, and those of `flooded` cannot. No pod runs yet.
    """

    redis: RedisServer
    addresses: Addresses
    silent: ApiServer
    flooded: ApiServer
    other: ApiServer
    to_redis: Proxy
    to_kafka: Proxy
    kafka: KafkaServer
    journal: Journal

    async def buy(self, api: ApiServer, user: str) -> str:
        body = {"userId": user, "itemId": ITEM, "quantity": 1}
        found = await stampede([api.url], [Attempt(user, body, f"key-{user}")], connections=1)
        self.journal.entries += found.entries
        return found.entries[0].outcome

    async def flush(self) -> None:
        client = patient(self.redis.url)  # a flood of connections keeps the machine busy
        await client.flushall()
        await client.aclose()

    async def rebuilt(self) -> bool:
        """Try to rebuild the sale once."""
        done = await flashsalectl(self.addresses, "rebuild", ITEM)
        assert done.returncode == 0 or "stays fenced" in done.stderr, done.stderr
        return done.returncode == 0

    async def living(self) -> list[heartbeat.Report]:
        """Look from another event loop, because a flood keeps this one busy."""
        return await asyncio.to_thread(asyncio.run, self._living())

    async def _living(self) -> list[heartbeat.Report]:
        client = redis_client.connect(self.addresses.redis_url)
        try:
            server = await Inventory(client).server()
            return await heartbeat.living(client, ITEM, server, self.addresses.engine)
        finally:
            await client.aclose()

    async def end(self) -> None:
        """Let every process reach every server, and compare the promises with the ledger."""
        self.to_redis.keep_back(b"")
        self.to_kafka.target_port = self.kafka.port
        await until(self._nothing_is_held)
        await quiet(self.addresses, [ITEM])
        verdict, _ = await judge(self.addresses, f"default/{ITEM}", self.journal)
        assert verdict.kept, verdict
        assert verdict.sold == verdict.allocated == 1

    async def _nothing_is_held(self) -> bool:
        living = await self.living()
        return bool(living) and not any(pod.unacknowledged for pod in living)


@pytest.fixture
async def scene(
    tmp_path: Path,
    own_redis: RedisServer,
    kafka_server: KafkaServer,
    postgres_server: PostgresServer,
    database_url: str,
) -> AsyncIterator[Scene]:
    del postgres_server
    allow_connections(FLOOD_CONNECTIONS)
    engine = f"silent-{uuid.uuid4().hex[:8]}"
    addresses = Addresses(url_of(own_redis, OPERATOR), kafka_server.bootstrap, database_url, engine)
    consumer = ConsumerServer(tmp_path / "consumer", addresses)
    async with Proxy(own_redis.port).serve() as to_redis, Proxy(free_port()).serve() as to_kafka:
        no_kafka = replace(of_api(addresses), kafka_bootstrap=f"127.0.0.1:{to_kafka.port}")
        silent = ApiServer(
            tmp_path / "silent",
            replace(no_kafka, redis_url=url_of(own_redis, API, to_redis.port)),
        )
        flooded = ApiServer(tmp_path / "flooded", no_kafka)
        other = ApiServer(tmp_path / "other", of_api(addresses))
        await asyncio.to_thread(consumer.start)
        for item in (ITEM, NONE):
            done = await flashsalectl(addresses, "apply", "-f", "-", stdin=manifest(item, stock=1))
            assert done.returncode == 0, done.stderr
        pods = silent, flooded, other
        yield Scene(own_redis, addresses, *pods, to_redis, to_kafka, kafka_server, Journal())
        for server in (*pods, consumer):
            server.kill()


async def test_a_pod_without_a_heartbeat_promises_no_unit_that_a_rebuild_sells_again(
    scene: Scene,
) -> None:
    """Its events are in no living pod's count, so a rebuild does not wait for them."""
    await asyncio.to_thread(scene.silent.start)
    scene.to_redis.keep_back(b":pod:")

    async def silent() -> bool:
        return not await scene.living()

    await until(silent)
    alice = await scene.buy(scene.silent, "alice")
    await scene.flush()
    await until(scene.rebuilt)
    await asyncio.to_thread(scene.other.start)
    assert await scene.buy(scene.other, "bob") == "202"
    await scene.end()
    assert alice == "fenced"


async def test_a_flood_does_not_hide_the_events_of_a_pod_from_a_rebuild(scene: Scene) -> None:
    await asyncio.to_thread(scene.flooded.start)
    assert await scene.buy(scene.flooded, "alice") == "202"
    client = patient(scene.redis.url)
    watch = Watch(client, scene.flooded, scene.addresses.engine)
    flood = Flood(scene.flooded.url)
    async with flood.running(ITEM, NONE, FLOOD_CONNECTIONS):
        await scene.flush()
        await until(scene.living, ignoring=(RedisUnavailable,))
        watching = asyncio.create_task(watch.look_for(12))
        assert not await scene.rebuilt()
        seen = await watching
    await client.aclose()
    print(seen, dict(flood.answers))
    assert seen.oldest_ms < heartbeat.EXPIRY_SECONDS * 1000 / 2
    scene.to_kafka.target_port = scene.kafka.port
    await until(scene.rebuilt)
    await asyncio.to_thread(scene.other.start)
    assert await scene.buy(scene.other, "bob") == "sold-out"
    await scene.end()
