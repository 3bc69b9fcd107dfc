"""Compare the Lua scripts on a real server with their model, in random sequences of calls."""

import asyncio
import itertools
import os
import secrets
from collections import Counter

from hypothesis import Phase
from redis import Redis

from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale_operator.sales.recovery import Recovery
from tests.model.scripts.item import Item
from tests.model.scripts.machine import LEASE_MS
from tests.model.scripts.server import Connected, Fault
from tests.model.scripts.stories import Stories
from tests.support.sequences import run_sequences

STEPS = 50
SEARCH = 4_000
"""Sequences among which one must show a mistake. Most mistakes show within the first hundred."""


def compared(
    server: RedisServer, *phases: Phase, examples: int, fault: Fault | None
) -> Counter[str]:
    """Runs sequences on a server and returns counts of the results."""
    with asyncio.Runner() as runner:
        client = redis_client.connect(server.url)
        inventory = Inventory(client, outbox_limit=Item().outbox_limit)
        outbox, recovery = Outbox(client), Recovery(client)
        recovery.longest_lease_ms = LEASE_MS
        if fault is not None:
            fault.into(inventory, outbox, recovery)
        run_id = runner.run(inventory.server()).run_id
        redis = Redis.from_url(server.url, decode_responses=True)
        connected = Connected(
            runner.get_loop(),
            redis,
            inventory,
            outbox,
            recovery,
            run_id,
            itertools.count(),
            Counter(),
        )
        machine = type("OnServer", (Stories,), {"server": connected})
        first = secrets.randbits(64) if os.environ.get("FLASHSALE_MODEL_RANDOM") == "1" else 0
        try:
            run_sequences(machine, examples, STEPS, first=first, phases=phases)
        finally:
            redis.close()
            runner.run(client.aclose())
    return connected.seen


def find(fault: Fault, server: RedisServer) -> None:
    """Runs sequences on a server until one shows the mistake. Raises the error of the check."""
    compared(server, Phase.generate, examples=SEARCH, fault=fault)
