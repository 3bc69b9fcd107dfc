"""The heartbeat of a pod whose event loop is busy. Needs Redis."""

import asyncio
import time

from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale.settings import KafkaSettings
from flashsale_api.engine import Engine
from flashsale_api.heartbeat import Heartbeat, Pulse
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher
from tests.support import redis_users

TURN_SECONDS = 0.1
"""A turn of the event loop with thousands of busy connections."""


async def test_a_heartbeat_waits_for_few_turns_of_the_pods_loop(redis_server: RedisServer) -> None:
    url, engine, metrics = redis_users.url_of(redis_server, redis_users.API), Engine("e"), Metrics()
    inventory, of_pod = Inventory(redis_client.connect(url)), redis_client.connect(url)
    pulse = Pulse(inventory.node_of)
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
    beating, turns = asyncio.create_task(heartbeat.run()), 0
    while not pulse.begun:
        time.sleep(TURN_SECONDS)  # noqa: ASYNC251 - nothing else may run in this loop
        await asyncio.sleep(0)
        turns += 1
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)
    await of_pod.aclose()
    # A heartbeat in the pod's own loop takes more than 80 turns.
    assert turns < 40
