"""Heartbeats of API pods: what each holds that Kafka has not acknowledged.

Whoever wants to trust a fenced sale again must know that no living pod still holds an event of
it. A heartbeat says when it was sampled, by Redis' clock, so that one from before the fence is
not mistaken for one after it.
"""

from collections.abc import Awaitable
from typing import Final, cast

import msgspec
from redis.asyncio import Redis

from flashsale.keys import PODS, heartbeat
from flashsale.scripts import translated

INTERVAL_SECONDS: Final = 1.0
EXPIRY_SECONDS: Final = 5
"""A pod that has not beaten for this long is dead, or cut off from Redis."""

CALL_DEADLINE_SECONDS: Final = 1.0
"""How long an API pod believes the answer of a script call.

A heartbeat sampled later than this after a fence counts every reservation that the pod accepted
before it.
"""


class Heartbeat(msgspec.Struct, frozen=True, rename="camel"):
    """`unacknowledged`: events by item, held in the pod's memory at `sampled_ms` of Redis' clock.

    By item, since a fenced sale accepts nothing new and comes to rest while others sell on.
    """

    pod_id: str
    unacknowledged: dict[str, int]
    sampled_ms: int


async def beat(redis: "Redis", own: Heartbeat) -> None:
    """Writes a pod's heartbeat; raises `RedisUnavailable`."""
    pipeline = redis.pipeline(transaction=False)
    pipeline.sadd(PODS, own.pod_id)
    pipeline.set(heartbeat(own.pod_id), msgspec.json.encode(own), ex=EXPIRY_SECONDS)
    await translated(pipeline.execute())


async def retire(redis: "Redis", pod_id: str) -> None:
    """Removes the heartbeat of a pod that ends with nothing unacknowledged."""
    pipeline = redis.pipeline(transaction=False)
    pipeline.srem(PODS, pod_id)
    pipeline.delete(heartbeat(pod_id))
    await translated(pipeline.execute())


async def living(redis: "Redis") -> list[Heartbeat]:
    """The heartbeats of the pods that are alive; forgets the others."""
    pods = sorted(await translated(cast("Awaitable[set[str]]", redis.smembers(PODS))))
    texts = await translated(redis.mget([heartbeat(pod) for pod in pods])) if pods else []
    if dead := [pod for pod, text in zip(pods, texts, strict=True) if text is None]:
        await translated(redis.srem(PODS, *dead))
    return [msgspec.json.decode(text, type=Heartbeat) for text in texts if text is not None]
