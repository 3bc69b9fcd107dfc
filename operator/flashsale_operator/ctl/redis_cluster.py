"""Form a Redis Cluster of empty nodes. A repeated call finishes it, or changes nothing."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, cast

import click
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from flashsale import redis_client, settings
from flashsale.errors import FlashsaleError
from flashsale.requirements import SLOTS
from flashsale.settings import EngineSettings, RedisUrl
from flashsale_operator.ctl.cli import Environ, command

PRIMARIES: Final = 3
BUS_OFFSET: Final = 10_000
"""The bus port of a node is this much above its port, unless it is set."""
SECONDS: Final = 60.0
"""How long the nodes may take to answer, and then for each step."""
_BETWEEN_SECONDS: Final = 0.1
_ROUNDS_UNTIL_RECONNECTED: Final = 10
_ID, _ADDRESS, _FLAGS, _PRIMARY, _SLOTS = 0, 1, 2, 3, 8
"""Fields of a line of CLUSTER NODES. The slots are the last ones."""


class NotFormed(FlashsaleError):
    """The nodes do not form a cluster. The text names the step."""


async def form(nodes: Sequence[Redis], addresses: Sequence[tuple[str, int, int]]) -> bool:
    """Makes one cluster of the nodes, whose first three become primaries. False if it is one.

    `addresses` are those by which the nodes reach each other: host, port and bus port. The fourth
    node follows the first one, the fifth the second one, and so on. A node that lost its data joins
    as a replica. Waits until every node knows all slots, and all replicas are connected. Raises
    `NotFormed`.
    """
    if len(nodes) < PRIMARIES:
        raise NotFormed(f"a Redis Cluster needs {PRIMARIES} nodes or more, but {len(nodes)} given")
    await _until("every node answers", lambda: _all(nodes, _answers))
    try:
        ids = [str(await _ask(node, "CLUSTER", "MYID")) for node in nodes]
        if await _formed(nodes, ids):
            return False
        await _require_one_cluster(nodes, ids, addresses)
        for number, node in enumerate(nodes, start=1):
            # A node that has an epoch or knows others refuses it: an earlier call ended here.
            with suppress(ResponseError):
                await _ask(node, "CLUSTER", "SET-CONFIG-EPOCH", number)
        for host, port, bus_port in addresses[1:]:
            await _ask(nodes[0], "CLUSTER", "MEET", host, port, bus_port)

        await _until(
            "every node knows all others",
            lambda: _all(nodes, lambda node: _knows_all(node, ids)),
        )
        for number, node in enumerate(nodes):
            replication: dict[str, Any] = await node.info("replication")
            if replication["role"] == "master" and not await _has_slots(node):
                await _give_part(node, number, nodes, ids)
        rounds = itertools.count(1)

        async def complete() -> bool:
            if await _formed(nodes, ids):
                return True
            if next(rounds) % _ROUNDS_UNTIL_RECONNECTED == 0:
                await asyncio.gather(*map(_reconnect, nodes))
            return False

        await _until("every node knows all slots and its primary", complete)
    except (RedisError, OSError) as error:
        raise NotFormed(f"a node refused a step: {error}{_remedy(error)}") from error
    return True


def _remedy(error: Exception) -> str:
    """Returns the remedy of a refusal, after a colon, or nothing if it is unknown."""
    if isinstance(error, NoPermissionError):
        return ": FLASHSALE_REDIS_URL needs the user and password of an administrator"
    if "cluster support disabled" in str(error):
        return ": start each node with cluster-enabled yes"
    return ""


async def _give_part(node: Redis, number: int, nodes: Sequence[Redis], ids: Sequence[str]) -> None:
    """Makes an empty node a replica in its shard, or else the primary of the shard's slots."""
    shard = number % PRIMARIES
    for other in range(shard, len(nodes), PRIMARIES):
        if await _has_slots(nodes[other]):
            await _ask(node, "CLUSTER", "REPLICATE", ids[other])
            return
    first, end = (SLOTS * part // PRIMARIES for part in (shard, shard + 1))
    await _ask(node, "CLUSTER", "ADDSLOTSRANGE", first, end - 1)


async def _reconnect(node: Redis) -> None:
    """Lets a replica connect again that looks for its primary at a former address."""
    replication: dict[str, Any] = await node.info("replication")
    if (
        replication.get("master_link_status") == "down"
        and not replication["master_sync_in_progress"]
    ):
        await _ask(node, "CLUSTER", "REPLICATE", (await _own_line(node))[_PRIMARY])


async def _all(nodes: Sequence[Redis], check: Callable[[Redis], Awaitable[bool]]) -> bool:
    return all(await asyncio.gather(*(check(node) for node in nodes)))


async def _until(step: str, check: Callable[[], Awaitable[bool]]) -> None:
    error: Exception | None = None
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                try:
                    if await check():
                        return
                except (RedisError, OSError) as failure:
                    error = failure
                await asyncio.sleep(_BETWEEN_SECONDS)
    except TimeoutError:
        why = f": {error}" if error else ""
        raise NotFormed(f"waited {SECONDS:.0f} s until {step}{why}") from error


async def _ask(node: Redis, *command: str | int) -> Any:  # noqa: ANN401 - of any command
    call = cast("Callable[..., Awaitable[Any]]", node.execute_command)
    return await call(*command)


async def _answers(node: Redis) -> bool:
    await _ask(node, "PING")
    return True


async def _knows_all(node: Redis, ids: Sequence[str]) -> bool:
    # The count of known nodes includes handshakes, which REPLICATE refuses.
    return set(ids) <= {line[_ID] for line in await _nodes(node)}


async def _require_one_cluster(
    nodes: Sequence[Redis], ids: Sequence[str], addresses: Sequence[tuple[str, int, int]]
) -> None:
    """Raises `NotFormed` if the nodes belong to several clusters. MEET would join these."""
    clusters: list[tuple[set[str], str]] = []
    """The ids that the nodes of a cluster know, and the address of one of them."""
    for node, own, (host, port, _) in zip(nodes, ids, addresses, strict=True):
        known = {line[_ID] for line in await _nodes(node) if "handshake" not in line[_FLAGS]}
        if known == {own} and not await _has_slots(node):
            continue  # a new node
        same = [each for each in clusters if each[0] & known]
        clusters = [each for each in clusters if each not in same]
        clusters.append((known.union(*(each[0] for each in same)), f"{host}:{port}"))
    if len(clusters) > 1:
        (_, one), (_, other), *_ = clusters
        raise NotFormed(
            f"{one} and {other} belong to different clusters: name the nodes of one, and new nodes"
        )


async def _formed(nodes: Sequence[Redis], ids: Sequence[str]) -> bool:
    if not await _all(nodes, lambda node: _knows_all(node, ids)):
        return False
    # Nodes that have just started at new addresses do not miss each other for some seconds.
    known = [line for node in nodes for line in await _nodes(node)]
    present = {line[_ID]: _location(line) for line in known if "myself" in line[_FLAGS]}
    if any(present.get(line[_ID]) not in (None, _location(line)) for line in known):
        return False
    return await _all(nodes, _complete)


async def _complete(node: Redis) -> bool:
    """Whether the node knows an owner of every slot, and is connected to its primary."""
    info = await _ask(node, "CLUSTER INFO")
    replication: dict[str, Any] = await node.info("replication")
    return (
        info["cluster_state"] == "ok"
        and int(info["cluster_slots_assigned"]) == SLOTS
        and replication.get("master_link_status", "up") == "up"
    )


async def _nodes(node: Redis) -> list[list[str]]:
    """Returns the node's view of the cluster: a list of fields for each node."""
    text = str(await _ask(node, "CLUSTER", "NODES"))
    return [line.split() for line in text.splitlines()]


def _location(line: Sequence[str]) -> str:
    """Returns the address of a node with both ports, without the name that follows."""
    return line[_ADDRESS].partition(",")[0]


async def _own_line(node: Redis) -> list[str]:
    [own] = [line for line in await _nodes(node) if "myself" in line[_FLAGS]]
    return own


async def _has_slots(node: Redis) -> bool:
    return len(await _own_line(node)) > _SLOTS


class _Redis(EngineSettings, frozen=True):
    redis_url: RedisUrl


@command("form-redis-cluster redis-node-0 redis-node-1 redis-node-2", name="form-redis-cluster")
@click.argument("hosts", metavar="HOST...", nargs=-1, required=True)
async def form_redis_cluster(environ: Environ, hosts: Sequence[str]) -> int:
    """Make a Redis Cluster of new nodes. A repeat changes nothing.

    The first three hosts become primaries. The fourth one is a replica of the first one, and so on.
    FLASHSALE_REDIS_URL has the nodes' port, and the user and password of an administrator.
    """
    url = settings.load(_Redis, environ).redis_url
    first = redis_client.connect(url)
    _, port, _ = redis_client.location(first)
    nodes = [redis_client.neighbour(first, host, port) for host in hosts]
    try:
        # Nodes find each other by numeric addresses only.
        addresses = [(await _address(host), port, port + BUS_OFFSET) for host in hosts]
        formed = await form(nodes, addresses)
    finally:
        for client in (first, *nodes):
            await client.aclose()
    print(f"{len(hosts)} nodes form a cluster" + ("" if formed else " already"))
    return 0


async def _address(host: str) -> str:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:  # a label of more than 63 characters
        raise NotFormed(f"the host {host} is not known: {error}") from error
    return str(found[0][4][0])
