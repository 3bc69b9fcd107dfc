"""The pod's heartbeat in Redis, and the gauges of the servers that the pod depends on."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flashsale import heartbeat
from flashsale.errors import RedisUnavailable
from flashsale.inventory import Inventory
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher

log = logging.getLogger(__name__)


class Pulse:
    """Knows whether Redis has a valid heartbeat of this pod.

    A rebuild takes a pod without one for dead, and does not wait for its events. Such a pod
    therefore accepts nothing, although it may still reach Redis.
    """

    def __init__(self) -> None:
        self._valid_until: float | None = None

    def sent(self, sampled: float) -> None:
        """Notes a heartbeat that Redis has taken. `sampled` is the loop's time of its sample."""
        self._valid_until = sampled + heartbeat.EXPIRY_SECONDS

    @property
    def begun(self) -> bool:
        """Whether Redis has ever taken a heartbeat."""
        return self._valid_until is not None

    def valid(self) -> bool:
        """Whether the last heartbeat has not expired."""
        until = self._valid_until
        return until is not None and asyncio.get_running_loop().time() < until


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sends the heartbeat of a pod. `inventory` has connections that no request uses."""

    pod_id: str
    inventory: Inventory
    called_items: Callable[[], Iterable[str]]
    publisher: Publisher
    engine: Engine
    metrics: Metrics
    pulse: Pulse = field(default_factory=Pulse)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self) -> None:
        """Writes the heartbeat and the gauges every `INTERVAL_SECONDS` until it is cancelled."""
        while True:
            self.metrics.unacknowledged.set(self.publisher.unacknowledged)
            self.metrics.kafka_up.set(self.publisher.connected)
            try:
                async with self._turn:
                    await self.beat()
            except RedisUnavailable as error:
                self.metrics.redis_up.set(0)
                log.debug("no heartbeat: %s", error)
            else:
                self.metrics.redis_up.set(1)
            await asyncio.sleep(heartbeat.INTERVAL_SECONDS)

    async def beat(self) -> None:
        """Writes one heartbeat, in two round trips. Raises `RedisUnavailable`."""
        begun = asyncio.get_running_loop().time()
        # Read the clock first, because a heartbeat must not claim to be younger than its count.
        sampled, engine_id = await asyncio.gather(
            self.inventory.server(), self.inventory.engine_id()
        )
        self.engine.found_in_redis(engine_id)
        counts = dict.fromkeys(self.called_items(), 0)
        counts |= self.publisher.unacknowledged_by_item()
        redis, engine = self.inventory.redis, self.inventory.engine
        await heartbeat.beat(redis, self.pod_id, counts, sampled, engine)
        self.pulse.sent(begun)

    async def stop(self) -> None:
        """Removes the heartbeat of a pod that has nothing left to publish. No beat follows."""
        await self._turn.acquire()
        await heartbeat.retire(self.inventory.redis, self.pod_id, self.inventory.engine)
