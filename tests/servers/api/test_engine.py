"""A pod that meets the parts of another engine, on a real Redis and a real Kafka."""

import asyncio
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
from aiokafka import AIOKafkaConsumer, OffsetAndMetadata, TopicPartition
from redis.asyncio import Redis

from dev.services import Addresses, ApiServer
from dev.stack.ports import free_port
from dev.stack.servers import KafkaServer, RedisServer
from flashsale import events, keys
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale.reservations import OutboxEntry, Record, Snapshot, State
from flashsale.settings import KafkaSettings
from flashsale_api.engine import Engine, GroupOwner, OwnerUnknown
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher
from flashsale_api.sweeper import Sweeper
from tests.support.eventually import until
from tests.support.inventory import a_sale, opened
from tests.support.redis_users import API, url_of
from tests.support.topics import create_topic

OWN = "11111111-1111-1111-1111-111111111111"
OTHER = "22222222-2222-2222-2222-222222222222"


@pytest.fixture
def name() -> str:
    return f"shop-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def new_api(
    redis_server: RedisServer, kafka_server: KafkaServer, name: str, tmp_path: Path
) -> Iterator[Callable[[], ApiServer]]:
    """Starts API processes of the engine `name`."""
    started: list[ApiServer] = []

    def start() -> ApiServer:
        addresses = Addresses(url_of(redis_server, API), kafka_server.bootstrap, "", name)
        api = ApiServer(tmp_path / f"api-{len(started)}", addresses)
        started.append(api)
        api.start()
        return api

    yield start
    for api in started:
        api.kill()


@pytest.fixture
async def published(
    kafka_server: KafkaServer, name: str
) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Returns the number of published events. The consumers' group is of the other engine."""
    topic = events.topic(name)
    await create_topic(kafka_server.bootstrap, topic, 1)
    partition = TopicPartition(topic, 0)
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka_server.bootstrap,
        group_id=events.consumer_group(name),
        enable_auto_commit=False,  # it would commit without metadata
    )
    await consumer.start()
    consumer.assign([partition])
    await consumer.commit({partition: OffsetAndMetadata(0, events.owner_metadata(OTHER))})

    async def count() -> int:
        ends: dict[TopicPartition, int] = await consumer.end_offsets([partition])
        return ends[partition]

    yield count
    await consumer.stop()


async def reserve(api: ApiServer, item: str) -> tuple[int, str]:
    body = {"userId": f"u-{uuid.uuid4()}", "itemId": item, "quantity": 1}
    async with httpx.AsyncClient(base_url=api.url) as http:
        answer = await http.post("/reserve", json=body)
    return answer.status_code, str(answer.json().get("type", "")).rpartition(":")[2]


async def ready(api: ApiServer) -> tuple[int, str]:
    async with httpx.AsyncClient(base_url=api.url) as http:
        answer = await http.get("/readyz")
    return answer.status_code, answer.text


async def test_a_redis_that_changes_its_engine_stops_the_pod_until_it_is_back(
    redis: Redis, name: str, item: str, new_api: Callable[[], ApiServer]
) -> None:
    inventory = Inventory(redis, name)
    await inventory.index.claim(OWN)
    await opened(inventory, a_sale(item))
    api = new_api()
    assert await reserve(api, item) == (202, "")
    await redis.set(keys.engine_id(name), OTHER)

    async def refused() -> bool:
        return await reserve(api, item) == (503, "other-engine")

    await until(refused, "the pod refuses")
    status, sentence = await ready(api)
    assert (status, OWN in sentence, OTHER in sentence) == (503, True, True)
    await redis.set(keys.engine_id(name), OWN)

    async def accepted() -> bool:
        return await reserve(api, item) == (202, "")

    await until(accepted, "the pod accepts again")
    assert (await ready(api))[0] == 200


async def test_a_redis_that_lost_all_keys_makes_no_sale_unknown(
    redis: Redis, name: str, item: str
) -> None:
    """The heartbeat saw the engine's id before the loss, and the first sweep is after it."""
    inventory, engine = Inventory(redis, name), Engine(name)
    outbox = Outbox(redis, name)
    kafka = KafkaSettings(kafka_bootstrap=f"127.0.0.1:{free_port()}", engine=name)
    publisher = Publisher(kafka, outbox, Metrics(), engine)
    sweeper = Sweeper(inventory, outbox, publisher, Metrics(), known=engine.items, pod_id="pod")
    await inventory.index.claim(OWN)
    await opened(inventory, a_sale(item))
    engine.found_in_redis(await inventory.index.engine_id())
    await redis.delete(keys.engine_id(name), keys.items(name), *keys.ItemKeys.of(item, name).sold)
    await sweeper.sweep()
    assert engine.may_have_lost(item)
    # The operator claims Redis after it has added all items.
    await inventory.index.add([item])
    await inventory.index.claim(OWN)
    await sweeper.sweep()
    assert engine.may_have_lost(item)
    assert not engine.may_have_lost(f"{item}-unknown")


