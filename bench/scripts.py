"""Redis alone: the CPU time of the scripts, and the memory of a sold sale."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Final, cast

from redis.asyncio import Redis

from bench.machine import cpu_seconds
from bench.requests import Scale, show
from bench.results import Memory, Scripts
from bench.rig import Api, Rig
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.redis_client import connect
from flashsale.reservations import BATCH_LIMIT, BatchReply, Outcome, Request

IN_FLIGHT: Final = 3
"""Calls in flight, as in the API."""


def scripts(rig: Rig, scale: Scale) -> list[Scripts]:
    """Measures the scripts with two batch sizes."""
    found = []
    for number in range(scale.rounds):
        for batch in (64, BATCH_LIMIT):
            [open_item], [sold_item] = rig.sales(), rig.sales(stock=1)
            asyncio.run(_call(rig, sold_item, batch, 0.2))
            accepted, accepted_cpu = asyncio.run(_call(rig, open_item, batch, scale.seconds / 2))
            rejected, rejected_cpu = asyncio.run(_call(rig, sold_item, batch, scale.seconds / 2))
            found.append(
                Scripts(
                    batch=batch,
                    accepted_us=accepted_cpu / accepted * 1e6,
                    rejected_us=rejected_cpu / rejected * 1e6,
                )
            )
            print(
                f"    round {number + 1}  {batch} per call: Redis "
                f"{found[-1].accepted_us:.1f} us per reservation, "
                f"{found[-1].rejected_us:.1f} us per rejection",
                flush=True,
            )
    return found


def memory(rig: Rig, scale: Scale, api: Api) -> list[Memory]:
    """Sells out small and large sales, and then sends more requests."""
    found = []
    for stock in scale.stocks:
        [item] = rig.sales(stock=stock)
        begun = time.monotonic()
        each = asyncio.run(_sell_out(rig, item, stock))
        print(
            f"    {stock:,} sold in {time.monotonic() - begun:.0f} s: "
            f"{each:.0f} bytes per reservation",
            flush=True,
        )
        rounds = []
        for number in range(scale.rounds):
            rounds.append(rig.round([api], [item], scale.seconds / 2, keys=True))
            show(f"refused by a sale of {stock:,}", number, rounds[-1])
        found.append(Memory(stock, each, rounds))
    return found


async def _call(rig: Rig, item: str, batch: int, seconds: float) -> tuple[int, float]:
    """Returns the requests decided in `seconds` and Redis' CPU seconds. Trims the outbox."""
    client = connect(rig.redis.url)
    inventory = Inventory(client, outbox_limit=10**9)
    pid = cast("int", rig.redis.pid)
    decided = 0
    before, until = cpu_seconds(pid), time.monotonic() + seconds

    async def caller() -> None:
        nonlocal decided
        while time.monotonic() < until:
            reply = await inventory.reserve(item, buyers(batch), timeout_seconds=10)
            if not isinstance(reply, BatchReply):
                raise SystemExit(f"{item}: {reply}")
            decided += batch

    try:
        async with asyncio.TaskGroup() as callers:
            for _ in range(IN_FLIGHT):
                callers.create_task(caller())
        spent = cpu_seconds(pid) - before
        await trim(client, item)
    finally:
        await client.aclose()
    return decided, spent


async def _sell_out(rig: Rig, item: str, stock: int) -> float:
    """Returns the bytes per reservation."""
    client = connect(rig.redis.url)
    inventory = Inventory(client, outbox_limit=10**9)
    sold_out = False
    calls = 0

    async def caller() -> None:
        nonlocal sold_out, calls
        while not sold_out:
            reply = await inventory.reserve(item, buyers(BATCH_LIMIT), timeout_seconds=10)
            if not isinstance(reply, BatchReply):
                raise SystemExit(f"{item}: {reply}")
            sold_out = any(answer.outcome is Outcome.SOLD_OUT for answer in reply.answers)
            calls += 1
            if calls % 1_000 == 0:
                await trim(client, item)
            if calls % 5_000 == 0:
                print(f"    … {calls * BATCH_LIMIT:,} of {stock:,} sold", flush=True)

    try:
        before = await _used(client)
        async with asyncio.TaskGroup() as callers:
            for _ in range(IN_FLIGHT):
                callers.create_task(caller())
        await trim(client, item)
        return (await _used(client) - before) / stock
    finally:
        await client.aclose()


def buyers(count: int) -> Sequence[Request]:
    """Makes requests of new users, whose ids have the length of a UUID."""
    ids = [str(uuid.uuid4()) for _ in range(count)]
    return [Request(identity, identity, 1) for identity in ids]


async def trim(client: "Redis", item: str) -> None:
    """Empties the outbox, as publishing and settling would."""
    await client.xtrim(ItemKeys.of(item).outbox, maxlen=0, approximate=False)


async def _used(client: "Redis") -> int:
    info = await client.info("memory")
    return int(info["used_memory"])
