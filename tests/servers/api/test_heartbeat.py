"""The heartbeat of a pod whose event loop is busy, or knows more of a cluster. Needs Redis."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from dev.stack.servers import RedisCluster, RedisServer
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale.settings import KafkaSettings
from flashsale_api.engine import Engine
from flashsale_api.heartbeat import Heartbeat, Pulse
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher
from tests.support import redis_users
from tests.support.eventually import until

TURN_SECONDS = 0.1
"""A turn of the event loop with thousands of busy connections."""


@contextlib.asynccontextmanager
async def beating(url: str, inventory: Inventory, pulse: Pulse) -> AsyncIterator[None]:
    """Send heartbeats of a pod that no request calls. They close the inventory."""
    engine, metrics, of_pod = Engine("e"), Metrics(), redis_client.connect(url)
    heartbeat = Heartbeat(
        "pod",
        inventory,
        called_items=lambda: (),
        publisher=Publisher(
            KafkaSettings(kafka_bootstrap="127.0.0.1:1"), Outbox(of_pod), metrics, engine
        ),
        engine=engine,
        metrics=metrics,
        pulse=pulse,
    )
    running = asyncio.create_task(heartbeat.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await of_pod.aclose()


async def test_a_heartbeat_waits_for_few_turns_of_the_pods_loop(redis_server: RedisServer) -> None:
    url = redis_users.url_of(redis_server, redis_users.API)
    inventory = Inventory(redis_client.connect(url))
    pulse, turns = Pulse(inventory.node_of), 0
    async with beating(url, inventory, pulse):
        while not pulse.begun:
            time.sleep(TURN_SECONDS)  # noqa: ASYNC251 - nothing else may run in this loop
            await asyncio.sleep(0)
            turns += 1
    # A heartbeat in the pod's own loop takes more than 80 turns.
    assert turns < 40


async def test_a_heartbeat_meets_a_primary_that_only_the_pods_loop_knows(
    redis_cluster: RedisCluster,
) -> None:
    of_pod, own = (Inventory(redis_client.connect(redis_cluster.url)) for _ in range(2))
    await of_pod.nodes.all()
    await own.nodes.all()
    new = next(name for name in own.nodes._primaries if name != of_pod.node_of("phone"))
    item = next(each for each in map(str, range(100)) if of_pod.node_of(each) == new)
    former = own.nodes._primaries[of_pod.node_of("phone")]
    lost = own.nodes._primaries.pop(new)
    own.nodes._owners = [former if each is lost else each for each in own.nodes._owners]
    pulse = Pulse(of_pod.node_of)
    async with beating(redis_cluster.url, own, pulse):
        await until(lambda: pulse.refusal(item) is None)
    await of_pod.redis.aclose()
