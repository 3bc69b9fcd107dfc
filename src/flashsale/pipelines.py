"""Pipelines of commands, to the servers of many items at once."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from redis.asyncio.client import Pipeline
from redis.exceptions import MovedError, RedisError

from flashsale.errors import RedisUnavailable
from flashsale.nodes import NODE_SECONDS, Node, Nodes
from flashsale.redis_errors import FAILURES

T = TypeVar("T")


async def each(
    nodes: Nodes,
    items: Iterable[T],
    key: Callable[[T], str],
    queue: Callable[[Pipeline, T], object],
    *,
    partial: bool = False,
) -> dict[T, list[Any]]:
    """Returns the replies to the commands that `queue` adds to a pipeline for each item.

    With `partial`, items are left out whose call fails, for example because their server is
    away. Raises `RedisUnavailable` otherwise, and if the calls for all items fail.
    """
    wanted = list(items)
    found: dict[T, list[Any]] = {}
    failure: RedisUnavailable | None = None
    asked = wanted
    for last in (False, True):
        moved: list[T] = []
        groups = await nodes.split(asked, key) if asked else {}
        results = await asyncio.gather(
            *(_pipelined(node, some, queue) for node, some in groups.items())
        )
        for (node, some), replies in zip(groups.items(), results, strict=True):
            for item, reply in zip(some, replies, strict=True):
                if isinstance(reply, MovedError) and not last:
                    await nodes.moved(reply, node)
                    moved.append(item)
                elif isinstance(reply, Exception):
                    failure = nodes.unavailable(reply, node)
                else:
                    found[item] = reply
        asked = moved
    if len(found) < len(wanted) and not (partial and found):
        raise failure or RedisUnavailable("Redis is unavailable: no node has the item's slot")
    return found


async def of_servers(
    nodes: Nodes, servers: Iterable[Node], queue: Callable[[Pipeline], object]
) -> dict[Node, list[Any]]:
    """Returns the replies of each server to the commands that `queue` adds to a pipeline.

    Servers that are away are left out. Raises `RedisUnavailable` if all are.
    """
    asked = list(servers)
    found: dict[Node, list[Any]] = {}
    failure: RedisUnavailable | None = None
    for node, [reply] in zip(
        asked,
        await asyncio.gather(*(_pipelined(node, [node], lambda p, _: queue(p)) for node in asked)),
        strict=True,
    ):
        if isinstance(reply, Exception):
            failure = nodes.unavailable(reply, node)
        else:
            found[node] = reply
    if failure and not found:
        raise failure
    return found


async def _pipelined(
    node: Node, items: Sequence[T], queue: Callable[[Pipeline, T], object]
) -> list[list[Any] | Exception]:
    """Returns for each item its replies, or the first error."""
    pipeline = node.redis.pipeline(transaction=False)
    ends = [0]
    for item in items:
        queue(pipeline, item)
        ends.append(len(pipeline))
    try:
        async with asyncio.timeout(NODE_SECONDS if node.name else None):
            replies = await pipeline.execute(raise_on_error=False)
    except FAILURES as error:
        return [error] * len(items)
    return [
        next((reply for reply in own if isinstance(reply, RedisError)), own)
        for own in (replies[begin:end] for begin, end in pairwise(ends))
    ]
