"""An order service: charges for each hold that the ledger recorded, then confirms or cancels it.

It prints its decisions as lines of JSON. docs/events.md explains each step.
"""

import argparse
import asyncio
import json
import os
import random
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from aiokafka import AIOKafkaConsumer

DECISIONS = {"confirmed": "ship", "cancelled": "void", "expired": "void", "refused": "apologise"}
newest: dict[str, tuple[int, bool]] = {}  # in a real shop, two columns of its orders


async def receive(data: dict, options: argparse.Namespace) -> None:
    """Act on a message, unless the same or a newer one was received before."""
    identity = f"{data['saleId']}/{data['reservationId']}"
    rank = (data["version"], data["verdict"] == "recorded")
    if rank > newest.get(identity, (0, False)):
        held = data["state"] == "held"
        decision = await charge(data, options) if held else DECISIONS[data["state"]]
        print(json.dumps({"decision": decision, **data}), flush=True)
        newest[identity] = rank


async def charge(data: dict, options: argparse.Namespace) -> str:
    """Authorise, confirm, and capture. A repeat after a crash gives the same result."""
    order = f"order-{data['reservationId']}"
    paid = random.Random(order).random() >= options.decline_rate
    path = f"sales/{data['itemId']}/reservations/{data['reservationId']}"
    url = f"{options.orders}/{path}/{'confirm' if paid else 'cancel'}"
    while (answer := await asyncio.to_thread(call, url, order))[0] in (202, 429, 500, 503):
        await asyncio.sleep(answer[1])
    return "capture" if paid and answer[0] == 200 else "void"


def call(url: str, order: str) -> tuple[int, float]:
    """Call the order port. Returns the status, and the seconds to wait before a repeat."""
    token = os.environ["FLASHSALE_ORDER_TOKENS"].partition(",")[0]
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        with urlopen(
            Request(url, json.dumps({"orderRef": order}).encode(), headers), timeout=10
        ) as answer:
            return answer.status, float(answer.headers.get("Retry-After", 1))
    except HTTPError as error:
        return error.code, float(error.headers.get("Retry-After", 1))
    except OSError:  # no answer
        return 503, 1.0


async def main(options: argparse.Namespace) -> None:
    async with AIOKafkaConsumer(
        f"{options.engine}.recorded",
        bootstrap_servers=options.kafka,
        group_id="order-service",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    ) as consumer:
        while True:
            for records in (await consumer.getmany(timeout_ms=500, max_records=100)).values():
                for record in records:
                    if dict(record.headers)["ce_type"].startswith(b"dev.flashsale.reservation."):
                        await receive(json.loads(record.value), options)
            await consumer.commit()  # after the work, so that a crash repeats it


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="flashsale", help="the engine's name")
    parser.add_argument("--kafka", default="localhost:9092", help="Kafka's brokers")
    parser.add_argument("--orders", default="http://localhost:8083", help="the order port")
    parser.add_argument("--decline-rate", type=float, default=0.1, help="share of failing payments")
    chosen = parser.parse_args()
    if not os.environ.get("FLASHSALE_ORDER_TOKENS"):
        parser.error("FLASHSALE_ORDER_TOKENS must be a token of the order port")
    asyncio.run(main(chosen))
