"""Checks that the Redis and the Kafka of this pod belong to the same engine.

The API has no ledger, so it learns the engine's id from Redis. The consumer, which has the ledger,
names its engine in the metadata of the offsets that it commits.
"""

import asyncio
import logging
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupAuthorizationFailedError, KafkaError

from flashsale import events, kafka_clients
from flashsale.errors import FlashsaleError, SettingsError
from flashsale.settings import KafkaSettings
from flashsale_api.known_items import KnownItems

log = logging.getLogger(__name__)

OWNER_SECONDS: Final = 5.0
"""How often a pod looks which engine owns the consumer group."""
TIMEOUT_SECONDS: Final = 5


class Engine:
    """This pod's engine, and the items that it has in Redis.

    While `conflict` is not empty, the pod accepts and publishes nothing.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.id = ""
        """The id that Redis had first. Empty until the operator has claimed Redis."""
        self.items = KnownItems()
        self._in_redis = ""
        self._in_kafka = ""

    @property
    def conflict(self) -> str:
        """One line that names the two engines that meet, or nothing."""
        return self._in_redis or self._in_kafka

    def may_have_lost(self, item_id: str) -> bool:
        """Whether Redis may have lost the sale of an item that has none.

        After "unknown", a buyer goes away, and an order service voids the payment.
        """
        return item_id in self.items or not self.items.complete

    def found_in_redis(self, engine_id: str) -> None:
        """Compares the id in Redis with the first one. It is empty if Redis has none."""
        self.id = self.id or engine_id
        self._in_redis = self._compare(
            self._in_redis,
            engine_id,
            f"this Redis belongs to engine {engine_id}, but this pod to engine {self.id}",
        )

    def found_in_kafka(self, owner: str | None) -> None:
        """Compares the owner of the consumer group with the engine in Redis."""
        self._in_kafka = self._compare(
            self._in_kafka,
            owner or "",
            f"the consumer group {events.consumer_group(self.name)} in Kafka belongs to engine "
            f"{owner}, but this Redis to engine {self.id}",
        )

    def _compare(self, before: str, found: str, sentence: str) -> str:
        if not found or not self.id or found == self.id:
            return ""
        conflict = (
            f"{sentence}; both are named {self.name}: give each engine a FLASHSALE_ENGINE, a Redis "
            "and a topic of its own"
        )
        if conflict != before:
            log.error("%s", conflict)
        return conflict


class OwnerUnknown(FlashsaleError):
    """Kafka cannot say which engine owns the consumer group."""


class GroupOwner:
    """Reads which engine owns the consumer group."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._group = events.consumer_group(kafka.engine)
        self._refused = False

    async def read(self) -> str | None:
        """Returns the engine's id, or None if no consumer has named one. Raises `OwnerUnknown`."""
        try:
            client = self._kafka.kafka_client()
        except SettingsError as error:  # a renewed certificate can be wrong
            raise OwnerUnknown(str(error)) from error
        admin = AIOKafkaAdminClient(**client, request_timeout_ms=TIMEOUT_SECONDS * 1000)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await admin.start()
                return await kafka_clients.group_owner(admin, self._kafka.engine)
        except (KafkaError, OSError, TimeoutError) as error:
            self._warn_once(error)
            raise OwnerUnknown(f"the owner of the group {self._group}: {error!r}") from error
        finally:
            await kafka_clients.close("the group's client", admin.close())

    def _warn_once(self, error: Exception) -> None:
        if isinstance(error, GroupAuthorizationFailedError) and not self._refused:
            self._refused = True
            log.warning(
                "Kafka does not show the group %s: allow this user Describe on it", self._group
            )
