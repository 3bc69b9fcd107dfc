"""The clock and the run of each Redis server."""

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from redis.asyncio.client import Pipeline

from flashsale import pipelines
from flashsale.errors import RedisUnavailable
from flashsale.nodes import Node, Nodes

_IDS: Final = ("run_id", "master_replid2")


class ServerTime(NamedTuple):
    """Redis' clock in Unix milliseconds, and the server's run as `read_sale` compares it.

    `run_id` is the server's run_id and its `master_replid2`, joined by a colon. The latter is the
    replication id of the master that this server followed before it became a master itself.
    """

    now_ms: int
    run_id: str


async def read(nodes: Nodes, servers: Iterable[Node]) -> dict[str, ServerTime]:
    """Returns the clock and run of each server by its name.

    Servers that are away, have become replicas, or hide a part of their run are left out. Raises
    `RedisUnavailable` if all are.
    """

    def queue(pipeline: Pipeline) -> None:
        pipeline.time()
        pipeline.info("server", "replication")

    found = await pipelines.of_servers(nodes, servers, queue)
    clocks = {}
    problem = "is unavailable: the server has become a replica"
    for node, (time, info) in found.items():
        if info.get("role") == "slave":
            # Its clock and run are not those of its former sales, and no command would fail.
            nodes.demoted(node)
        elif hidden := [name for name in _IDS if name not in info]:
            problem = f"refused the call: INFO has no {hidden[0]}"  # an unmet requirement
        else:
            clocks[node.name] = _server(time, info)
    if found and not clocks:
        raise RedisUnavailable(f"Redis {problem}")
    return clocks


def _server(time: tuple[int, int], info: Mapping[str, Any]) -> ServerTime:
    # redis-py converts an id of digits only, such as 40 zeros, to a number.
    ids = (str(info[name]).zfill(40) for name in _IDS)
    return ServerTime(time[0] * 1000 + time[1] // 1000, ":".join(ids))
