"""Heartbeats of the API pods, with the number of events that Kafka has not acknowledged.

Before a fenced sale is trusted again, no living pod may hold an event of it. A pod therefore
reports per item, into the item's own slot: then one server, with one clock and one run, proves
that the sale is at rest. A report carries the time of its sample, which tells samples from before
and after the fence apart, and the run of the server whose clock it used.
"""

from collections.abc import Awaitable, Iterable, Mapping
from typing import Final, NamedTuple, cast

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from flashsale import keys, pipelines
from flashsale.clocks import ServerTime
from flashsale.errors import RedisUnavailable
from flashsale.keys import DEFAULT_ENGINE, ItemKeys
from flashsale.nodes import Nodes
from flashsale.redis_errors import translated

INTERVAL_SECONDS: Final = 1.0
EXPIRY_SECONDS: Final = 5
"""A pod without a heartbeat for this long is dead or cut off from Redis."""

CALL_DEADLINE_SECONDS: Final = 1.0
"""How long an API pod waits for the reply of a script call.

A heartbeat sampled later than this after a fence counts every reservation that the pod accepted
before the fence.
"""
ACKNOWLEDGED_SECONDS: Final = 2.0
"""How long after a script call Kafka may acknowledge its event for the answer 200 to an order.

Later, the sale may have been rebuilt without the event.
"""
assert EXPIRY_SECONDS > CALL_DEADLINE_SECONDS + ACKNOWLEDGED_SECONDS  # noqa: S101 - of constants
_KEPT_SECONDS: Final = 60
"""How long an item without calls keeps its reports. Readers ignore expired ones.

While pods call the item, it also keeps those of pods that died without `retire`.
"""
_OVERALL: Final = ""
"""Stands for the previous version's heartbeat over all items, in the place of an item."""


class Report(NamedTuple):
    """A pod's unacknowledged events of an item, at `sampled_ms` of Redis' clock."""

    pod_id: str
    unacknowledged: int
    sampled_ms: int


class Sent(NamedTuple):
    """The servers that took a heartbeat, and the items whose report such a server refused."""

    servers: set[str]
    refused: set[str]


class _Overall(msgspec.Struct, frozen=True, rename="camel"):
    """The heartbeat of the previous version: one key per pod, with all its items."""

    pod_id: str
    unacknowledged: dict[str, int]
    sampled_ms: int


async def beat(
    redis: Redis,
    pod_id: str,
    unacknowledged: Mapping[str, int],
    sampled: Mapping[str, ServerTime],
    engine: str = DEFAULT_ENGINE,
) -> Sent:
    """Writes a pod's report for each item in `unacknowledged`. Raises `RedisUnavailable`.

    The mapping also needs the items without events that the pod has called within the last
    `EXPIRY_SECONDS`. `sampled` has the clock of each server by its name, read before the events are
    counted. A server that refuses the reports of all its items counts as away. While the slot of
    an item moves, it refuses only that one.
    """

    def key(item_id: str) -> str:
        return ItemKeys.of(item_id, engine).pods

    def queue(pipeline: Pipeline, item_id: str) -> None:
        if item_id == _OVERALL:
            # Operators of the previous version, which knows no cluster, read only this key.
            overall = _Overall(pod_id, dict(unacknowledged), sampled[""].now_ms)
            pipeline.sadd(keys.pods(engine), pod_id)
            own = keys.heartbeat(engine, pod_id)
            pipeline.set(own, msgspec.json.encode(overall), ex=EXPIRY_SECONDS)
            return
        server = sampled[names[item_id]]
        report = f"{server.now_ms},{unacknowledged[item_id]},{server.run_id}"
        pipeline.hset(key(item_id), pod_id, report)
        pipeline.expire(key(item_id), _KEPT_SECONDS)

    nodes = Nodes.of_client(redis)
    names = {item_id: nodes.name_of(key(item_id)) for item_id in unacknowledged}
    wanted = [item_id for item_id, name in names.items() if name in sampled]
    try:
        written = await pipelines.each(
            nodes, [*wanted, _OVERALL] if nodes.single else wanted, key, queue, partial=True
        )
    except RedisUnavailable:
        if nodes.single:
            raise
        written = {}
    missing = [item_id for item_id in wanted if item_id not in written]
    away = {names[item_id] for item_id in missing}
    away -= {names[item_id] for item_id in wanted if item_id in written}
    return Sent(set(sampled) - away, {item_id for item_id in missing if names[item_id] not in away})


async def retire(
    redis: Redis, pod_id: str, item_ids: Iterable[str], engine: str = DEFAULT_ENGINE
) -> None:
    """Removes the heartbeat of a pod whose last one reported no unacknowledged events.

    Its reports for `item_ids` are removed as well. Those that a server refuses to remove, or whose
    server is away, say the same. Raises `RedisUnavailable`.
    """
    nodes = Nodes.of_client(redis)
    if nodes.single:
        pipeline = redis.pipeline(transaction=False)
        pipeline.srem(keys.pods(engine), pod_id)
        pipeline.delete(keys.heartbeat(engine, pod_id))
        await translated(pipeline.execute())

    def key(item_id: str) -> str:
        return ItemKeys.of(item_id, engine).pods

    await pipelines.each(
        nodes,
        item_ids,
        key,
        lambda pipeline, item_id: pipeline.hdel(key(item_id), pod_id),
        partial=True,
    )


async def living(
    redis: Redis, item_id: str, server: ServerTime, engine: str = DEFAULT_ENGINE
) -> list[Report]:
    """Returns the reports of the living pods about an item. `server` was read just before.

    A report that used the clock of another run is left out. By this clock it could look newer than
    it is. So is one from the future, because the clock was set back since. A living pod sends
    another one within `EXPIRY_SECONDS`. The reports of pods of the previous version, which have
    none in the item's slot, are included.
    """
    key, nodes = ItemKeys.of(item_id, engine).pods, Nodes.of_client(redis)

    def queue(pipeline: Pipeline, _: str) -> None:
        pipeline.hgetall(key)
        # A caller that stood still since it read the clock must not take new reports for future
        # ones.
        pipeline.time()

    found, (seconds, _) = (await pipelines.each(nodes, [key], str, queue))[key]
    oldest_ms = server.now_ms - EXPIRY_SECONDS * 1000
    newest_ms = (seconds + EXPIRY_SECONDS) * 1000
    reports = []
    for pod_id, text in sorted(found.items()):
        sampled_ms, count, run_id = text.split(",")
        if run_id == server.run_id and oldest_ms <= int(sampled_ms) <= newest_ms:
            reports.append(Report(pod_id, int(count), int(sampled_ms)))
    return reports + [
        Report(pod.pod_id, pod.unacknowledged.get(item_id, 0), pod.sampled_ms)
        for pod in (await _previous_version(redis, engine) if nodes.single else ())
        if pod.pod_id not in found
    ]


async def _previous_version(redis: Redis, engine: str) -> list[_Overall]:
    index = keys.pods(engine)
    pods = sorted(await translated(cast("Awaitable[set[str]]", redis.smembers(index))))
    wanted = [keys.heartbeat(engine, pod) for pod in pods]
    texts = await translated(redis.mget(wanted)) if wanted else []
    if dead := [pod for pod, text in zip(pods, texts, strict=True) if text is None]:
        await translated(redis.srem(index, *dead))
    return [msgspec.json.decode(text, type=_Overall) for text in texts if text is not None]
