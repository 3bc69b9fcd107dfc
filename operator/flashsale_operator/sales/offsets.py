"""Read the offsets of the topic of reservation events, and compare them with the ledger's."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from flashsale import events, kafka_clients
from flashsale.errors import FlashsaleError, OtherEngine, SettingsError
from flashsale.settings import KafkaSettings

TIMEOUT_SECONDS: Final = 10
UNSEEN: Final = (
    "Kafka does not show the topic of reservations: a consumer creates it, and this user needs "
    "Describe on it"
)


class KafkaUnavailable(FlashsaleError):
    """Kafka did not answer."""


class Span(NamedTuple):
    """A partition's offsets: of the first record that is left, and of the next one to come."""

    first: int
    end: int


Spans = Callable[[], Awaitable[Mapping[int, Span]]]
"""A call of `spans` for one engine."""


async def spans(kafka: KafkaSettings) -> Mapping[int, Span]:
    """Returns the span of each partition of the engine's topic.

    Returns none if the topic does not exist, and if the user may not describe it.

    Raises `KafkaUnavailable`.
    """
    topic = events.topic(kafka.engine)
    try:
        client = kafka.kafka_client()
    except SettingsError as error:  # a renewed certificate can be wrong
        raise KafkaUnavailable(str(error)) from error
    admin = AIOKafkaAdminClient(**client, request_timeout_ms=TIMEOUT_SECONDS * 1000)
    consumer = AIOKafkaConsumer(**client, request_timeout_ms=TIMEOUT_SECONDS * 1000)
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await admin.start()
            # Describe all topics, because to ask for one by name can create it.
            partitions = [
                TopicPartition(topic, partition["partition"])
                for described in await admin.describe_topics()
                if described["topic"] == topic
                for partition in described["partitions"]
            ]
            if not partitions:
                return {}
            await consumer.start()
            firsts = await consumer.beginning_offsets(partitions)
            ends = await consumer.end_offsets(partitions)
    except (KafkaError, OSError, TimeoutError) as error:
        why = str(error) or "no answer in time"
        raise KafkaUnavailable(f"Kafka is away: {why}") from error
    finally:
        await kafka_clients.close("the clients for offsets", consumer.stop(), admin.close())
    return {
        partition.partition: Span(firsts[partition], ends[partition]) for partition in partitions
    }


class SharedSpans:
    """Shares one call between concurrent callers. Each gets a call that began after it asked."""

    def __init__(self, call: Spans) -> None:
        self._call = call
        self._one_at_a_time = asyncio.Lock()
        self._next: asyncio.Task[Mapping[int, Span]] | None = None

    async def __call__(self) -> Mapping[int, Span]:
        if self._next is None:
            self._next = asyncio.create_task(self._call_next())
        # If one caller is cancelled, the others keep waiting.
        return await asyncio.shield(self._next)

    async def _call_next(self) -> Mapping[int, Span]:
        async with self._one_at_a_time:
            self._next = None
            return await self._call()


async def require_own(kafka: KafkaSettings, engine_id: str) -> None:
    """Raises `OtherEngine` if another engine's consumers would get the events of this engine.

    An outage is left to the calls that follow.
    """
    found = None
    admin = AIOKafkaAdminClient(**kafka.kafka_client(), request_timeout_ms=TIMEOUT_SECONDS * 1000)
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await admin.start()
            found = await kafka_clients.group_owner(admin, kafka.engine)
    except (KafkaError, OSError, TimeoutError):
        return
    finally:
        await kafka_clients.close("the group's client", admin.close())
    if found not in (None, engine_id):
        raise OtherEngine(
            f"the consumer group {events.consumer_group(kafka.engine)} in this Kafka belongs to "
            f"engine {found}, but the sale to engine {engine_id}: nothing is published"
        )


def behind(topic: Mapping[int, Span], stored: Mapping[int, int]) -> int:
    """Counts the records that the ledger has not read, by its stored offsets."""
    return sum(
        max(0, span.end - max(span.first, stored.get(number, 0))) for number, span in topic.items()
    )


def faults(topic: Mapping[int, Span], stored: Mapping[int, int]) -> tuple[str, ...]:
    """Describes records that are missing from the topic. To read on cannot fix these faults."""
    if stored and not topic:
        return (UNSEEN,)
    found = []
    for number in sorted({*topic, *stored}):
        next_offset, (first, end) = stored.get(number, 0), topic.get(number, Span(0, 0))
        if next_offset > end:
            found.append(
                f"partition {number} ends at offset {end}, but the ledger has read to "
                f"{next_offset}: the topic was recreated, or Kafka lost records"
            )
        elif next_offset < first:
            found.append(
                f"partition {number} begins at offset {first}, but the ledger has read only to "
                f"{next_offset}: records were deleted unread"
            )
    return tuple(found)
