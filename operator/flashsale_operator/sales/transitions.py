"""Confirm or cancel one reservation for a person, as the order port does it for the shop.

Redis makes the change. It is certain once Kafka has acknowledged its event in time: later, a
rebuild could have begun without the event.
"""

import asyncio
import time
from typing import Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from flashsale import events, kafka_clients
from flashsale.errors import ContractViolation
from flashsale.events import Event
from flashsale.heartbeat import ACKNOWLEDGED_SECONDS, CALL_DEADLINE_SECONDS
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale.reservations import OrderCall, Transition, TransitionReply, Verb
from flashsale.settings import KafkaSettings
from flashsale_operator.sales import engine
from flashsale_operator.sales.offsets import UNSEEN, KafkaUnavailable, require_own, spans
from flashsale_operator.sales.reconciler import UnknownSale

TIMEOUT_SECONDS: Final = 10
"""How long Kafka may take to answer, before anything is changed."""


async def change(  # noqa: PLR0913 - the call, and the servers
    inventory: Inventory,
    kafka: KafkaSettings,
    item_id: str,
    verb: Verb,
    call: OrderCall,
    *,
    engine_id: str,
) -> Transition:
    """Confirms or cancels a reservation, and publishes its event.

    Returns `CHANGED` or `REPLAYED` once Kafka has the event, or a refusal. A repeat is harmless.
    Raises `UnknownSale`, `OtherEngine` if the sale or Kafka is another engine's,
    `ContractViolation` if the sale is fenced or cannot be read, `RedisUnavailable`, and
    `KafkaUnavailable` if Kafka does not acknowledge the event in time. In that case an API pod
    publishes it.
    """
    timeout_ms = 1000 * TIMEOUT_SECONDS
    producer = AIOKafkaProducer(**kafka.kafka_client(), acks="all", request_timeout_ms=timeout_ms)
    try:
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await producer.start()
        except (KafkaError, OSError, TimeoutError) as error:
            why = str(error) or "no answer in time"
            raise KafkaUnavailable(f"Kafka is away, and nothing is changed: {why}") from error
        await require_own(kafka, engine_id)
        if not await spans(kafka):
            raise KafkaUnavailable(UNSEEN)  # to send to it by name could create it
        began = time.monotonic()
        reply = await inventory.change(
            verb, item_id, [call], timeout_seconds=CALL_DEADLINE_SECONDS, engine_id=engine_id
        )
        if not isinstance(reply, TransitionReply):
            engine.require_own_sale(reply, item_id)
            if reply is Transition.UNKNOWN:
                raise UnknownSale(f"{item_id}: Redis has no sale of this item")
            raise ContractViolation(f"{item_id}: the sale is fenced: rebuild it first")
        [answer] = reply.answers
        if answer.record is None:
            return answer.outcome
        event = Event.of(item_id, call.reservation_id, answer.record, reply.snapshot)
        try:
            async with asyncio.timeout(ACKNOWLEDGED_SECONDS - (time.monotonic() - began)):
                await producer.send_and_wait(
                    events.topic(kafka.engine),
                    events.encode(event),
                    key=call.reservation_id.encode(),
                    headers=events.headers(call.traceparent),
                )
        except (KafkaError, OSError, TimeoutError) as error:
            raise KafkaUnavailable(
                f"{call.reservation_id} is {event.state} in Redis, but Kafka has not acknowledged "
                "it in time: run it again"
            ) from error
    finally:
        await kafka_clients.close("the producer", producer.stop())
    if answer.entry_id:
        entry = (answer.entry_id, call.reservation_id, answer.record.version)
        await Outbox(inventory.redis, inventory.engine).settle(item_id, [entry])
    return answer.outcome
