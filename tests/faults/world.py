"""The whole engine on real servers, with two APIs and two consumers, and its faults."""

import asyncio
import contextlib
import json
import random
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from dev.cluster.control_plane import ControlPlane
from dev.issuer import Issuer
from dev.services import Addresses, ApiServer, ConsumerServer, OperatorServer
from dev.stack.process import Server
from dev.stack.servers import KafkaServer, PostgresServer
from flashsale import events, heartbeat
from flashsale.sale import rfc3339_of_ms
from tests.faults.crowd import Crowd
from tests.faults.redis_alone import RedisAlone
from tests.faults.redis_pair import RedisPair
from tests.faults.redis_shards import RedisShards
from tests.faults.schedule import LOSES_IN_REDIS, Kind, Redis, Schedule, Step
from tests.support.manifests import flash_sale
from tests.support.paths import CRD
from tests.support.proxy import Proxy
from tests.support.redis_users import of_api

NAMESPACE: Final = "default"
TOKEN: Final = "a-token-of-the-order-service-of-the-faults"
# The default of an hour would keep too many closed sales in a run of many seeds.
KEEP_CLOSED_SECONDS: Final = "20"
LONG_FREEZE_SECONDS: Final = heartbeat.EXPIRY_SECONDS - 1.5 * heartbeat.INTERVAL_SECONDS
"""A pod that is frozen for longer can count as dead, because its heartbeat expires."""


@dataclass
class History:
    """The faults so far, as (begin, end) in Unix seconds.

    `killed` has the index of the killed API first. `orphaned` also has APIs that were unreachable
    for longer than the life of a heartbeat.
    """

    lost_in_redis: list[tuple[float, float]] = field(default_factory=list)
    killed: list[tuple[int, float, float]] = field(default_factory=list)
    orphaned: list[tuple[int, float, float]] = field(default_factory=list)
    without_kafka: list[tuple[float, float]] = field(default_factory=list)
    deleted: list[float] = field(default_factory=list)
    """When the FlashSale was deleted."""


@dataclass
class Sale:
    """The FlashSale as it is declared now. `highest_stock` is the highest stock so far."""

    item: str
    max_per_user: int
    stock: int
    highest_stock: int
    hold_seconds: int | None = None
    paused: bool = False
    ends_ms: int | None = None
    declared_at: float = field(default_factory=time.time)

    @property
    def sale_id(self) -> str:
        return f"{NAMESPACE}/{self.item}"

    def manifest(self) -> str:
        sale = flash_sale(
            self.item,
            namespace=NAMESPACE,
            stock=self.stock,
            maxPerUser=self.max_per_user,
            paused=self.paused,
        )
        if self.hold_seconds is not None:
            sale["spec"]["holdSeconds"] = self.hold_seconds
        if self.ends_ms is not None:
            sale["spec"]["endsAt"] = rfc3339_of_ms(self.ends_ms)
        return json.dumps(sale)


