"""Real Redis, wiped for each test, and a ledger of each test's own."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import asyncpg
import pytest
from redis.asyncio import Redis

from dev.stack.servers import RedisServer
from flashsale import events, ledger, redis_client
from flashsale.inventory import Inventory
from flashsale.ledger import SaleRow
from flashsale.outbox import Outbox
from flashsale.reservations import Answer, BatchReply, Outcome, Request
from flashsale.sale import Sale, SaleSpec
from flashsale_operator.sales.drain import Barrier, Patience
from flashsale_operator.sales.offsets import Span
from flashsale_operator.sales.rebuild import Rebuild
from flashsale_operator.sales.reconciler import Report, Steward

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
QUICK = Patience(seeding=0.05, unseen=0.05, quiet=0.3, recorded=0.3, between=0.01)


@dataclass
class Shop:
    """A steward and what a crowd, a publisher and a consumer do around it, without Kafka."""

    redis: "Redis"
    pool: Pool
    topic: dict[int, Span] = field(default_factory=dict)
    patience: Patience = QUICK

    def __post_init__(self) -> None:
        self.inventory = Inventory(self.redis)
        self.outbox = Outbox(self.redis)
        self.barrier = Barrier(self.redis, self.pool, self.spans, patience=self.patience)
        rebuild = Rebuild(self.redis, self.pool, self.barrier)
        self.steward = Steward(self.inventory, self.pool, rebuild.rebuild)

    async def spans(self) -> Mapping[int, Span]:
        return self.topic

    async def apply(self, spec: SaleSpec) -> Report:
        return await self.steward.reconcile(spec)

    async def sale(self, item_id: str) -> Sale | None:
        return (await self.inventory.sales([item_id])).get(item_id)

    async def row(self, sale_id: str) -> SaleRow:
        row = await ledger.sale(self.pool, sale_id)
        assert row is not None
        return row

    async def buy(self, item_id: str, *users: str) -> list[Outcome]:
        """One unit for each of the users, in one call."""
        return [answer.outcome for answer in await self.send(item_id, [_one(u) for u in users])]

    async def send(self, item_id: str, requests: Sequence[Request]) -> list[Answer]:
        reply = await self.inventory.reserve(item_id, requests, timeout_seconds=5)
        if isinstance(reply, BatchReply):
            return list(reply.answers)
        return [Answer(reply)] * len(requests)

    async def record(self, item_id: str, *, lose: int = 0) -> None:
        """Takes the outbox to the ledger, but for `lose` of its events."""
        entries = await self.outbox.page(item_id, until_ms=2**50, count=10_000)
        for number, entry in enumerate(entries):
            sale_id, record = entry.snapshot.sale_id, entry.record
            if number < lose:
                continue
            async with self.pool.acquire() as connection, connection.transaction():
                await connection.execute(
                    "INSERT INTO reservations (sale_id, reservation_id, user_id, quantity, state, "
                    "version, occurred_at) VALUES ($1, $2, $3, $4, 'accepted', 1, now())",
                    *(sale_id, entry.reservation_id, record.user_id, record.quantity),
                )
                await connection.execute(
                    "UPDATE sales SET accepted = accepted + $2 WHERE sale_id = $1",
                    *(sale_id, record.quantity),
                )
        await self.outbox.settle(item_id, [(e.entry_id, e.reservation_id) for e in entries])

    async def read_to(self, partition: int, next_offset: int) -> None:
        await self.pool.execute(
            "INSERT INTO kafka_offsets VALUES ($1, $2, $3) "
            "ON CONFLICT (topic, partition) DO UPDATE SET next_offset = $3",
            *(events.TOPIC, partition, next_offset),
        )


def _one(user: str) -> Request:
    return Request(str(uuid.uuid4()), user, 1)


@pytest.fixture
def spec(item: str) -> SaleSpec:
    return SaleSpec(f"default/{item}", item, 10)


@pytest.fixture
def other(spec: SaleSpec) -> SaleSpec:
    """Another sale of the same item."""
    return replace(spec, sale_id=f"{spec.sale_id}-2", stock=5)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One of these tests' own: they wipe it, and listen for API pods that beat in it."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator["Redis"]:
    client = redis_client.connect(redis_server.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def shop(redis: "Redis", pool: Pool) -> Shop:
    return Shop(redis, pool)


@pytest.fixture
async def sold(shop: Shop, spec: SaleSpec) -> SaleSpec:
    """A sale of ten with three units sold and recorded."""
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id)
    return spec


@pytest.fixture
def within(
    redis_server: RedisServer, database_url: str
) -> Callable[[Callable[[Shop], Awaitable[None]]], None]:
    """Does something in a shop on `database_url`, from a test without an event loop."""

    async def run(does: Callable[[Shop], Awaitable[None]]) -> None:
        redis, pool = redis_client.connect(redis_server.url), await ledger.connect(database_url)
        try:
            await does(Shop(redis, pool))
        finally:
            await pool.close()
            await redis.aclose()

    return lambda does: asyncio.run(run(does))
