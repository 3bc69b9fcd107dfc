"""Kafka's topics and settings."""

from collections.abc import Iterator

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from dev.stack.servers import KafkaServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    with KafkaServer(tmp_path_factory.mktemp("kafka"), options={"num.partitions": "3"}) as server:
        yield server


async def test_the_broker_creates_no_topic_automatically(kafka: KafkaServer) -> None:
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap)
    await consumer.start()
    try:
        assert await consumer.topics() == set()
        # A broker with auto-creation would create the topic at this request.
        assert not consumer.partitions_for_topic("never-made")
        await consumer._client.force_metadata_update()
        assert await consumer.topics() == set()
    finally:
        await consumer.stop()


async def test_messages_are_kept_for_seven_days_and_the_options_of_the_caller_apply(
    kafka: KafkaServer,
) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    try:
        described = await admin.describe_configs([ConfigResource(ConfigResourceType.BROKER, "1")])
    finally:
        await admin.close()
    settings = {entry[0]: entry[1] for entry in described[0].resources[0][4]}
    assert int(settings["log.retention.hours"]) >= 7 * 24
    assert settings["log.retention.bytes"] == "-1"
    assert settings["auto.create.topics.enable"] == "false"
    assert settings["num.partitions"] == "3"
