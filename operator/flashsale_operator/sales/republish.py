"""Publish the reservations of a sale to Kafka again, from Redis.

This repairs a Kafka that lost acknowledged events before the ledger recorded them. The outbox has
deleted these events, but Redis still has the reservations. The ledger skips reservations that it
has already, so a repeat is harmless.
"""

import asyncio
from typing import Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from flashsale import events, kafka_clients
from flashsale.events import Event
from flashsale.inventory import Inventory
from flashsale.settings import KafkaSettings
from flashsale_operator.sales.offsets import UNSEEN, KafkaUnavailable, require_own, spans
from flashsale_operator.sales.reconciler import UnknownSale

PAGE_SECONDS: Final = 30.0
"""How long Kafka may take to answer at the start, and to acknowledge a page of events."""


async def republish(inventory: Inventory, kafka: KafkaSettings, item_id: str) -> int:
    """Publishes all reservations of an item's sale, and returns how many.

    Each event carries the sale's current numbers. Raises `UnknownSale` if Redis has no sale of the
    item, `ContractViolation` if the sale is fenced, `OtherEngine` if Kafka is another engine's,
    `RedisUnavailable`, and `KafkaUnavailable` unless Kafka acknowledges all events.
    """
    sale = (await inventory.sales([item_id])).get(item_id)
    if sale is None:
        raise UnknownSale(f"{item_id}: Redis has no sale of this item, so nothing is published")
    if sale.engine:
        await require_own(kafka, sale.engine)
    topic = events.topic(kafka.engine)
    producer = AIOKafkaProducer(**kafka.kafka_client(), acks="all")
    published = 0
    try:
        async with asyncio.timeout(PAGE_SECONDS):
            await producer.start()
        if not await spans(kafka):
            raise KafkaUnavailable(UNSEEN)  # to send to it by name could create it
        async for snapshot, page in inventory.reservation_pages(item_id):
            async with asyncio.timeout(PAGE_SECONDS):
                sent = [
                    await producer.send(
                        topic,
                        events.encode(Event.of(item_id, reservation_id, record, snapshot)),
                        key=reservation_id.encode(),
                        headers=events.headers(""),
                    )
                    for reservation_id, record in page
                ]
                await asyncio.gather(*sent)
            published += len(page)
    except (KafkaError, OSError, TimeoutError) as error:
        why = str(error) or "no answer in time"
        raise KafkaUnavailable(f"Kafka is away, run it again: {why}") from error
    finally:
        await kafka_clients.close("the producer", producer.stop())
    return published
