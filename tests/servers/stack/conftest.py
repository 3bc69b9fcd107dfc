"""The three servers behind one interface: create one, write with a real client, read it back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from redis.asyncio import Redis

from dev.stack.process import Server
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from tests.support.topics import create_topic

S = TypeVar("S", bound=Server)


class Kind(ABC, Generic[S]):
    """One kind of server, with the least that proves that it works."""

    server: type[S]

    def make(self, data: Path, port: int | None = None) -> S:
        return self.server(data, port)

    @abstractmethod
    async def write(self, server: S, text: str) -> None:
        """Store the text for `read`. It is as durable as the server's acknowledgement."""

    @abstractmethod
    async def read(self, server: S) -> str:
        """Return the stored text."""


class RedisKind(Kind[RedisServer]):
    server = RedisServer

    def make(self, data: Path, port: int | None = None) -> RedisServer:
        return RedisServer(data, port, appendfsync="always")

    async def write(self, server: RedisServer, text: str) -> None:
        async with Redis.from_url(server.url) as client:
            await client.set("text", text)

    async def read(self, server: RedisServer) -> str:
        async with Redis.from_url(server.url) as client:
            stored = await client.get("text")
            assert isinstance(stored, bytes)
            return stored.decode()


class PostgresKind(Kind[PostgresServer]):
    server = PostgresServer

    def make(self, data: Path, port: int | None = None) -> PostgresServer:
        return PostgresServer(data, port, durable=False)

    async def write(self, server: PostgresServer, text: str) -> None:
        connection = await asyncpg.connect(server.url)
        try:
            await connection.execute("CREATE TABLE texts (text text)")
            await connection.execute("INSERT INTO texts VALUES ($1)", text)
        finally:
            await connection.close()

    async def read(self, server: PostgresServer) -> str:
        connection = await asyncpg.connect(server.url)
        try:
            return str(await connection.fetchval("SELECT text FROM texts"))
        finally:
            await connection.close()


class KafkaKind(Kind[KafkaServer]):
    server = KafkaServer

    async def write(self, server: KafkaServer, text: str) -> None:
        await create_topic(server.bootstrap, "texts", 1)
        producer = AIOKafkaProducer(bootstrap_servers=server.bootstrap, acks="all")
        await producer.start()
        try:
            await producer.send_and_wait("texts", text.encode())
        finally:
            await producer.stop()

    async def read(self, server: KafkaServer) -> str:
        consumer = AIOKafkaConsumer(bootstrap_servers=server.bootstrap)
        await consumer.start()
        try:
            partition = TopicPartition("texts", 0)
            consumer.assign([partition])
            await consumer.seek_to_beginning(partition)
            record = await consumer.getone()
            return bytes(record.value).decode()
        finally:
            await consumer.stop()


LIGHT = [pytest.param(RedisKind(), id="redis"), pytest.param(PostgresKind(), id="postgres")]
ALL = [*LIGHT, pytest.param(KafkaKind(), id="kafka", marks=pytest.mark.slow)]


@pytest.fixture(params=ALL)
def kind(request: pytest.FixtureRequest) -> Kind[Any]:
    """Each of the three servers in turn."""
    found: Kind[Any] = request.param
    return found


@pytest.fixture(params=LIGHT)
def light_kind(request: pytest.FixtureRequest) -> Kind[Any]:
    """Each server that starts fast, for tests in which the kind of server does not matter."""
    found: Kind[Any] = request.param
    return found


@pytest.fixture
def cleanup() -> Iterator[Callable[[Server], None]]:
    """A function that registers a server to be killed after the test."""
    servers: list[Server] = []
    yield servers.append
    for server in servers:
        server.kill()
