"""Topics that a test creates, and a client that changes them."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import NoError, TopicAlreadyExistsError

from tests.support.eventually import until


@asynccontextmanager
async def administering(bootstrap: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def create_topic(
    bootstrap: str, name: str, partitions: int, configs: Mapping[str, str] | None = None
) -> None:
    """Create a topic unless it exists, and wait until the broker names a leader of each partition.

    Kafka answers when the controller has the topic. The broker learns of it and of the leaders a
    moment later.
    """
    async with administering(bootstrap) as admin:
        new = NewTopic(name, partitions, 1, topic_configs=dict(configs or {}))
        reply = await admin.create_topics([new])
        [(_, code, message)] = reply.topic_errors
        assert code in (NoError.errno, TopicAlreadyExistsError.errno), message

        async def led() -> bool:
            # A broker that does not know the topic names no partition.
            [topic] = await admin.describe_topics([name])
            leaders = [partition["leader"] for partition in topic["partitions"]]
            return bool(leaders) and min(leaders) >= 0

        await until(led, f"the broker names the leaders of {name}")
