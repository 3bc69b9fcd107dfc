"""`python -m flashsale_api.republish ITEM`: publishes again all that Redis knows of a sale.

For a Kafka that lost what it had acknowledged and nobody had recorded: the outbox has let go of
that, but the reservations are still in Redis. What the ledger has already costs it a lookup each,
so this may be run at any time, and again.
"""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Mapping
from typing import Final, cast

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from redis.asyncio import Redis

from flashsale import events, redis_client
from flashsale.errors import FlashsaleError, SettingsError
from flashsale.events import Event
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.reservations import Record, Snapshot
from flashsale.scripts import translated
from flashsale.settings import KafkaSettings, RedisUrl, load

PAGE: Final = 500
"""Reservations that are read at once, and events that Kafka is waited for at once."""
ACKNOWLEDGED_SECONDS: Final = 30.0


class Settings(KafkaSettings, frozen=True):
    """Where Redis and Kafka are: the API's own variables."""

    redis_url: RedisUrl


class NotPublished(FlashsaleError):
    """There is no such sale, or Kafka did not acknowledge."""


def main() -> int:
    """Exit code 0 if all was acknowledged, 1 if not, 2 for a wrong setting or usage."""
    parser = argparse.ArgumentParser(
        prog="python -m flashsale_api.republish",
        description="Publishes every reservation of a sale that Redis has to Kafka again. "
        "Recording one twice is harmless; what the ledger lacks it gets. The API's environment "
        "says where.",
    )
    parser.add_argument("item", help="what is sold, its itemId")
    item: str = parser.parse_args().item
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())
    try:
        published = asyncio.run(_run(item, os.environ))
    except FlashsaleError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    print(f"{item}: {published} reservations published again; flashsalectl audit says the rest")
    return 0


async def _run(item_id: str, environ: Mapping[str, str]) -> int:
    settings = load(Settings, environ)
    redis = redis_client.connect(settings.redis_url)
    producer = AIOKafkaProducer(**settings.kafka_client(), acks="all")
    try:
        async with asyncio.timeout(ACKNOWLEDGED_SECONDS):
            await producer.start()
        return await republish(redis, producer, item_id)
    except (KafkaError, TimeoutError) as error:
        raise NotPublished(f"Kafka is away, run it again: {error!r}") from error
    finally:
        await producer.stop()
        await redis.aclose()


async def republish(redis: "Redis", producer: AIOKafkaProducer, item_id: str) -> int:
    """Publishes them, each under the sale as it is now; returns how many.

    Raises `NotPublished`, `RedisUnavailable`, and `KafkaError` or `TimeoutError` if Kafka has not
    acknowledged all of them.
    """
    sale = (await Inventory(redis).sales([item_id])).get(item_id)
    if sale is None:
        raise NotPublished(f"{item_id}: Redis has no sale of this item, and so nothing to publish")
    snapshot = Snapshot(sale.sale_id, sale.allocated, sale.allocated + sale.released, sale.revision)
    cursor, published = 0, 0
    while True:
        scanned = redis.hscan(ItemKeys.of(item_id).reservations, cursor, count=PAGE)
        cursor, page = await translated(cast("Awaitable[tuple[int, dict[str, str]]]", scanned))
        async with asyncio.timeout(ACKNOWLEDGED_SECONDS):
            sent = [
                await producer.send(
                    events.TOPIC,
                    events.encode(Event.of(item_id, reservation_id, Record.parse(text), snapshot)),
                    key=reservation_id.encode(),
                    headers=events.headers(""),
                )
                for reservation_id, text in page.items()
            ]
            await asyncio.gather(*sent)
        published += len(page)
        if not cursor:
            return published


if __name__ == "__main__":
    sys.exit(main())
