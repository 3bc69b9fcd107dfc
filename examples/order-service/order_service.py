"""An order service: charges for each reservation that the ledger recorded, and ships it.

It prints its decisions as lines of JSON. docs/events.md explains each step.
"""

import argparse
import asyncio
import json
import os
import random
import re
import sys
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from uuid import UUID, uuid5

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaConnectionError

DECISIONS = {"cancelled": "void", "expired": "void", "refused": "apologise"}
TYPES = {f"dev.flashsale.reservation.{state}.v1" for state in ("held", "confirmed", *DECISIONS)}
PROBLEM = "urn:flashsale:problem:"
REFUSALS = {f"{PROBLEM}{kind}" for kind in ("hold-expired", "cancelled", "other-order")}
ENDED = {f"{PROBLEM}{kind}" for kind in ("unknown-item", "unknown-reservation", "other-sale")}
newest: dict[str, tuple[int, bool]] = {}  # in a real shop, these are columns of its orders
paid: set[str] = set()
shipped: set[str] = set()


async def receive(data: dict, options: argparse.Namespace) -> None:
    """Act on a message, unless the same or a newer one was received before."""
    identity = f"{data['saleId']}/{data['reservationId']}"
    rank = (data["version"], data["verdict"] == "recorded")
    if rank <= newest.get(identity, (0, False)):
        return
    # A later sale of the item can have a reservation with the same id. It is another order.
    order = f"order-{uuid5(UUID(data['reservationId']), data['saleId'])}"
    if data["state"] == "held":
        await charge(identity, data, order, options)
    elif data["state"] != "confirmed":
        decide(DECISIONS[data["state"]], data)
    elif identity not in shipped and data.get("orderRef", order) == order:
        if "expiresAt" not in data:  # it was never held, so this is its first message
            decide("charge", data)
        elif identity not in paid:  # this service may have ended before it captured
            decide("capture", data)
        decide("ship", data)
        shipped.add(identity)
    newest[identity] = rank


def decide(decision: str, data: dict) -> None:
    print(json.dumps({"decision": decision, **data}), flush=True)


async def charge(identity: str, data: dict, order: str, options: argparse.Namespace) -> None:
    """Authorise, confirm, and capture. A repeat after a crash gives the same result."""
    authorised = random.Random(order).random() >= options.decline_rate
    verb = "confirm" if authorised else "cancel"
    path = f"sales/{data['itemId']}/reservations/{data['reservationId']}/{verb}"
    body = json.dumps({"orderRef": order, "saleId": data["saleId"]}).encode()
    answer = await ask(f"{options.orders.rstrip('/')}/{path}", body)
    if authorised and answer.get("state") == "confirmed":
        decide("capture", data)
        paid.add(identity)
    elif answer.get("type") not in ENDED:  # then the next message says how the hold ended
        decide("void", data)


async def ask(url: str, body: bytes) -> dict:
    """Call the order port until it decides. Returns the reservation or the refusal.

    No other answer is a decision: a wrong token or a gateway's error must not void a payment.
    """
    while True:
        status, answer, after = await asyncio.to_thread(call, url, body)
        if status == 200 or answer.get("type") in REFUSALS | ENDED:
            return answer
        if status not in (202, 503):  # these two are usual
            print(f"{url}: {status} {answer.get('title', '')}; trying again", file=sys.stderr)
        await asyncio.sleep(float(after) if after.isdigit() else 1.0)


def call(url: str, body: bytes) -> tuple[int, dict, str]:
    """Call the order port once. Returns the status, the JSON object, and Retry-After."""
    token = os.environ["FLASHSALE_ORDER_TOKENS"].partition(",")[0]
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        try:
            answer = urlopen(Request(url, body, headers), timeout=10)
        except HTTPError as error:
            answer = error
        with answer:
            return answer.status, dict(json.load(answer)), answer.headers.get("Retry-After", "")
    except (OSError, HTTPException, TypeError, ValueError) as error:
        return 0, {"title": f"{error}"}, ""  # no answer, or not the order port's


async def main(options: argparse.Namespace) -> None:
    consumer = AIOKafkaConsumer(
        f"{options.engine}.recorded",
        bootstrap_servers=options.kafka,
        group_id="order-service",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    try:
        await consumer.start()
        while True:
            for records in (await consumer.getmany(timeout_ms=500, max_records=100)).values():
                for record in records:
                    # Other types are other messages, such as a later version of this one.
                    if dict(record.headers).get("ce_type", b"").decode("latin-1") in TYPES:
                        await receive(json.loads(record.value), options)
            try:
                await consumer.commit()  # after the work, so that a crash repeats it
            except (CommitFailedError, IllegalStateError) as error:
                print(f"other members repeat the work: {error}", file=sys.stderr)
    except KafkaConnectionError as error:
        sys.exit(f"--kafka {options.kafka}: {error}")
    finally:
        await consumer.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="flashsale", help="the engine's name")
    parser.add_argument("--kafka", default="localhost:9092", help="Kafka's brokers")
    parser.add_argument("--orders", default="http://localhost:8083", help="the order port")
    parser.add_argument("--decline-rate", type=float, default=0.1, help="share of failing payments")
    chosen = parser.parse_args()
    if not 0 <= chosen.decline_rate <= 1:
        parser.error("--decline-rate must be a number from 0 to 1")
    if not re.fullmatch(r"[^,\s]+:\d+(,[^,\s]+:\d+)*", chosen.kafka):
        parser.error("--kafka must be HOST:PORT, or several with commas")
    if not os.environ.get("FLASHSALE_ORDER_TOKENS"):
        parser.error("FLASHSALE_ORDER_TOKENS must be a token of the order port")
    asyncio.run(main(chosen))
