"""The requirements of a Redis Cluster, checked on a real primary that lacks them."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from dev.stack.servers import RedisCluster
from flashsale import redis_client, redis_facts, requirements
from flashsale.errors import RedisUnavailable, UnmetRequirement
from flashsale.inventory import Inventory
from flashsale.nodes import Nodes
from flashsale.requirements import Checks, ClusterFacts, RedisFacts, findings

GOOD = RedisFacts(
    "7.0.15",
    "noeviction",
    "0",
    appendonly=True,
    script_error="",
    node="redis-0:6379",
    cluster=ClusterFacts(requirements.SLOTS, {}, replicas=1),
)


@pytest.fixture
async def inventory(redis_cluster: RedisCluster) -> AsyncIterator[Inventory]:
    client = redis_client.connect(redis_cluster.url)
    yield Inventory(client)
    await client.aclose()


@pytest.fixture
async def last(redis_cluster: RedisCluster) -> AsyncIterator[Redis]:
    """A client of a primary that is not the address."""
    client = redis_client.connect(redis_cluster.servers[-1].url)
    yield client
    await client.aclose()


def named(redis_cluster: RedisCluster) -> str:
    return f"Redis Cluster at 127.0.0.1:{redis_cluster.servers[-1].port}"


async def test_a_cluster_of_the_stack_meets_all_requirements(inventory: Inventory) -> None:
    facts = await redis_facts.read(inventory.redis)
    assert len(facts) == 3
    found = findings(requirements.REDIS, *facts)
    assert {finding.verdict for finding in found} == {"ok"}, found


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("maxmemory-policy", "allkeys-lru"),
        ("repl-backlog-ttl", "3600"),
        ("cluster-node-timeout", "15000"),
        ("cluster-require-full-coverage", "yes"),
        ("cluster-allow-reads-when-down", "yes"),
    ],
)
async def test_a_setting_of_one_primary_that_endangers_sales_is_named(
    redis_cluster: RedisCluster, inventory: Inventory, last: Redis, setting: str, value: str
) -> None:
    before = str((await last.config_get(setting))[setting])
    await last.config_set(setting, value)
    try:
        facts = await redis_facts.read(inventory.redis)
    finally:
        await last.config_set(setting, before)
    with pytest.raises(UnmetRequirement) as unmet:
        Checks().require(requirements.REDIS, *facts)
    server = named(redis_cluster).removeprefix("Redis Cluster")
    assert f"{server} has {setting} {value}, but needs {setting}" in str(unmet.value)


async def test_a_primary_that_knows_no_owner_of_a_slot_is_named(
    redis_cluster: RedisCluster, inventory: Inventory, last: Redis
) -> None:
    slot = requirements.SLOTS - 1
    await last.cluster("DELSLOTS", slot)
    try:
        facts = await redis_facts.read(inventory.redis)
    finally:
        await last.cluster("ADDSLOTS", slot)
    with pytest.raises(UnmetRequirement) as unmet:
        Checks().require(requirements.REDIS, *facts)
    assert str(unmet.value).startswith(f"{named(redis_cluster)} has 16383 of 16384 slots")


async def test_a_user_without_info_is_a_mistake_that_ends_with_the_right(
    redis_cluster: RedisCluster,
) -> None:
    async def set_user(*rules: str) -> None:
        for server in redis_cluster.servers:
            async with Redis.from_url(server.url) as client:
                await cast("Any", client).execute_command("ACL", "SETUSER", "without", *rules)

    await set_user("on", ">secret", "~*", "+@all", "-info")
    # The key of the engine's id is on one of the nodes.
    for server in redis_cluster.servers:
        client = redis_client.connect(server.url.replace("//", "//without:secret@"))
        facts = await redis_facts.read(client)
        assert len(facts) == 3
        with pytest.raises(UnmetRequirement, match="has no INFO in scripts"):
            Checks().require(requirements.REDIS, *facts)
        await set_user("+info")
        Checks().require(requirements.REDIS, *await redis_facts.read(client))
        await set_user("-info")
        await client.aclose()


async def test_a_server_that_became_a_cluster_has_the_facts_of_a_cluster(
    redis_cluster: RedisCluster,
) -> None:
    for server in redis_cluster.servers:
        client = redis_client.connect(server.url)
        nodes = Nodes.of_client(client)
        nodes.single = nodes._seed
        # Only the node of the engine's id answers as one server does.
        if nodes.single and await refused(client):
            assert len(await redis_facts.read(client)) == 3
        await client.aclose()


async def refused(client: Redis) -> bool:
    try:
        await redis_facts.read(client)
    except RedisUnavailable:
        return True
    return False


def test_the_version_of_each_primary_counts() -> None:
    old = replace(GOOD, version="6.2.14", node="redis-2:6379")
    with pytest.raises(UnmetRequirement, match=r"Redis at redis-2:6379 has version 6\.2\.14"):
        Checks().require(requirements.REDIS, GOOD, old)


@pytest.mark.parametrize(
    ("replicas", "least", "verdict"),
    [
        (0, "0", "ok"),
        (1, "0", "ok"),
        (1, "1", "warning"),
        (2, "0", "warning"),
        (2, "1", "ok"),
        (2, "2", "warning"),
    ],
)
def test_the_number_of_replicas_to_write_follows_that_of_the_replicas(
    replicas: int, least: str, verdict: str
) -> None:
    facts = ClusterFacts(requirements.SLOTS, {"min-replicas-to-write": least}, replicas)
    found = findings(requirements.REDIS, replace(GOOD, cluster=facts))
    [finding] = [each for each in found if "min-replicas-to-write" in each.text]
    assert finding.verdict == verdict
