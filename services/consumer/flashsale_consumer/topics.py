"""Creates the consumer's two topics if they are missing, and reads the settings of a topic."""

import logging
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    NoError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    for_code,
)

from flashsale.requirements import (
    EVENT_RETENTION_MS,
    PARTITION_BYTES,
    PARTITIONS,
    SEGMENT_BYTES,
    TopicFacts,
)
from flashsale.settings import KafkaSettings

log = logging.getLogger(__name__)

DEAD_LETTER_RETENTION_MS: Final = 30 * 24 * 60 * 60 * 1000
DEAD_LETTER_BYTES: Final = 2 * 1024 * 1024
"""Twice the broker's default, because a dead letter is a record plus explaining headers."""


async def create(
    kafka: KafkaSettings, topic: str, dead_letter_topic: str
) -> tuple[frozenset[str], TopicFacts | None]:
    """Create the missing topics. Return their names and the settings of `topic`.

    A consumer that may not create topics waits until they exist. Raises `KafkaError`.
    """
    admin = AIOKafkaAdminClient(**kafka.kafka_client(), request_timeout_ms=10_000)
    try:
        await admin.start()
        reply = await admin.create_topics(
            [
                _topic(topic, {"retention.ms": str(EVENT_RETENTION_MS)}),
                _topic(
                    dead_letter_topic,
                    {
                        "retention.ms": str(DEAD_LETTER_RETENTION_MS),
                        "max.message.bytes": str(DEAD_LETTER_BYTES),
                    },
                ),
            ]
        )
        created, refused = [], []
        for name, code, message in reply.topic_errors:
            error = for_code(code)
            if error in (TopicAuthorizationFailedError, ClusterAuthorizationFailedError):
                refused.append(name)
            elif error is NoError:
                log.info("created the topic %s", name)
                created.append(name)
            elif error is not TopicAlreadyExistsError:
                raise error(f"{name}: {message}")
        missing = set(refused) - set(await admin.list_topics()) if refused else set()
        if missing:
            log.warning("not allowed to create %s, waiting for them", ", ".join(sorted(missing)))
        return frozenset(created), await facts(admin, topic)
    finally:
        await admin.close()


async def facts(admin: AIOKafkaAdminClient, topic: str) -> TopicFacts | None:
    """Return the topic's settings, or None if it does not exist. Raises `KafkaError`."""
    # Describe all topics, because to ask for one by name can create it.
    described = [each for each in await admin.describe_topics() if each["topic"] == topic]
    if not described:
        return None
    [reply] = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    # A user who may not describe the settings gets an error and no entries.
    settings = {entry[0]: entry[1] for resource in reply.resources for entry in resource[4]}
    return TopicFacts(len(described[0]["partitions"]), settings)


def _topic(name: str, configs: dict[str, str]) -> NewTopic:
    # -1 means the broker's default. NewTopic accepts it only together with assignments.
    limits = {"retention.bytes": str(PARTITION_BYTES), "segment.bytes": str(SEGMENT_BYTES)}
    return NewTopic(name, PARTITIONS, -1, replica_assignments={}, topic_configs=limits | configs)
