"""Buyers of a sale with holds, of whom some never pay, until every unit is paid.

The buyers reserve at the API, and the shop confirms over the order port. A buyer who is refused
looks again until all units are confirmed.
"""

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import asyncpg

from dev.crowd import Client, order_request
from dev.journal import Attempt, Journal
from dev.services import Addresses

LIMIT_SECONDS: Final = 60.0
"""After this time the buyers and the shop give up, whatever is confirmed."""
AGAIN_SECONDS: Final = 0.05
"""How long a refused buyer waits, and how long the shop waits for Kafka."""


@dataclass(slots=True)
class Checkout:
    """The answers to the buyers, and the order of each confirmation that was answered 200."""

    journal: Journal = field(default_factory=Journal)
    confirmed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The sale in the ledger. `expired` counts holds, `resold` units.

    `broken` counts confirmations that were answered 200 and are not in the ledger as such.
    """

    expired: int
    resold: int
    confirmed: int
    broken: int


async def checkout(  # noqa: PLR0913 - the crowd
    api_url: str,
    orders_url: str,
    token: str,
    item_id: str,
    *,
    buyers: int,
    units: int,
    seed: int,
    token_of: Callable[[str], str] = lambda _: "",
) -> Checkout:
    """Sell until all units are confirmed. A third of the buyers leave without paying.

    `token` is the order service's, and `token_of` returns a buyer's.
    """
    made = Checkout()
    deadline = time.monotonic() + LIMIT_SECONDS
    chance = random.Random(seed)
    waiting = deque((f"guest-{number}", chance.random() < 2 / 3) for number in range(buyers))

    async def buy(shop: Client, till: Client) -> None:
        while waiting and len(made.confirmed) < units and time.monotonic() < deadline:
            user_id, pays = waiting.popleft()
            body: dict[str, object] = {"userId": user_id, "itemId": item_id, "quantity": 1}
            entry = await shop.send(Attempt(user_id, body, token=token_of(user_id)))
            made.journal.entries.append(entry)
            if entry.status != 202:
                waiting.append((user_id, pays))
                await asyncio.sleep(AGAIN_SECONDS)
            elif pays:
                await confirm(till, str(entry.answer["reservationId"]))

    async def confirm(till: Client, reservation_id: str) -> None:
        order_ref = f"order-{reservation_id[:8]}"
        path = f"/sales/{item_id}/reservations/{reservation_id}/confirm"
        request = order_request(path, json.dumps({"orderRef": order_ref}).encode(), token)
        status = 0
        while status in (0, 202, 503) and time.monotonic() < deadline:
            status, _ = await till.request(request)
            if status == 200:
                made.confirmed[reservation_id] = order_ref
            elif status != 409:
                await asyncio.sleep(AGAIN_SECONDS)

    clients = [(Client(api_url), Client(orders_url)) for _ in range(min(buyers, 100))]
    try:
        async with asyncio.TaskGroup() as group:
            for pair in clients:
                group.create_task(buy(*pair))
    finally:
        for pair in clients:
            for client in pair:
                client.close()
    return made


async def outcome(addresses: Addresses, sale_id: str, made: Checkout) -> Outcome:
    """Compare the confirmations with the ledger, which has all events already."""
    connection = await asyncpg.connect(addresses.database_url)
    try:
        rows = await connection.fetch(
            "SELECT reservation_id::text AS id, state, quantity, order_ref FROM reservations "
            "WHERE sale_id = $1",
            sale_id,
        )
        sale = await connection.fetchrow("SELECT * FROM sales WHERE sale_id = $1", sale_id)
    finally:
        await connection.close()
    if sale is None:
        raise LookupError(f"the ledger has no sale {sale_id}")
    orders = {row["id"]: row["order_ref"] for row in rows if row["state"] == "confirmed"}
    return Outcome(
        expired=sum(row["state"] == "expired" for row in rows),
        resold=sale["accepted"] - sale["allocated"],
        confirmed=sum(row["quantity"] for row in rows if row["state"] == "confirmed"),
        broken=sum(orders.get(own_id) != ref for own_id, ref in made.confirmed.items()),
    )
