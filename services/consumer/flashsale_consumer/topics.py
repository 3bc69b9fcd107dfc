"""Creates the consumer's two topics if they are missing."""

import logging
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    NoError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    for_code,
)

from flashsale.settings import KafkaSettings

log = logging.getLogger(__name__)

PARTITIONS: Final = 12
_DAY_MS: Final = 24 * 60 * 60 * 1000
EVENT_RETENTION_MS: Final = 7 * _DAY_MS
DEAD_LETTER_RETENTION_MS: Final = 30 * _DAY_MS
DEAD_LETTER_BYTES: Final = 2 * 1024 * 1024
"""Twice the broker's default, because a dead letter is a record plus explaining headers."""


async def create(kafka: KafkaSettings, topic: str, dead_letter_topic: str) -> frozenset[str]:
    """Create the missing topics and return their names. Raises `KafkaError`.

    A consumer that may not create topics waits until they exist.
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
        return frozenset(created)
    finally:
        await admin.close()


def _topic(name: str, configs: dict[str, str]) -> NewTopic:
    # -1 means the broker's default. NewTopic accepts it only together with assignments.
    return NewTopic(name, PARTITIONS, -1, replica_assignments={}, topic_configs=configs)
