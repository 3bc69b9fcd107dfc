"""The pod's heartbeat in Redis, and the gauges of the servers that the pod depends on."""

import asyncio
import logging
from dataclasses import dataclass

from flashsale import heartbeat
from flashsale.errors import RedisUnavailable
from flashsale.inventory import Inventory
from flashsale_api.batcher import Batcher
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sends the heartbeat of a pod."""

    pod_id: str
    inventory: Inventory
    batcher: Batcher
    publisher: Publisher
    engine: Engine
    metrics: Metrics

    async def run(self) -> None:
        """Writes the heartbeat and the gauges every `INTERVAL_SECONDS` until it is cancelled."""
        while True:
            self.metrics.unacknowledged.set(self.publisher.unacknowledged)
            self.metrics.kafka_up.set(self.publisher.connected)
            try:
                await self.beat()
            except RedisUnavailable as error:
                self.metrics.redis_up.set(0)
                log.debug("no heartbeat: %s", error)
            else:
                self.metrics.redis_up.set(1)
            await asyncio.sleep(heartbeat.INTERVAL_SECONDS)

    async def beat(self) -> None:
        """Writes one heartbeat. Raises `RedisUnavailable`."""
        self.engine.found_in_redis(await self.inventory.engine_id())
        # Read the clock first, because a heartbeat must not claim to be younger than its count.
        sampled = await self.inventory.server()
        counts = dict.fromkeys(self.batcher.called_items(), 0)
        counts |= self.publisher.unacknowledged_by_item()
        redis, engine = self.inventory.redis, self.inventory.engine
        await heartbeat.beat(redis, self.pod_id, counts, sampled, engine)

    async def stop(self) -> None:
        """Removes the heartbeat of a pod that has nothing left to publish."""
        await heartbeat.retire(self.inventory.redis, self.pod_id, self.inventory.engine)