@dataclass
class World:
    """All running processes. If `tokens`, the APIs take the buyers from the issuer's tokens."""

    redis: RedisPair
    kafka: KafkaServer
    kafka_proxy: Proxy
    postgres: PostgresServer
    postgres_proxy: Proxy
    apis: tuple[ApiServer, ApiServer]
    consumers: tuple[ConsumerServer, ConsumerServer]
    plane: ControlPlane
    operator: OperatorServer
    issuer: Issuer
    issuer_proxy: Proxy
    addresses: Addresses
    folder: Path
    tokens: bool = False
    history: History = field(default_factory=History)
    _locks: dict[object, asyncio.Lock] = field(default_factory=dict)

    async def prepare(self, schedule: Schedule, item: str) -> None:
        """Set up Redis and the APIs for a schedule with this item."""
        await self.redis.follow(item)
        await self.redis.set_durability(always=schedule.always)
        await self._take_buyers_from(tokens=schedule.tokens)

    async def _take_buyers_from(self, *, tokens: bool) -> None:
        """Restart the APIs if they take the buyers from elsewhere."""
        if tokens == self.tokens:
            return
        for api in self.apis:
            await asyncio.to_thread(api.stop)
        settings = {}
        if tokens:
            keys = f"http://127.0.0.1:{self.issuer_proxy.port}/jwks.json"
            settings = self.issuer.settings | {"FLASHSALE_JWKS_URL": keys}
        first, second = (_api(api.data, self.addresses, settings) for api in self.apis)
        self.apis, self.tokens = (first, second), tokens
        for api in self.apis:
            await asyncio.to_thread(api.start)

    async def inflict(self, schedule: Schedule, sale: Sale, crowd: Crowd) -> None:
        """Run each step of the schedule at its time, and return when all faults have ended.

        A step waits for an earlier step on the same server.
        """
        began = time.monotonic()

        async def one(step: Step) -> None:
            await asyncio.sleep(began + step.at - time.monotonic())
            async with self._locks.setdefault(self._subject(step), asyncio.Lock()):
                await self._do(step, sale, crowd)

        async with asyncio.TaskGroup() as steps:
            for step in schedule.steps:
                steps.create_task(one(step))

    async def apply(self, sale: Sale) -> None:
        """Run `kubectl apply`."""
        await asyncio.to_thread(
            self.plane.kubectl, "apply", "-f", "-", stdin=sale.manifest(), check=True
        )

    async def delete(self, sale: Sale) -> None:
        """Run `kubectl delete`. It does not wait until the sale is closed."""
        await asyncio.to_thread(
            self.plane.kubectl, "delete", "fs", sale.item, "--timeout=30s", check=True
        )

    def _subject(self, step: Step) -> object:
        """Return a key for the target of a step. A target has only one step at a time."""
        match step.kind.name.partition("_")[0]:
            case "API" | "CONSUMER" as kind:
                return kind, step.which
            case "RESTOCK" | "SHORTEN" | "PAUSE" | "DELETE" | "END":
                return "sale"
            case kind:
                return kind

    async def _do(self, step: Step, sale: Sale, crowd: Crowd) -> None:
        began = time.time()
        await self._doing(step, sale, crowd)
        span = began, time.time()
        promotes = not isinstance(self.redis, RedisAlone)
        if step.kind in LOSES_IN_REDIS or (step.kind is Kind.REDIS_FREEZE and promotes):
            # Sentinel can take a frozen server for dead.
            self.history.lost_in_redis.append(span)
        if step.kind in (Kind.REDIS_KILL, Kind.REDIS_RESTART) and step.seconds > 1 and promotes:
            self.history.lost_in_redis.append(span)  # a promoted replica can lag
        if step.kind is Kind.API_KILL:
            self.history.killed.append((step.which, *span))
        if step.kind is Kind.API_KILL or (
            step.kind is Kind.API_FREEZE and step.seconds >= LONG_FREEZE_SECONDS
        ):
            self.history.orphaned.append((step.which, *span))
        if step.kind.name.startswith("KAFKA_"):
            self.history.without_kafka.append(span)

    async def _doing(self, step: Step, sale: Sale, crowd: Crowd) -> None:
        subject, _, verb = step.kind.name.partition("_")
        match subject, verb:
            case (
                ("API" | "CONSUMER" | "OPERATOR" | "KAFKA" | "POSTGRES"),
                ("KILL" | "FREEZE" | "RESTART"),
            ):
                await _VERBS[verb](self._server(subject, step.which), step.seconds)
            case "REDIS", _:
                await self._do_to_redis(step)
            case "CUT", _:
                await self._cut(step)
            case "POSTGRES", _:
                await self._read_only(step.seconds)
            case "DUPLICATES", _:
                await self._duplicate(step)
            case "FLOOD", _:
                await crowd.flood(step.amount)
            case "ISSUER", _:
                self.issuer_proxy.target_port, port = 0, self.issuer_proxy.target_port
                self.issuer_proxy.cut_all()
                await asyncio.sleep(step.seconds)
                self.issuer_proxy.target_port = port
            case _:
                await self._change(step, sale)

    def _server(self, subject: str, which: int) -> Server:
        servers: Mapping[str, Server] = {
            "API": self.apis[which],
            "CONSUMER": self.consumers[which],
            "OPERATOR": self.operator,
            "KAFKA": self.kafka,
            "POSTGRES": self.postgres,
        }
        return servers[subject]

    async def _do_to_redis(self, step: Step) -> None:
        match step.kind:
            case Kind.REDIS_KILL:
                await self.redis.kill(step.seconds)
            case Kind.REDIS_RESTART:
                await self.redis.restart(step.seconds)
            case Kind.REDIS_FREEZE:
                await self.redis.freeze(step.seconds)
            case Kind.REDIS_POWER_CUT:
                await self.redis.lose_power()
            case Kind.REDIS_FLUSH:
                await self.redis.flush()
            case Kind.REDIS_OLDER_COPY:
                await self.redis.restore_older_copy(step.seconds)
            case Kind.REDIS_FAILOVER:
                await self.redis.fail_over(step.seconds)
            case Kind.REDIS_AND_BACK:
                await self.redis.fail_over(step.seconds)
                await self.redis.await_health()
                await self.redis.fail_over(step.seconds)
            case _:
                assert isinstance(self.redis, RedisShards), step
                await self._do_to_shards(step, self.redis)

    async def _do_to_shards(self, step: Step, redis: RedisShards) -> None:
        match step.kind:
            case Kind.REDIS_TWO_LOST:
                await redis.lose_two(step.seconds)
            case Kind.REDIS_FORCED:
                await redis.force()
            case Kind.REDIS_PARTITION:
                await redis.partition(step.seconds)
            case Kind.REDIS_SLOT_MOVED:
                await redis.move_slot()
            case kind:
                raise AssertionError(kind)

    async def _cut(self, step: Step) -> None:
        match step.kind:
            case Kind.CUT_REDIS:
                await self.redis.cut(step.amount)
            case Kind.CUT_POSTGRES:
                self.postgres_proxy.cut_replies(b"COMMIT;", step.amount)
            case _:
                self.kafka_proxy.cut_all()

    async def _change(self, step: Step, sale: Sale) -> None:
        """Change the FlashSale, as its owner does."""
        match step.kind:
            case Kind.RESTOCK:
                sale.stock += step.amount
                sale.highest_stock = max(sale.highest_stock, sale.stock)
            case Kind.SHORTEN:
                sale.stock = max(0, sale.stock - step.amount)
            case Kind.PAUSE:
                sale.paused = True
                await self.apply(sale)
                await asyncio.sleep(step.seconds)
                sale.paused = False
            case Kind.END:
                sale.ends_ms = int((time.time() + step.seconds) * 1000)
            case Kind.DELETE_AND_APPLY:
                self.history.deleted.append(time.time())
                await self.delete(sale)
                await asyncio.sleep(step.seconds)
            case kind:
                raise AssertionError(kind)
        await self.apply(sale)

    async def _read_only(self, seconds: float) -> None:
        """Make PostgreSQL read-only, like a primary that has become a standby."""

        async def set_to(value: str) -> None:
            admin = await asyncpg.connect(self.postgres.url)
            try:
                await admin.execute("SET default_transaction_read_only = off")
                await admin.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
                await admin.execute("SELECT pg_reload_conf()")
            finally:
                await admin.close()

        await set_to("on")
        await asyncio.sleep(seconds)
        await set_to("off")

    async def _duplicate(self, step: Step) -> None:
        """Write some of the last records of the topic again, in random order and partition."""
        chance = random.Random(step.at)
        consumer = AIOKafkaConsumer(bootstrap_servers=self.kafka.bootstrap)
        producer = AIOKafkaProducer(bootstrap_servers=self.kafka.bootstrap, acks="all")
        with contextlib.suppress(Exception):  # without Kafka there are no duplicates
            async with asyncio.timeout(10):
                await consumer.start()
                await producer.start()
                numbers = sorted(await producer.partitions_for(events.topic()))
                places = [TopicPartition(events.topic(), number) for number in numbers]
                consumer.assign(places)
                ends = await consumer.end_offsets(places)
                for place in places:
                    consumer.seek(place, max(0, ends[place] - step.amount))
                found = [
                    record
                    for records in (await consumer.getmany(timeout_ms=2_000)).values()
                    for record in records
                ]
                for record in chance.sample(found, min(step.amount, len(found))):
                    await producer.send_and_wait(
                        events.topic(),
                        record.value,
                        record.key,
                        chance.choice(numbers),
                        headers=list(record.headers),
                    )
        await consumer.stop()
        with contextlib.suppress(Exception):
            await producer.stop()


