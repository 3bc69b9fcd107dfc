"""The engine on a Redis Cluster: a fault of one node concerns its own sales only."""

import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dev.crowd import Client
from dev.journal import Attempt, Journal
from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.servers import KafkaServer, RedisCluster, RedisServer
from dev.verdict import judge, quiet
from flashsale import keys, redis_client
from flashsale.errors import RedisUnavailable
from flashsale.inventory import Inventory
from tests.support.engine import flashsalectl, manifest
from tests.support.eventually import until
from tests.support.inventory import a_request

pytestmark = pytest.mark.slow

STOCK = 100_000


@pytest.fixture(autouse=True)
def everything_runs() -> None:
    """These tests start an engine of their own."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with RedisCluster(tmp_path_factory.mktemp("cluster"), replicas=1) as started:
        yield started


@dataclass(frozen=True)
class Scene:
    """An engine on the cluster, with an item on each of two nodes."""

    cluster: RedisCluster
    addresses: Addresses
    api: ApiServer
    inventory: Inventory
    lost: str
    other: str

    def primary(self) -> RedisServer:
        """Return the server of the item `lost`."""
        port = int(self.inventory.node_of(self.lost).rpartition(":")[2])
        [found] = [server for server in self.cluster.servers if server.port == port]
        return found

    async def rebuilt(self) -> bool:
        done = await flashsalectl(self.addresses, "rebuild", self.lost)
        return done.returncode == 0

    async def replaced(self, before: str) -> bool:
        await self.inventory.reserve(self.lost, [a_request()], timeout_seconds=1)
        return self.inventory.node_of(self.lost) != before

    @asynccontextmanager
    async def buyers(self, item: str, *, tries: int = 1) -> AsyncIterator[Journal]:
        """Send one request after the other during the body. The journal is complete afterwards."""
        journal, stopped = Journal(), asyncio.Event()

        def attempts() -> Iterator[Attempt]:
            for number in itertools.count():
                if stopped.is_set():
                    return
                body: dict[str, object] = {
                    "userId": f"user-{number}",
                    "itemId": item,
                    "quantity": 1,
                }
                yield Attempt(f"user-{number}", body, f"key-{number}")

        async def buy() -> None:
            client = Client(self.api.url)
            await client.open()
            for attempt in attempts():
                for _ in range(tries):
                    entry = await client.send(attempt)
                    journal.entries.append(entry)
                    if entry.status not in (0, 503):
                        break
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.02)
            client.close()

        buying = asyncio.create_task(buy())
        try:
            await until(lambda: len(journal.entries) >= 20)
            yield journal
            sold = len(journal.entries)
            await until(lambda: len(journal.entries) >= sold + 20)
        finally:
            stopped.set()
            await buying


@pytest.fixture
async def scene(
    tmp_path: Path, cluster: RedisCluster, kafka_server: KafkaServer, database_url: str
) -> AsyncIterator[Scene]:
    engine = f"cluster-{uuid.uuid4().hex[:8]}"
    addresses = Addresses(cluster.url, kafka_server.bootstrap, database_url, engine)
    client = redis_client.connect(cluster.url)
    inventory = Inventory(client, engine)
    await inventory.nodes.all()
    by_node: dict[str, str] = {}
    for number in itertools.count():
        item = f"item-{number}"
        by_node.setdefault(inventory.node_of(item), item)
        if len(by_node) == 2:
            break
    lost, other = by_node.values()
    consumer = ConsumerServer(tmp_path / "consumer", addresses)
    api = ApiServer(tmp_path / "api", addresses)
    with consumer, api:
        for item in (lost, other):
            text = manifest(item, stock=STOCK)
            done = await flashsalectl(addresses, "apply", "-f", "-", stdin=text)
            assert done.returncode == 0, done.stderr
        yield Scene(cluster, addresses, api, inventory, lost, other)
    await client.aclose()


async def check(scene: Scene, journals: dict[str, Journal]) -> None:
    """Compare the promises with the ledger, and every store with the others."""
    await quiet(scene.addresses, list(journals))
    for item, journal in journals.items():
        verdict, _ = await judge(scene.addresses, f"default/{item}", journal)
        assert verdict.kept, verdict
    audit = await flashsalectl(scene.addresses, "audit")
    assert audit.returncode == 0, audit.stdout + audit.stderr


async def test_flashsalectl_answers_for_the_other_sales_while_a_node_is_away(
    redis_cluster: RedisCluster, kafka_server: KafkaServer, database_url: str
) -> None:
    engine = f"cluster-{uuid.uuid4().hex[:8]}"
    client = redis_client.connect(redis_cluster.url)
    inventory = Inventory(client, engine)
    await inventory.nodes.all()
    name = inventory.nodes.name_of(keys.items(engine))
    lost, other = (
        next(
            item
            for item in map("item-{}".format, itertools.count())
            if (inventory.node_of(item) == name) is with_index
        )
        for with_index in (True, False)
    )
    await client.aclose()
    [server] = [each for each in redis_cluster.servers if name.endswith(f":{each.port}")]
    address = next(each.url for each in redis_cluster.servers if each is not server)
    addresses = Addresses(address, kafka_server.bootstrap, database_url, engine)
    for item in (lost, other):
        done = await flashsalectl(addresses, "apply", "-f", "-", stdin=manifest(item, stock=100))
        assert done.returncode == 0, done.stderr
    server.kill()
    try:
        said = f"flashsalectl: no node of Redis answers for {lost}: see flashsalectl doctor\n"
        got = await flashsalectl(addresses, "get", "-o", "json")
        sales = {sale["itemId"]: sale for sale in json.loads(got.stdout)}
        assert (got.returncode, got.stderr) == (1, said)
        assert (sales[lost]["state"], sales[lost]["accepted"]) == ("Unknown", None)
        assert (sales[other]["state"], sales[other]["accepted"]) == ("Selling", 0)
        audited = await flashsalectl(addresses, "audit")
        assert (audited.returncode, audited.stderr) == (1, said)
        assert [line.split()[1:] for line in audited.stdout.splitlines()[1:]] == [
            [other, "Selling", "100", "0", "0", "0", "0", "0", "ok"]
        ]
        rebuilt = await flashsalectl(addresses, "rebuild", "--all")
        assert (rebuilt.returncode, rebuilt.stderr) == (1, said)
        one = await flashsalectl(addresses, "get", lost)
        assert one.returncode == 1
        assert one.stderr.startswith("flashsalectl: Redis is unavailable: ")
        examined = await flashsalectl(addresses, "doctor")
        assert examined.returncode == 1
        assert f"{name} does not answer" in examined.stdout
    finally:
        server.start()


@pytest.mark.parametrize("fault", ["killed", "frozen"])
async def test_a_failover_keeps_every_promise_and_stops_no_other_sale(
    scene: Scene, fault: str
) -> None:
    primary, before = scene.primary(), scene.inventory.node_of(scene.lost)
    async with (
        scene.buyers(scene.other) as others,
        scene.buyers(scene.lost, tries=1_000) as losing,
    ):
        if fault == "killed":
            primary.kill()
        else:
            primary.pause()
        await until(lambda: scene.replaced(before), ignoring=(RedisUnavailable,))
        if fault == "killed":
            await asyncio.to_thread(primary.start)
        else:
            primary.resume()
        await until(scene.rebuilt, pause=0.5)
    assert {entry.status for entry in others.entries} == {202}
    refused = {entry.outcome for entry in losing.entries if entry.status == 503}
    assert refused <= {"redis-unavailable", "outcome-unknown", "fenced"}, refused
    assert "fenced" in refused
    await check(scene, {scene.lost: losing, scene.other: others})
