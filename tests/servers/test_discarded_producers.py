"""A discarded producer drops its unsent batches and logs nothing. Needs Kafka."""

import gc
from collections.abc import Awaitable, Callable

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from dev.stack.servers import KafkaServer
from flashsale_api import publisher
from flashsale_consumer import clients
from tests.support.consumer import Log


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("discard", [publisher._discard, clients.discard])
async def test_a_discarded_producer_logs_nothing(
    discard: Callable[[AIOKafkaProducer], Awaitable[None]],
    repeated: bool,
    kafka_server: KafkaServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A repeated batch was sent once, failed, and waits to be sent again."""
    log = Log(kafka_server.bootstrap)
    await log.create()
    producer = AIOKafkaProducer(bootstrap_servers=kafka_server.bootstrap)
    await producer.start()
    await producer.send_and_wait(log.topic, b"{}", partition=0)
    caplog.clear()
    batch = producer.create_batch()
    batch.append(key=None, value=b"{}", timestamp=None)
    waiting = await producer.send_batch(batch, log.topic, partition=0)
    if repeated:
        accumulator = producer._message_accumulator
        accumulator.reenqueue(accumulator._pop_batch(TopicPartition(log.topic, 0)))
    await discard(producer)
    with pytest.raises(KafkaError, match="discarded"):
        await waiting
    del producer, batch, waiting
    gc.collect()
    assert not caplog.text