@asynccontextmanager
async def opened(folder: Path, kind: Redis = Redis.SENTINEL) -> AsyncIterator[World]:
    """Run a world in a folder, which is emptied first. At the end all processes are killed."""
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    async with AsyncExitStack() as stack:

        async def run(server: Server) -> None:
            stack.push_async_callback(asyncio.to_thread, server.kill)
            await asyncio.to_thread(server.start)

        kafka_proxy = await stack.enter_async_context(Proxy().serve())
        postgres_proxy = await stack.enter_async_context(Proxy().serve())
        kafka = KafkaServer(folder / "kafka", options=_advertised(kafka_proxy))
        postgres = PostgresServer(folder / "postgres", durable=False)
        plane = ControlPlane(folder / "kubernetes")
        kafka_proxy.target_port, postgres_proxy.target_port = kafka.port, postgres.port
        redis = await stack.enter_async_context(_REDIS[kind](folder).serve())
        issuer = stack.enter_context(Issuer())
        issuer_proxy = await stack.enter_async_context(Proxy(issuer.port).serve())
        await asyncio.gather(run(kafka), run(postgres), run(plane))
        await asyncio.to_thread(plane.kubectl, "apply", "-f", str(CRD), check=True)
        established = ("wait", "--for=condition=Established", "crd/flashsales.flashsale.dev")
        await asyncio.to_thread(plane.kubectl, *established, check=True)
        addresses = Addresses(
            redis.url,
            f"127.0.0.1:{kafka_proxy.port}",
            postgres.url.replace(f":{postgres.port}/", f":{postgres_proxy.port}/"),
        )
        world = World(
            redis=redis,
            kafka=kafka,
            kafka_proxy=kafka_proxy,
            postgres=postgres,
            postgres_proxy=postgres_proxy,
            apis=(_api(folder / "api-1", addresses, {}), _api(folder / "api-2", addresses, {})),
            consumers=(
                ConsumerServer(folder / "consumer-1", addresses),
                ConsumerServer(folder / "consumer-2", addresses),
            ),
            plane=plane,
            operator=OperatorServer(folder / "operator", _for_operator(addresses, plane)),
            issuer=issuer,
            issuer_proxy=issuer_proxy,
            addresses=addresses,
            folder=folder,
        )

        def kill_apis() -> None:
            for api in world.apis:
                api.kill()

        stack.push_async_callback(asyncio.to_thread, kill_apis)
        for service in (*world.consumers, *world.apis, world.operator):
            await run(service)
        yield world


