"""Compares a Redis Cluster with one node. Each primary has a replica, on both sides.

`python -m bench.cluster` measures only this, and prints the result as JSON. With `--calls` it
measures only the script calls of equal size.
"""

import argparse
import asyncio
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from bench import machine
from bench.requests import OPEN_CONNECTIONS, QUICK, WHOLE, Scale, in_turn
from bench.results import Calls, Cluster
from bench.rig import QUIET_SECONDS, Api, Rig
from bench.scripts import IN_FLIGHT, buyers
from dev.paths import LOCAL
from dev.progress import ending_quietly
from dev.stack.redis import RedisServer
from dev.stack.redis_cluster import RedisCluster
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Outbox
from flashsale.sale import SaleSpec

SALES: Final = 12
RATE: Final = 4_000.0
"""Requests per second. At the same rate, batches are about as large on both sides."""
ONE, THREE, THIRD = "one node", "three nodes", "one node, a third of the load"
SINGLE, NODE = "a single server", "a node of a cluster"
REQUESTS: Final = {1: 2_000, 8: 8_000, 64: 16_000}
"""Requests of each kind in a round of script calls, by their number per call."""


def cluster(scale: Scale, folder: Path, python: Path, run: str) -> Cluster:
    """Measure both sides in turns, each with an engine of its own. `run` describes the run."""
    primary, replica = _pair(folder)
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
    return Cluster(run, RATE, sales, rounds, calls(scale, folder / "calls", run))


def calls(scale: Scale, folder: Path, run: str) -> Calls:
    """Measures Redis' CPU per request in script calls of equal size. The two sides take turns."""
    primary, replica = _pair(folder)
    found: dict[str, dict[str, list[float]]] = {}
    with primary, replica, RedisCluster(folder / "nodes", replicas=1) as three:
        _wait_for_primary(replica)
        sides = [(SINGLE, primary.url), (NODE, three.url)]
        for number in range(2 * scale.rounds):
            for size, requests in REQUESTS.items():
                # The first of a pair alternates, so that a slower machine does not favour one.
                for side, url in sides if number % 2 else reversed(sides):
                    measured = asyncio.run(_calls(url, f"bench-{number}-{size}", size, requests))
                    for kind, spent in measured.items():
                        costs = found.setdefault(f"{kind}, {size} per call", {})
                        costs.setdefault(side, []).append(spent)
                    shown = ", ".join(f"{kind} {spent:.1f}" for kind, spent in measured.items())
                    print(
                        f"    round {number + 1}  {side}, {size} per call: {shown} us", flush=True
                    )
    return Calls(run, found)


async def _calls(url: str, item: str, size: int, requests: int) -> dict[str, float]:
    """Returns the CPU microseconds of the item's server per request, by the kind of request."""
    client = redis_client.connect(url)
    inventory, outbox = Inventory(client, outbox_limit=10**9), Outbox(client)
    await inventory.load()
    await outbox.load()
    node = await inventory.nodes.of(ItemKeys.of(item).sale)
    item_keys = ItemKeys.of(item).sold

    async def spent(send: Callable[[], Awaitable[object]]) -> float:
        """Returns the CPU time per request of `requests` requests, which `send` sends in calls."""
        left = iter(range(requests // size))

        async def caller() -> None:
            for _ in left:
                await send()

        before = await _cpu_us(node.redis)
        await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
        return (await _cpu_us(node.redis) - before) / requests

    async def reserve() -> None:
        await inventory.reserve(item, buyers(size), timeout_seconds=10)

    async def settle() -> None:
        await outbox.settle(item, [next(entries) for _ in range(size)])

    try:
        sale = SaleSpec(f"default/{item}", item, stock=requests)
        await inventory.apply(sale, 1, seed_until_ms=2**53)
        accepted = await spent(reserve)
        pages = (await outbox.page(item, until_ms=2**50, count=requests)).entries
        if len(pages) != requests:
            raise SystemExit(f"{item}: {len(pages)} of {requests} requests were accepted")
        entries = iter([(one.entry_id, one.reservation_id, one.record.version) for one in pages])
        settled = await spent(settle)
        return {"accepted": accepted, "settled": settled, "sold out": await spent(reserve)}
    finally:
        await node.redis.delete(*item_keys)
        await client.aclose()


async def _cpu_us(redis: "AsyncRedis") -> float:
    """Returns the CPU time of all threads of a server, in microseconds."""
    info = await redis.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"]) * 1e6


def _pair(folder: Path) -> tuple[RedisServer, RedisServer]:
    """Returns a server and its replica, which do not run yet."""
    primary = RedisServer(folder / "primary", options=("--repl-diskless-sync-delay", "0"))
    follow = ("--replicaof", f"127.0.0.1 {primary.port}")
    return primary, RedisServer(folder / "replica", options=follow)


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
    parser.add_argument("--calls", action="store_true", help="only the script calls of equal size")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else WHOLE
    folder = LOCAL / "bench"
    shutil.rmtree(folder, ignore_errors=True)
    found: Calls | Cluster
    if arguments.calls:
        found = calls(scale, folder, "")
    else:
        found = cluster(scale, folder, machine.python(), "")
    shutil.rmtree(folder)
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
