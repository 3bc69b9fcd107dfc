"""The heartbeat of a pod whose event loop is busy, or knows more of a cluster. Needs Redis."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest
from redis.asyncio import Redis

from dev.stack.servers import RedisCluster, RedisServer
from flashsale import heartbeat as contract
from flashsale import redis_client
from flashsale.clocks import ServerTime
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale.requirements import SLOTS
from flashsale.settings import KafkaSettings
from flashsale_api.engine import Engine
from flashsale_api.heartbeat import Heartbeat, Pulse
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher
from tests.support import redis_users
from tests.support.eventually import until
from tests.support.redis_clusters import refused_by_one

TURN_SECONDS = 0.1
"""A turn of the event loop with thousands of busy connections."""


@contextlib.asynccontextmanager
async def beating(
    url: str, inventory: Inventory, pulse: Pulse, called: Sequence[str] = ()
) -> AsyncIterator[None]:
    """Send heartbeats of a pod that has called some items. They close the inventory."""
    engine, metrics, of_pod = Engine("e"), Metrics(), redis_client.connect(url)
    heartbeat = Heartbeat(
        "pod",
        inventory,
        called_items=lambda: called,
        publisher=Publisher(
            KafkaSettings(kafka_bootstrap="127.0.0.1:1"), Outbox(of_pod), metrics, engine
        ),
        engine=engine,
        metrics=metrics,
        pulse=pulse,
    )
    running = asyncio.create_task(heartbeat.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await of_pod.aclose()


async def test_a_heartbeat_waits_for_few_turns_of_the_pods_loop(redis_server: RedisServer) -> None:
    url = redis_users.url_of(redis_server, redis_users.API)
    inventory = Inventory(redis_client.connect(url))
    pulse, turns = Pulse(inventory), 0
    async with beating(url, inventory, pulse):
        while not pulse.begun:
            time.sleep(TURN_SECONDS)  # noqa: ASYNC251 - nothing else may run in this loop
            await asyncio.sleep(0)
            turns += 1
    # A heartbeat in the pod's own loop takes more than 80 turns.
    assert turns < 40


async def test_a_heartbeat_is_as_old_as_its_sample(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rebuild does not wait for events that a heartbeat after the fence has not counted."""
    url = redis_users.url_of(redis_server, redis_users.API)
    inventory = Inventory(redis_client.connect(url))
    clocks, beat = inventory.clocks, contract.beat
    called: list[str] = []
    began: list[float] = []
    counted: list[Mapping[str, int]] = []
    noted: list[float] = []

    async def read_clocks_before_a_call() -> dict[str, ServerTime]:
        began.append(asyncio.get_running_loop().time())
        sampled = await clocks()
        called.append("phone")
        await asyncio.sleep(0.01)
        return sampled

    async def look_and_beat(
        redis: Redis,
        pod_id: str,
        unacknowledged: Mapping[str, int],
        sampled: Mapping[str, ServerTime],
        engine: str,
    ) -> contract.Sent:
        counted.append(unacknowledged)
        return await beat(redis, pod_id, unacknowledged, sampled, engine)

    def note(sent: contract.Sent, sampled: float) -> None:
        noted.append(sampled)
        Pulse.sent(pulse, sent, sampled)

    pulse = Pulse(inventory)
    monkeypatch.setattr(inventory, "clocks", read_clocks_before_a_call)
    monkeypatch.setattr(contract, "beat", look_and_beat)
    monkeypatch.setattr(pulse, "sent", note)
    async with beating(url, inventory, pulse, called):
        await until(lambda: pulse.begun)
    assert counted[0] == {"phone": 0}
    # The pod does not believe in its heartbeat for longer than a rebuild does.
    assert noted[0] <= began[0]


async def test_a_heartbeat_meets_a_primary_that_only_the_pods_loop_knows(
    redis_cluster: RedisCluster,
) -> None:
    of_pod, own = (Inventory(redis_client.connect(redis_cluster.url)) for _ in range(2))
    await of_pod.nodes.all()
    await own.nodes.all()
    new = next(name for name in own.nodes._primaries if name != of_pod.node_of("phone"))
    item = next(each for each in map(str, range(100)) if of_pod.node_of(each) == new)
    former = own.nodes._primaries[of_pod.node_of("phone")]
    lost = own.nodes._primaries.pop(new)
    own.nodes._owners = [former if each is lost else each for each in own.nodes._owners]
    pulse = Pulse(of_pod)
    async with beating(redis_cluster.url, own, pulse):
        await until(lambda: pulse.refusal(item) is None)
    await of_pod.redis.aclose()


async def test_the_pods_loop_meets_a_primary_that_only_the_heartbeat_knows(
    redis_cluster: RedisCluster,
) -> None:
    """All slots of a primary have moved, while no request came that would get a MOVED."""
    of_pod, own = (Inventory(redis_client.connect(redis_cluster.url)) for _ in range(2))
    await of_pod.nodes.all()
    of_pod.nodes._owners = [of_pod.nodes._primary("127.0.0.1", 1)] * SLOTS
    pulse = Pulse(of_pod)
    async with beating(redis_cluster.url, own, pulse):
        await until(lambda: pulse.refusal("phone") is None)
    await of_pod.redis.aclose()


@pytest.mark.parametrize("late", [0, 1])
async def test_the_pod_and_its_heartbeat_both_notice_that_the_server_became_a_cluster(
    redis_cluster: RedisCluster, late: int
) -> None:
    of_pod, own = found = [Inventory(redis_client.connect(redis_cluster.url)) for _ in range(2)]
    found[late].nodes.single = found[late].nodes._seed
    if late:
        await of_pod.nodes.all()
    pulse = Pulse(of_pod)
    async with beating(redis_cluster.url, own, pulse):
        # Of four items, at most one or two are on the node of the address.
        items = list(map(str, range(4)))
        await until(lambda: all(pulse.refusal(item) is None for item in items))
        assert all(map(of_pod.node_of, items))
    await of_pod.redis.aclose()


async def test_a_primary_without_a_heartbeat_is_logged_once_with_the_cause(
    redis_cluster: RedisCluster,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pod is ready and never calls the primary, so no other line names the cause."""
    with refused_by_one(redis_cluster) as (url, name):
        inventory = Inventory(redis_client.connect(url))
        beats: list[contract.Sent] = []
        pulse = Pulse(inventory)
        note = pulse.sent

        def sent(beat: contract.Sent, sampled: float) -> None:
            beats.append(beat)
            note(beat, sampled)

        monkeypatch.setattr(pulse, "sent", sent)
        async with beating(url, inventory, pulse):
            await until(lambda: len(beats) > 2)
    assert not any(name in beat.servers for beat in beats)
    started = f"cannot send a heartbeat to {name}: "
    # On a busy machine, another primary can be late.
    [line] = [text for text in map(logging.LogRecord.getMessage, caplog.records) if started in text]
    assert "invalid username-password pair" in line