def _api(folder: Path, addresses: Addresses, settings: Mapping[str, str]) -> ApiServer:
    return ApiServer(folder, of_api(addresses), order_tokens=TOKEN, settings=settings)


def _advertised(proxy: Proxy) -> Mapping[str, str]:
    return {"advertised.listeners": f"PLAINTEXT://127.0.0.1:{proxy.port}"}


def _for_operator(addresses: Addresses, plane: ControlPlane) -> Mapping[str, str]:
    return {
        **addresses.environment(),
        "KUBECONFIG": str(plane.kubeconfig),
        "FLASHSALE_NAMESPACES": NAMESPACE,
        "FLASHSALE_KEEP_CLOSED_SECONDS": KEEP_CLOSED_SECONDS,
    }


async def _kill(server: Server, seconds: float) -> None:
    await _end_and_start(server, server.kill, seconds)


async def _restart(server: Server, seconds: float) -> None:
    await _end_and_start(server, server.stop, seconds)


async def _end_and_start(server: Server, end: Callable[[], None], seconds: float) -> None:
    await asyncio.to_thread(end)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.start)


async def _freeze(server: Server, seconds: float) -> None:
    await asyncio.to_thread(server.pause)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.resume)


_REDIS: Final[Mapping[Redis, type[RedisPair]]] = {
    Redis.ONE: RedisAlone,
    Redis.SENTINEL: RedisPair,
    Redis.CLUSTER: RedisShards,
}
_VERBS: Final[Mapping[str, Callable[[Server, float], Awaitable[None]]]] = {
    "KILL": _kill,
    "FREEZE": _freeze,
    "RESTART": _restart,
}
