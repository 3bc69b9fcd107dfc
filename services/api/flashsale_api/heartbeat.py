"""The pod's heartbeat in Redis, and the gauges of the servers that the pod depends on."""

import asyncio
import logging

from redis.asyncio import Redis

from flashsale import heartbeat
from flashsale.errors import RedisUnavailable
from flashsale.heartbeat import Heartbeat
from flashsale.inventory import Inventory
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher

log = logging.getLogger(__name__)


async def beat(
    redis: Redis, inventory: Inventory, publisher: Publisher, metrics: Metrics, pod_id: str
) -> None:
    """Writes the heartbeat and the gauges every `INTERVAL_SECONDS` until it is cancelled."""
    while True:
        metrics.unacknowledged.set(publisher.unacknowledged)
        metrics.kafka_up.set(publisher.connected)
        try:
            # Read the clock first, because a heartbeat must not claim to be younger than its count.
            sampled_ms = (await inventory.server()).now_ms
            held = publisher.unacknowledged_by_item()
            await heartbeat.beat(redis, Heartbeat(pod_id, held, sampled_ms))
        except RedisUnavailable as error:
            metrics.redis_up.set(0)
            log.debug("no heartbeat: %s", error)
        else:
            metrics.redis_up.set(1)
        await asyncio.sleep(heartbeat.INTERVAL_SECONDS)
