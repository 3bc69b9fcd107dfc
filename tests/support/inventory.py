"""Sales, requests and calls for tests that use the inventory without the API."""

import uuid
from collections.abc import Sequence
from dataclasses import replace

from flashsale.inventory import Applied, Inventory
from flashsale.outbox import Outbox
from flashsale.reservations import Answer, BatchReply, Outcome, Request
from flashsale.sale import SaleSpec


def a_sale(item: str, stock: int = 100, **changes: object) -> SaleSpec:
    return replace(SaleSpec(f"default/{item.lower()}", item, stock), **changes)  # type: ignore[arg-type]


def a_request(user: str = "ann", quantity: int = 1, identity: str = "", key: str = "") -> Request:
    return Request(identity or str(uuid.uuid4()), user, quantity, key)


async def opened(inventory: Inventory, spec: SaleSpec) -> SaleSpec:
    """Seeds a sale."""
    assert await inventory.apply(spec, 1, seed_until_ms=2**53) is Applied.SEEDED
    return spec


async def answers(inventory: Inventory, item: str, requests: Sequence[Request]) -> list[Answer]:
    """Sends a batch that Redis decides."""
    reply = await inventory.reserve(item, requests, timeout_seconds=5)
    assert isinstance(reply, BatchReply)
    return list(reply.answers)


async def outcome(inventory: Inventory, item: str, request: Request) -> Outcome:
    """Sends one request."""
    reply = await inventory.reserve(item, [request], timeout_seconds=5)
    return reply.answers[0].outcome if isinstance(reply, BatchReply) else reply


async def drained(outbox: Outbox, item: str) -> None:
    """Settles all entries of an item, as if Kafka had acknowledged them."""
    entries = (await outbox.page(item, until_ms=2**50, count=10_000)).entries
    named = [(entry.entry_id, entry.reservation_id, entry.record.version) for entry in entries]
    if named:
        assert await outbox.settle(item, named) == len(named)
