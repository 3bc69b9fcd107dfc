"""Compares a Redis Cluster with one node. Each primary has a replica, on both sides.

`python -m bench.cluster` measures only this, and prints the result as JSON.
"""

import argparse
import asyncio
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from redis import Redis

from bench import machine
from bench.requests import OPEN_CONNECTIONS, QUICK, WHOLE, Scale, in_turn
from bench.results import Cluster
from bench.rig import QUIET_SECONDS, Api, Rig
from dev.paths import LOCAL
from dev.stack.redis import RedisServer
from dev.stack.redis_cluster import RedisCluster
from flashsale import redis_client
from flashsale.inventory import Inventory

SALES: Final = 12
RATE: Final = 4_000
"""Requests per second. At the same rate, batches are about as large on both sides."""
ONE, THREE, THIRD = "one node", "three nodes", "one node, a third of the load"


def cluster(scale: Scale, folder: Path, python: Path, run: str) -> Cluster:
    """Measure both sides in turns, each with an engine of its own. `run` describes the run."""
    primary = RedisServer(folder / "primary", options=("--repl-diskless-sync-delay", "0"))
    replica = RedisServer(folder / "replica", options=("--replicaof", f"127.0.0.1 {primary.port}"))
    three = RedisCluster(folder / "nodes", replicas=1)
    with (
        _engine(Rig(folder / "one", python, [primary, replica]), 1) as (rig_of_one, api_of_one),
        _engine(Rig(folder / "three", python, three.servers), 3, three) as (rig, api),
    ):
        items, items_of_one = rig.sales(SALES), rig_of_one.sales(SALES)
        sales = asyncio.run(_on_each(three.servers[:3], items))
        shares = {
            ONE: (rig_of_one, api_of_one, items_of_one, RATE),
            THREE: (rig, api, items, RATE),
            THIRD: (rig_of_one, api_of_one, items_of_one[: SALES // 3], RATE / 3),
        }
        rounds = in_turn(
            {
                name: partial(one.round, [its_api], some, connections=OPEN_CONNECTIONS, rate=rate)
                for name, (one, its_api, some, rate) in shares.items()
            },
            scale,
        )
    return Cluster(run, RATE, sales, rounds)


@contextmanager
def _engine(
    rig: Rig, primaries: int, cluster: RedisCluster | None = None
) -> Iterator[tuple[Rig, Api]]:
    """Starts an engine, after the replicas are connected."""
    servers = rig.redis_servers
    with rig:
        if cluster:
            cluster.form()
        for replica in servers[primaries:]:
            _wait_for_primary(replica)
        rig.parts_of_redis = {
            "Redis": servers[:primaries],
            "replicas": servers[primaries:],
            **{f"node {number}": [one] for number, one in enumerate(servers[:primaries], 1)},
        }
        rig.consumer(rig.cores.rest).stop()  # creates the topics and the ledger
        yield rig, rig.api()


def _wait_for_primary(replica: RedisServer) -> None:
    deadline = time.monotonic() + QUIET_SECONDS
    with Redis.from_url(replica.url) as client:
        while client.info("replication").get("master_link_status") != "up":
            if time.monotonic() > deadline:
                raise SystemExit(f"{replica.log}: the replica did not find its primary")
            time.sleep(0.05)


async def _on_each(nodes: Sequence[RedisServer], items: Sequence[str]) -> list[int]:
    """Returns how many of the items each node has."""
    client = redis_client.connect(nodes[0].url)
    try:
        inventory = Inventory(client)
        await inventory.load()
        names = [inventory.node_of(item) for item in items]
    finally:
        await client.aclose()
    return [names.count(f"127.0.0.1:{node.port}") for node in nodes]


def main() -> None:
    """Measure only the cluster."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run one short round")
    scale = QUICK if parser.parse_args().quick else WHOLE
    folder = LOCAL / "bench"
    shutil.rmtree(folder, ignore_errors=True)
    found = cluster(scale, folder, machine.python(), "")
    shutil.rmtree(folder)
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
