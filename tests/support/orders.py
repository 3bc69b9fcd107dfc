"""An API with an order port, on a real Redis and a real Kafka, and calls of its order service."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from aiokafka import AIOKafkaConsumer
from redis.asyncio import Redis

from dev.services import Addresses, ApiServer
from dev.stack.servers import KafkaServer, RedisServer
from flashsale import events
from flashsale.events import Event
from flashsale.inventory import Applied, Inventory
from flashsale.keys import ItemKeys
from flashsale.reservations import Record
from flashsale.sale import Sale, SaleSpec
from tests.support.api import claim, reserve, until_known
from tests.support.eventually import until
from tests.support.redis_users import API, url_of
from tests.support.topics import create_topic

TOKENS: Final = "first-" + "a" * 40, "second-" + "b" * 40
NewApi = Callable[..., ApiServer]


@pytest.fixture(scope="module")
def order_engine(redis_server: RedisServer, kafka_server: KafkaServer) -> Addresses:
    """The addresses of an engine whose topic exists."""
    name = f"shop-{uuid.uuid4().hex[:8]}"

    async def create() -> None:
        await create_topic(kafka_server.bootstrap, events.topic(name), 3)
        await claim(redis_server.url, name)

    asyncio.run(create())
    return Addresses(url_of(redis_server, API), kafka_server.bootstrap, "", name)


@pytest.fixture(scope="module")
def order_api(
    order_engine: Addresses, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiServer]:
    folder = tmp_path_factory.mktemp("orders")
    with ApiServer(folder, order_engine, order_tokens=",".join(TOKENS)) as server:
        until_known(server)
        yield server


@pytest.fixture
def new_order_api(order_engine: Addresses, tmp_path: Path) -> Iterator[NewApi]:
    """A function that starts another API of the engine, by default without an order port."""
    started: list[ApiServer] = []

    def start(tokens: str = "", **changes: Any) -> ApiServer:  # noqa: ANN401 - of Addresses
        addresses = replace(order_engine, **changes)
        server = ApiServer(tmp_path / f"api-{len(started)}", addresses, order_tokens=tokens)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.kill()


def order_client(api: ApiServer, token: str = TOKENS[0]) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.AsyncClient(base_url=api.orders_url, headers=headers, timeout=30)


@dataclass(frozen=True)
class Shop:
    """A shop with one sale: its buyers' and its order service's client, and its servers."""

    buyers: httpx.AsyncClient
    orders: httpx.AsyncClient
    inventory: Inventory
    redis: Redis
    kafka: KafkaServer
    api: ApiServer
    item: str

    async def open(self, units: int = 100, **changes: Any) -> SaleSpec:  # noqa: ANN401 - of SaleSpec
        spec = SaleSpec(f"default/{self.item}", self.item, units, max_per_user=100, hold_seconds=60)
        spec = replace(spec, **changes)
        assert await self.inventory.apply(spec, 1, seed_until_ms=2**53) is Applied.SEEDED
        return spec

    async def hold(self, user: str = "ann", quantity: int = 1) -> str:
        """Reserve, and return the path of the reservation."""
        answer = await reserve(self.buyers, self.item, user, quantity)
        assert answer.status_code == 202, answer.text
        return str(answer.headers["location"])

    async def call(
        self, path: str, verb: str, order_ref: str = "", sale_id: str = "", *, repeat: bool = True
    ) -> httpx.Response:
        """Confirm or cancel. Repeat the call while Kafka is late, as an order service must.

        Return the answer, which is 202 only without `repeat`.
        """
        named = {"orderRef": order_ref, "saleId": sale_id}
        body = {name: value for name, value in named.items() if value} or None

        async def answered() -> httpx.Response | None:
            answer = await self.orders.post(f"{path}/{verb}", json=body)
            return None if repeat and answer.status_code == 202 else answer

        return await until(answered, f"{verb} is acknowledged by Kafka")

    async def confirm(
        self, path: str, order_ref: str = "o1", *, repeat: bool = True
    ) -> httpx.Response:
        return await self.call(path, "confirm", order_ref, repeat=repeat)

    async def cancel(
        self, path: str, order_ref: str = "", *, repeat: bool = True
    ) -> httpx.Response:
        return await self.call(path, "cancel", order_ref, repeat=repeat)

    async def record(self, path: str) -> Record:
        _, record, _ = await self.inventory.look(self.item, identity(path))
        assert record is not None
        return record

    async def sale(self) -> Sale:
        return (await self.inventory.sales([self.item]))[self.item]

    async def make_due(self) -> None:
        """Let the time and the grace of all open holds be over."""
        key = self.keys.holds
        due = {str(member): 1 for member in await self.redis.zrange(key, 0, -1)}
        await self.redis.zadd(key, due, xx=True)

    async def expire(self, path: str) -> None:
        """Let a hold expire, and wait until its units are for sale again."""
        await self.redis.zadd(self.keys.holds, {identity(path): 1}, xx=True)
        await until(lambda: self._settled(path))

    async def _settled(self, path: str) -> bool:
        record = await self.record(path)
        return record.state == "expired" and not (await self.sale()).outbox_length

    async def settled(self) -> None:
        """Wait until Kafka has acknowledged every event."""

        async def empty() -> bool:
            return not (await self.sale()).outbox_length

        await until(empty)

    async def published(self, path: str) -> list[Event]:
        """Return the events of a reservation in the topic."""
        consumer = AIOKafkaConsumer(
            events.topic(self.inventory.engine),
            bootstrap_servers=self.kafka.bootstrap,
            auto_offset_reset="earliest",
        )
        await consumer.start()
        try:
            ends = await consumer.end_offsets(sorted(consumer.assignment()))
            found: list[Event] = []
            read = 0
            async with asyncio.timeout(30):
                while read < sum(ends.values()):
                    for page in (await consumer.getmany(timeout_ms=200)).values():
                        read += len(page)
                        found += [events.decode(record.value) for record in page]
        finally:
            await consumer.stop()
        return [event for event in found if event.reservation_id == identity(path)]

    @property
    def keys(self) -> ItemKeys:
        return ItemKeys.of(self.item, self.inventory.engine)


def identity(path: str) -> str:
    """Return the reservation's id in its path."""
    return path.rpartition("/")[2]


@pytest.fixture
async def shop(
    order_api: ApiServer,
    order_engine: Addresses,
    redis: Redis,
    kafka_server: KafkaServer,
    item: str,
) -> AsyncIterator[Shop]:
    inventory = Inventory(redis, order_engine.engine)
    async with (
        httpx.AsyncClient(base_url=order_api.url, timeout=30) as buyers,
        order_client(order_api) as orders,
    ):
        yield Shop(buyers, orders, inventory, redis, kafka_server, order_api, item)
