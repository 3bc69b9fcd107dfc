"""Reads the facts of Redis' servers that `requirements.REDIS` checks."""

import asyncio
import re
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import MovedError, RedisError, ResponseError

from flashsale import keys, redis_client
from flashsale.errors import RedisUnavailable, UnmetRequirement
from flashsale.keys import DEFAULT_ENGINE
from flashsale.nodes import NODE_SECONDS, Node, Nodes
from flashsale.redis_errors import FAILURES, denies_command
from flashsale.requirements import ClusterFacts, RedisFacts

_TRY_INFO: Final = """
local info = redis.pcall('INFO', 'server', 'replication')
if type(info) == 'table' then return info.err end
if not string.match(info, 'run_id:%x+') then return 'INFO has no run_id' end
if not string.match(info, 'master_replid2:%x+') then return 'INFO has no master_replid2' end
return ''
"""


async def read(redis: Redis, engine: str = DEFAULT_ENGINE) -> list[RedisFacts]:
    """Returns each server's version and settings, to compare with `requirements.REDIS`.

    Primaries of a cluster that are away are left out, unless all are. Raises
    `UnmetRequirement` if the database of the address does not exist, or if the server refuses a
    command without which nothing can be read.
    """
    nodes = Nodes.of_client(redis)
    try:
        servers = await nodes.all()
    except RedisUnavailable as error:
        if isinstance(error.__cause__, ResponseError) and denies_command(error.__cause__):
            if "'cluster" not in str(error).lower():
                raise _unmet(error.__cause__) from error
            raise UnmetRequirement(
                "Redis is a cluster, whose user needs the command CLUSTER SLOTS: allow it"
            ) from error
        if re.search("SELECT is not allowed|DB index is out of range", str(error)):
            database = redis_client.location(redis)[2]
            raise UnmetRequirement(
                f"FLASHSALE_REDIS_URL names database {database}, which Redis does not have: "
                "a Redis Cluster has only database 0"
            ) from error
        raise
    found = await asyncio.gather(
        *(_of_server(nodes, server, engine) for server in servers), return_exceptions=True
    )
    facts = [each for each in found if isinstance(each, RedisFacts)]
    for each in found:
        if isinstance(each, BaseException) and not (facts and isinstance(each, RedisUnavailable)):
            raise each
    return facts


async def _of_server(nodes: Nodes, node: Node, engine: str) -> RedisFacts:
    pipeline = node.redis.pipeline(transaction=False)
    pipeline.info()
    pipeline.config_get("repl-backlog-ttl", "cluster-*", "min-replicas-to-write")
    if node.name:
        # A key would have to be in one of the node's own slots.
        pipeline.eval(_TRY_INFO, 0)
    else:
        pipeline.eval(_TRY_INFO, 1, keys.engine_id(engine))
    try:
        async with asyncio.timeout(NODE_SECONDS if node.name else None):
            info, config, script = await pipeline.execute(raise_on_error=False)
            covered = await nodes.covered(node) if node.name else 0
    except FAILURES as error:
        if denies_command(error):
            raise _unmet(error) from error
        raise nodes.unavailable(error, node) from error
    for reply in (info, script):
        if isinstance(reply, MovedError):
            await nodes.moved(reply, node)
        if isinstance(reply, RedisError) and not denies_command(reply):
            raise nodes.unavailable(reply, node)
    if isinstance(info, RedisError):
        info = {}
        script = "this user may not call it"
    if isinstance(config, RedisError):
        config = {}
    return RedisFacts(
        version=info.get("redis_version"),
        policy=info.get("maxmemory_policy"),
        backlog_ttl=config.get("repl-backlog-ttl"),
        appendonly=bool(info.get("aof_enabled", True)),
        script_error=_without_arguments(script),
        node=node.name,
        cluster=ClusterFacts(covered, config, info.get("connected_slaves", 0))
        if node.name
        else None,
    )


def _unmet(error: Exception) -> UnmetRequirement:
    return UnmetRequirement(
        f"Redis refuses a command that connections need ({_without_arguments(error)}): "
        "allow it, or use another server"
    )


def _without_arguments(answer: object) -> str:
    """Returns an answer as one line. Redis repeats the arguments of an unknown command."""
    return " ".join(str(answer).split()).partition(", with args")[0]
