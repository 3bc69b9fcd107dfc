"""Reads facts of Kafka, and makes up for faults of aiokafka that every deployable meets.

This is the only module of the contract that knows a Kafka client.
"""

import asyncio
import logging
from collections.abc import Coroutine
from functools import cache
from itertools import chain
from typing import Any, Final

from aiokafka import AIOKafkaProducer, TopicPartition, conn
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    KafkaConnectionError,
    KafkaError,
    NodeNotReadyError,
)

from flashsale import events
from flashsale.errors import has_just_closed
from flashsale.requirements import TopicFacts

log = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 3.0
WRONG_CLOCK: Final = (
    "Kafka refuses the time of this machine's clock: synchronize the machines' clocks, and set the "
    "topic's message.timestamp.type to LogAppendTime"
)


@cache
def adapt_aiokafka() -> None:
    """Lets all later clients of this process survive closed connections, and name causes.

    aiokafka does not expect the error that uvloop raises for a write to such a connection
    (https://github.com/aio-libs/aiokafka/issues/1038). It would end aiokafka's tasks that fetch
    records and read metadata, which nothing starts again.

    If no broker serves a client, aiokafka's error would have the addresses only, not the reasons.
    If one broker does not, it would have the number of its node only.
    """
    failures: dict[tuple[str, int], str] = {}

    class Connection(conn.AIOKafkaConnection):  # type: ignore[misc] # aiokafka has no types
        async def connect(self) -> Any:  # noqa: ANN401 - aiokafka's
            address = (self.host, self.port)
            try:
                connected = await super().connect()
            except Exception as error:
                failures[address] = str(error) or repr(error)
                raise
            failures.pop(address, None)
            return connected

        def send(self, request: Any, expect_response: bool = True) -> Any:  # noqa: ANN401 - aiokafka's
            try:
                return super().send(request, expect_response)
            except RuntimeError as error:
                if not has_just_closed(error):
                    raise
                self.close(reason=conn.CloseReason.CONNECTION_BROKEN, exc=error)
                raise KafkaConnectionError(f"{self!r} has just closed") from error

    bootstrap = AIOKafkaClient.bootstrap

    async def bootstrap_or_say_why(client: Any) -> None:  # noqa: ANN401 - aiokafka's
        try:
            await bootstrap(client)
        except KafkaConnectionError as error:
            causes = [
                f"{host}:{port}: {failures.get((host, port), 'no answer to the first request')}"
                for host, port, _ in client.hosts
            ]
            raise KafkaConnectionError("; ".join(causes)) from error

    send = AIOKafkaClient.send

    async def send_or_say_why(client: Any, node_id: Any, *rest: Any, **options: Any) -> Any:  # noqa: ANN401 - aiokafka's
        try:
            return await send(client, node_id, *rest, **options)
        except NodeNotReadyError as error:
            broker = client.cluster.broker_metadata(node_id)
            cause = broker and failures.get((broker.host, broker.port))
            if not cause:
                raise
            raise NodeNotReadyError(f"{broker.host}:{broker.port}: {cause}") from error

    conn.AIOKafkaConnection = Connection
    AIOKafkaClient.send = send_or_say_why
    AIOKafkaClient.bootstrap = bootstrap_or_say_why


async def group_owner(admin: AIOKafkaAdminClient, engine: str) -> str | None:
    """Returns the id of the engine whose consumers record the topic of `engine`, or None.

    The consumers name it with the offsets that they commit. That of partition 0 decides, because
    one member at a time can commit it. Raises `KafkaError`, also if Kafka does not show the offset.
    """
    group, decisive = events.consumer_group(engine), TopicPartition(events.topic(engine), 0)
    committed = await admin.list_consumer_group_offsets(group, partitions=[decisive])
    # aiokafka ignores the error of a whole group. Its answer then has no partitions.
    if decisive not in committed:
        raise GroupCoordinatorNotAvailableError(f"Kafka does not show the offsets of {group}")
    return events.owner(committed[decisive].metadata)


async def topic_facts(admin: AIOKafkaAdminClient, topic: str) -> TopicFacts | None:
    """Returns a topic's facts, or None if it does not exist or the user may not describe it.

    Raises `KafkaError`.
    """
    # Describe all topics, because to ask for one by name can create it.
    described = [each for each in await admin.describe_topics() if each["topic"] == topic]
    if not described:
        return None
    [reply] = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    # A user who may not describe the settings gets an error and no entries.
    settings = {entry[0]: entry[1] for resource in reply.resources for entry in resource[4]}
    return TopicFacts(len(described[0]["partitions"]), settings)


async def close(clients: str, *closing: Coroutine[Any, Any, object]) -> None:
    """Waits up to 3 s for all of `closing`. Slower ones continue in the background.

    They run in tasks of their own, because aiokafka's clients swallow a cancellation while they
    close. A caller's endless loop would go on after it.
    """
    tasks = [asyncio.create_task(each) for each in closing]
    _, slow = await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
    for task in tasks:
        if task in slow:
            log.warning("%s: not closed within %.0f s", clients, CLOSE_SECONDS)
        elif task.cancelled():
            # aiokafka cancels its own stop() while a fetch waits for its retry (aiokafka issue 647)
            log.warning("%s: not closed cleanly: it was cancelled", clients)
        elif error := task.exception():
            # A KeyError of aiokafka has an object as its text.
            log.warning("%s: not closed cleanly: %r", clients, error)


async def discard(producer: AIOKafkaProducer) -> None:
    """Stops a producer, which drops its unsent records. `close` calls it."""
    # stop() would wait for them, for as long as Kafka is away.
    accumulator = producer._message_accumulator
    for batch in chain.from_iterable(accumulator._batches.values()):
        batch._drain_waiter.add_done_callback(retrieve)
        # When its future fails, a batch that is sent again is removed from this set a second time.
        accumulator._pending_batches.add(batch)
    accumulator.fail_all(KafkaError("the producer was discarded"))
    try:
        await producer.stop()
    finally:
        await producer.client.close()  # stop() does not get this far if it fails


def retrieve(future: "asyncio.Future[object]") -> None:
    """Retrieves the exception of an abandoned future, or asyncio would log it."""
    if not future.cancelled():
        future.exception()
