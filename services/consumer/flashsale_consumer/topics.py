"""Creates the consumer's three topics if they are missing, and reads the settings of a topic."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    NoError,
    NotControllerError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    for_code,
)

from flashsale import events, kafka_clients
from flashsale.requirements import (
    EVENT_RETENTION_MS,
    PARTITION_BYTES,
    PARTITIONS,
    SEGMENT_BYTES,
    TIMESTAMP_TYPE,
    TopicFacts,
)
from flashsale.settings import KafkaSettings
from flashsale_consumer import clients

log = logging.getLogger(__name__)

DEAD_LETTER_RETENTION_MS: Final = 30 * 24 * 60 * 60 * 1000
DEAD_LETTER_BYTES: Final = 2 * 1024 * 1024
"""Twice the broker's default, because a dead letter is a record plus explaining headers."""


async def create(
    kafka: KafkaSettings, partitions: int = PARTITIONS, *, unsure: set[str] | None = None
) -> frozenset[str]:
    """Creates the missing topics of events and dead letters, and returns their names.

    Kafka can create a topic although the call fails. `unsure` keeps the names of such topics until
    the next call, which returns those that exist. A consumer that may not create topics waits until
    they exist. Raises `KafkaError`.
    """
    async with _admin(kafka) as admin:
        created, missing = await _create(
            admin,
            set() if unsure is None else unsure,
            _topic(
                events.topic(kafka.engine),
                partitions,
                {"retention.ms": str(EVENT_RETENTION_MS)},
            ),
            _topic(
                events.dead_letter_topic(kafka.engine),
                partitions,
                {
                    "retention.ms": str(DEAD_LETTER_RETENTION_MS),
                    "max.message.bytes": str(DEAD_LETTER_BYTES),
                },
            ),
        )
        if missing:
            log.warning("not allowed to create %s, waiting for them", ", ".join(sorted(missing)))
        return created


async def read_facts(kafka: KafkaSettings) -> TopicFacts | None:
    """Returns the settings of the topic of events, or None if it does not exist.

    Raises `KafkaError`.
    """
    async with _admin(kafka) as admin:
        return await _facts(admin, events.topic(kafka.engine))


async def create_recorded(kafka: KafkaSettings, partitions: int = PARTITIONS) -> TopicFacts | None:
    """Creates the topic of recorded reservations if it is missing. Returns its settings.

    Raises `UnknownTopicOrPartitionError` if it is missing and the consumer may not create it, and
    other kinds of `KafkaError`.
    """
    topic = events.recorded_topic(kafka.engine)
    async with _admin(kafka) as admin:
        retention = {"retention.ms": str(EVENT_RETENTION_MS)}
        _, missing = await _create(admin, set(), _topic(topic, partitions, retention))
        if missing:
            raise UnknownTopicOrPartitionError(
                f"the topic {topic} does not exist, and the consumer may not create it"
            )
        return await _facts(admin, topic)


@asynccontextmanager
async def _admin(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**kafka.kafka_client(), request_timeout_ms=10_000)
    try:
        await clients.start(admin)
        yield admin
    finally:
        await kafka_clients.close("the topics' client", admin.close())


async def _create(
    admin: AIOKafkaAdminClient, unsure: set[str], *topics: NewTopic
) -> tuple[frozenset[str], frozenset[str]]:
    """Creates topics. Returns the created ones, and those that are missing and not allowed."""
    existing, attempted = set(await admin.list_topics()), frozenset(unsure)
    created, refused = unsure & existing, set[str]()
    wanted = [topic for topic in topics if topic.name not in existing]
    if not wanted:
        unsure.clear()
        return frozenset(created), frozenset()
    unsure |= {topic.name for topic in wanted}
    try:
        reply = await admin.create_topics(wanted)
    except AttributeError:  # aiokafka reads the id of a controller that Kafka does not name
        raise NotControllerError("Kafka has no controller at the moment") from None
    for name, code, message in reply.topic_errors:
        error = for_code(code)
        if error in (TopicAuthorizationFailedError, ClusterAuthorizationFailedError):
            refused.add(name)
        elif error is NoError:
            log.info("created the topic %s", name)
            created.add(name)
        elif error is not TopicAlreadyExistsError:
            raise error(f"{name}: {message}")
        elif name in attempted:
            created.add(name)
    unsure.clear()
    if refused:
        refused -= set(await admin.list_topics())
    return frozenset(created), frozenset(refused)


async def _facts(admin: AIOKafkaAdminClient, topic: str) -> TopicFacts | None:
    """Returns the topic's settings, or None if it does not exist. Raises `KafkaError`."""
    # Describe all topics, because to ask for one by name can create it.
    described = [each for each in await admin.describe_topics() if each["topic"] == topic]
    if not described:
        return None
    [reply] = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    # A user who may not describe the settings gets an error and no entries.
    settings = {entry[0]: entry[1] for resource in reply.resources for entry in resource[4]}
    return TopicFacts(len(described[0]["partitions"]), settings)


def _topic(name: str, partitions: int, configs: dict[str, str]) -> NewTopic:
    # -1 means the broker's default. NewTopic accepts it only together with assignments.
    shared = {
        "message.timestamp.type": TIMESTAMP_TYPE,
        "retention.bytes": str(PARTITION_BYTES),
        "segment.bytes": str(SEGMENT_BYTES),
    }
    return NewTopic(name, partitions, -1, replica_assignments={}, topic_configs=shared | configs)
