"""Measures holds: their cost, confirmations, and the expiry of many holds at once."""

import asyncio
import time
from functools import partial
from typing import Final

import msgspec

from bench.outages import phases
from bench.recording import SHARE
from bench.requests import OPEN_CONNECTIONS, Scale, in_turn
from bench.results import Expiry, Holds, Round
from bench.rig import Api, Rig
from bench.scripts import buyers, trim
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.redis_client import connect
from flashsale.reservations import BATCH_LIMIT, BatchReply

CONFIRMATIONS: Final = 5_000
"""Confirmations per second at which their latency is measured."""
_MOST: Final = 30_000
"""More confirmations per second than a core can make."""
PLAIN, HELD = "accepted", "accepted as a hold"
FASTEST, STEADY = "confirmed", f"confirmed, {CONFIRMATIONS:,} per second"

HOLD_SECONDS: Final = 3600
"""No hold ends before the benchmark makes it due."""
_EXPIRED_PER_SECOND: Final = 4_000
"""How long the buyers go on while holds expire. It is slower than a quiet machine."""
_EXPIRED_SECONDS: Final = 120.0
_DUE_MS: Final = 1


def holds(rig: Rig, scale: Scale, api: Api, capacity: float, run: str) -> Holds:
    """Measure all of it. `capacity` is in accepted requests per second."""
    accepted = in_turn(
        {
            PLAIN: partial(rig.round, [api], rig.sales()),
            HELD: partial(rig.round, [api], rig.sales(hold_seconds=HOLD_SECONDS)),
        },
        scale,
    )
    [item] = rig.sales(hold_seconds=HOLD_SECONDS)
    confirmed = in_turn(
        {
            FASTEST: partial(_confirm, rig, api, item),
            STEADY: partial(_confirm, rig, api, item, rate=CONFIRMATIONS),
        },
        scale,
    )
    return Holds(run, accepted, confirmed, _expiry(rig, scale, api, capacity * SHARE))


def _confirm(rig: Rig, api: Api, item: str, seconds: float, *, rate: float | None = None) -> Round:
    """Make new holds, and confirm as many as there is time for."""
    ids = asyncio.run(hold(rig, item, int((rate or _MOST) * seconds) + OPEN_CONNECTIONS))
    journal = rig.data / "held.json"
    journal.write_bytes(msgspec.json.encode([(identity, 0.0) for identity in ids]))
    return rig.round(
        [api], [item], seconds, connections=OPEN_CONNECTIONS, rate=rate, confirm=journal
    )


def _expiry(rig: Rig, scale: Scale, api: Api, rate: float) -> Expiry:
    """Make many holds due at once, while buyers of the same sale send requests."""
    [item] = rig.sales(hold_seconds=HOLD_SECONDS)
    asyncio.run(hold(rig, item, scale.holds))
    calm = scale.calm_seconds
    crowd = rig.crowd(
        [api],
        [item],
        2 * calm + scale.holds / _EXPIRED_PER_SECOND,
        connections=OPEN_CONNECTIONS,
        rate=rate,
        samples=rig.data / "samples",
    )
    time.sleep(1 + calm)
    due, expired, sold_again = asyncio.run(expire(rig, item, scale.holds))
    print(
        f"    {scale.holds:,} holds expired in {expired - due:.1f} s, and their units were for "
        f"sale again after {sold_again - due:.1f} s",
        flush=True,
    )
    tally = crowd.tally()
    print(f"    {tally.requests:,} requests: {tally.statuses}", flush=True)
    rig.drain([item])
    samples = crowd.samples()
    spans = [
        ("before", samples[0].due, due),
        ("expiring", due, sold_again),
        ("after", sold_again, samples[-1].due),
    ]
    return Expiry(scale.holds, rate, expired - due, sold_again - due, phases(samples, spans))


async def hold(rig: Rig, item: str, count: int) -> list[str]:
    """Makes holds, and returns their ids."""
    ids = []
    client = connect(rig.redis.url)
    inventory = Inventory(client, outbox_limit=10**9)
    try:
        for made in range(0, count, BATCH_LIMIT):
            batch = buyers(min(BATCH_LIMIT, count - made))
            reply = await inventory.reserve(item, batch, timeout_seconds=10)
            if not isinstance(reply, BatchReply):
                raise SystemExit(f"{item}: {reply}")
            ids += [each.reservation_id for each in batch]
            if made % (100 * BATCH_LIMIT) == 0:
                await trim(client, item)
        await trim(client, item)
    finally:
        await client.aclose()
    return ids


async def expire(rig: Rig, item: str, count: int) -> tuple[float, float, float]:
    """Makes all holds due, and waits for their end.

    Returns the times at which they were due, expired, and for sale again.
    """
    client = connect(rig.redis.url)
    key, sale = ItemKeys.of(item).holds, ItemKeys.of(item).sale
    expired = 0.0
    try:
        async with asyncio.timeout(_EXPIRED_SECONDS):
            # The first members are those of `hold`, because no buyer's hold is due before them.
            ids = [str(each) for each in await client.zrange(key, 0, count - 1)]
            due = time.perf_counter()
            for first in range(0, count, 1_000):
                due_ms = dict.fromkeys(ids[first : first + 1_000], _DUE_MS)
                await client.zadd(key, due_ms, xx=True)
            while int(await client.hget(sale, "released") or 0) < count:
                if not expired and not await client.zcount(key, "-inf", _DUE_MS):
                    expired = time.perf_counter()
                await asyncio.sleep(0.02)
            sold_again = time.perf_counter()
    finally:
        await client.aclose()
    return due, expired or sold_again, sold_again