async def test_a_new_pod_takes_no_sale_for_unknown_that_an_older_copy_of_redis_lacks(
    own_redis: RedisServer, own_inventory: Inventory, item: str, tmp_path: Path
) -> None:
    """The copy has the engine's id, but its index lacks the sale."""
    files, copy = own_redis.data / "appendonlydir", tmp_path / "copy"
    engine_id = await own_inventory.index.engine_id()
    await asyncio.to_thread(own_redis.stop)
    shutil.copytree(files, copy)
    await asyncio.to_thread(own_redis.start)
    await opened(own_inventory, a_sale(item))
    await own_inventory.index.add([item])
    await asyncio.to_thread(own_redis.stop)
    shutil.rmtree(files)
    shutil.copytree(copy, files)
    await asyncio.to_thread(own_redis.start)
    with ApiServer(
        tmp_path / "api", Addresses(own_redis.url, f"127.0.0.1:{free_port()}", "")
    ) as api:
        assert await reserve(api, item) == (503, "fenced")
        await own_inventory.index.claim(engine_id, [item])  # as the next resync does

        async def known() -> bool:
            return await reserve(api, f"{item}-unknown") == (404, "unknown-item")

        await until(known, "the index is complete again")
        assert await reserve(api, item) == (503, "fenced")
        api.kill()


async def test_an_outage_of_kafka_does_not_end_a_conflict(
    kafka_server: KafkaServer, name: str
) -> None:
    engine = Engine(name)
    engine.found_in_redis(OWN)
    engine.found_in_kafka(OTHER)
    away = KafkaSettings(kafka_bootstrap=f"127.0.0.1:{free_port()}", engine=name)
    with pytest.raises(OwnerUnknown):
        await GroupOwner(away).read()
    assert OTHER in engine.conflict
    there = KafkaSettings(kafka_bootstrap=kafka_server.bootstrap, engine=name)

    async def unowned() -> bool:
        engine.found_in_kafka(await GroupOwner(there).read())
        return engine.conflict == ""

    # A new Kafka has no group coordinator for a moment.
    await until(unowned, "the group has no owner", ignoring=(OwnerUnknown,))


async def test_a_pod_publishes_nothing_for_the_consumers_of_another_engine(
    redis: Redis,
    name: str,
    item: str,
    new_api: Callable[[], ApiServer],
    published: Callable[[], Awaitable[int]],
) -> None:
    api = new_api()
    inventory = Inventory(redis, name)
    await inventory.index.claim(OWN)
    await opened(inventory, a_sale(item))

    async def refused() -> bool:
        return (await ready(api))[0] == 503 and "consumer group" in (await ready(api))[1]

    await until(refused, "the pod is not ready")
    assert await reserve(api, item) == (503, "other-engine")
    assert await published() == 0


async def test_the_first_event_of_a_pod_waits_until_the_owner_of_the_group_is_known(
    redis: Redis,
    kafka_server: KafkaServer,
    name: str,
    published: Callable[[], Awaitable[int]],
) -> None:
    """The consumers of the other engine would not record it, and its entry would be deleted."""
    engine = Engine(name)
    engine.found_in_redis(OWN)
    kafka = KafkaSettings(kafka_bootstrap=kafka_server.bootstrap, engine=name)
    publisher = Publisher(kafka, Outbox(redis, name), Metrics(), engine)
    record, snapshot = Record(State.CONFIRMED, 1, 1, 1, "ann", ""), Snapshot("s", 9, 9, 1)
    publisher.add(OutboxEntry("phone", "1-1", str(uuid.uuid4()), record, snapshot, ""))
    running = asyncio.create_task(publisher.run())
    await until(lambda: engine.conflict)
    assert publisher.unacknowledged == 1
    assert await published() == 0
    running.cancel()
    await asyncio.wait([running])


async def test_a_pod_whose_redis_changes_its_engine_sweeps_nothing(redis: Redis, name: str) -> None:
    """Until the publisher notices the conflict, it is still connected to the former Kafka."""
    engine = Engine(name)
    engine.found_in_redis(OWN)
    kafka = KafkaSettings(kafka_bootstrap="127.0.0.1:1", engine=name)
    publisher = Publisher(kafka, Outbox(redis, name), Metrics(), engine)
    publisher.connected = True
    assert publisher.sweepable
    engine.found_in_redis(OTHER)
    assert not publisher.sweepable
