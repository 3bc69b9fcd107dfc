"""Heartbeats of the API pods, with the number of events that Kafka has not acknowledged.

Before a fenced sale is trusted again, no living pod may hold an event of it. A heartbeat carries
the time of its sample by Redis' clock, which tells samples from before and after the fence apart.
"""

from collections.abc import Awaitable
from typing import Final, cast

import msgspec
from redis.asyncio import Redis

from flashsale.keys import PODS, heartbeat
from flashsale.scripts import translated

INTERVAL_SECONDS: Final = 1.0
EXPIRY_SECONDS: Final = 5
"""A pod without a heartbeat for this long is dead or cut off from Redis."""

CALL_DEADLINE_SECONDS: Final = 1.0
"""How long an API pod waits for the reply of a script call.

A heartbeat sampled later than this after a fence counts every reservation that the pod accepted
before the fence.
"""


class Heartbeat(msgspec.Struct, frozen=True, rename="camel"):
    """A pod's unacknowledged events per item, in its memory at `sampled_ms` of Redis' clock.

    They are counted per item because a fenced sale's count falls to zero while others still sell.
    """

    pod_id: str
    unacknowledged: dict[str, int]
    sampled_ms: int


async def beat(redis: "Redis", own: Heartbeat) -> None:
    """Writes a pod's heartbeat. Raises `RedisUnavailable`."""
    pipeline = redis.pipeline(transaction=False)
    pipeline.sadd(PODS, own.pod_id)
    pipeline.set(heartbeat(own.pod_id), msgspec.json.encode(own), ex=EXPIRY_SECONDS)
    await translated(pipeline.execute())


async def retire(redis: "Redis", pod_id: str) -> None:
    """Removes the heartbeat of a pod that stops without unacknowledged events."""
    pipeline = redis.pipeline(transaction=False)
    pipeline.srem(PODS, pod_id)
    pipeline.delete(heartbeat(pod_id))
    await translated(pipeline.execute())


async def living(redis: "Redis") -> list[Heartbeat]:
    """Returns the heartbeats of the living pods, and removes dead pods from the index."""
    pods = sorted(await translated(cast("Awaitable[set[str]]", redis.smembers(PODS))))
    texts = await translated(redis.mget([heartbeat(pod) for pod in pods])) if pods else []
    if dead := [pod for pod, text in zip(pods, texts, strict=True) if text is None]:
        await translated(redis.srem(PODS, *dead))
    return [msgspec.json.decode(text, type=Heartbeat) for text in texts if text is not None]
