"""Checks that the consumer group in Kafka belongs to the ledger's engine.

Two engines of the same name on one Kafka would share a group, and each would get a part of the
other's events. Each consumer therefore commits its offsets with the id of its engine. The offset of
partition 0 decides, because one member at a time can commit it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError

from flashsale import events, kafka_clients
from flashsale.errors import OtherEngine
from flashsale.settings import KafkaSettings
from flashsale_consumer import clients

_REQUEST_TIMEOUT_MS: Final = 10_000


class Ownership:
    """The engine that owns a consumer group."""

    def __init__(
        self, admin: AIOKafkaAdminClient, engine: str, group_id: str, engine_id: str
    ) -> None:
        """`engine` is the engine's name."""
        self._admin = admin
        self._engine = engine
        self._group_id = group_id
        self._engine_id = engine_id
        self._decisive = TopicPartition(events.topic(engine), 0)

    async def check(self) -> bool:
        """Returns whether the group names this engine. A group without a name can be claimed.

        Raises `OtherEngine` if the group names another engine, and `KafkaError`.
        """
        committed = await self._admin.list_consumer_group_offsets(
            self._group_id, partitions=[self._decisive]
        )
        # aiokafka ignores the error of a whole group. Its answer then has no partitions.
        if self._decisive not in committed:
            raise GroupCoordinatorNotAvailableError(
                f"Kafka does not tell the offsets of the group {self._group_id}"
            )
        owner = events.owner(committed[self._decisive].metadata)
        if owner not in (None, self._engine_id):
            raise OtherEngine(
                f"the consumer group {self._group_id} in Kafka belongs to engine {owner}, but "
                f"this ledger to engine {self._engine_id}, and both are named {self._engine}: "
                "give this engine another FLASHSALE_ENGINE and a new database, or delete the "
                f"group if engine {owner} is gone"
            )
        return owner is not None


@asynccontextmanager
async def ownership(
    kafka: KafkaSettings, group_id: str, engine_id: str
) -> AsyncIterator[Ownership]:
    """Connects to Kafka. Raises `KafkaError`."""
    admin = AIOKafkaAdminClient(**kafka.kafka_client(), request_timeout_ms=_REQUEST_TIMEOUT_MS)
    try:
        await clients.start(admin)
        yield Ownership(admin, kafka.engine, group_id, engine_id)
    finally:
        await kafka_clients.close("the group's client", admin.close())
