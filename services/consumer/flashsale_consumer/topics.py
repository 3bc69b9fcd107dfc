"""Creates the consumer's three topics if they are missing."""

import logging
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
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
    async with clients.admin(kafka) as admin:
        created, missing = await _create(
            admin,
            set() if unsure is None else unsure,
            _topic(events.topic(kafka.engine), partitions),
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


async def create_recorded(kafka: KafkaSettings, partitions: int = PARTITIONS) -> TopicFacts | None:
    """Creates the topic of recorded reservations if it is missing. Returns its settings.

    Raises `UnknownTopicOrPartitionError` if it is missing and the consumer may not create it, and
    other kinds of `KafkaError`.
    """
    topic = events.recorded_topic(kafka.engine)
    async with clients.admin(kafka) as admin:
        _, missing = await _create(admin, set(), _topic(topic, partitions))
        if missing:
            raise UnknownTopicOrPartitionError(
                f"the topic {topic} does not exist, and the consumer may not create it"
            )
        return await kafka_clients.topic_facts(admin, topic)


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


def _topic(name: str, partitions: int, configs: dict[str, str] | None = None) -> NewTopic:
    shared = {
        "message.timestamp.type": TIMESTAMP_TYPE,
        "retention.ms": str(EVENT_RETENTION_MS),
        "retention.bytes": str(PARTITION_BYTES),
        "segment.bytes": str(SEGMENT_BYTES),
    }
    own = shared | (configs or {})
    # -1 means the broker's default. NewTopic accepts it only together with assignments.
    return NewTopic(name, partitions, -1, replica_assignments={}, topic_configs=own)
