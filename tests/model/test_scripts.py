"""Random sequences of calls compare the Lua scripts on real servers with their model.

`FLASHSALE_MODEL_EXAMPLES=5000` runs more sequences, and `FLASHSALE_MODEL_RANDOM=1` other ones each
time. Needs the Redis servers of the stack.
"""

import asyncio
import itertools
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    run_state_machine_as_test,
)

from dev.stack.packages import redis_binaries
from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.inventory import Applied, Closed, Freed, Inventory
from flashsale.outbox import Outbox
from flashsale.reservations import Outcome
from flashsale_operator.sales.recovery import Fenced, Recovery
from tests.model.mutations import FAULTS, Fault
from tests.model.on_server import Connected
from tests.model.scripts import Item
from tests.model.sequences import Scripts

EXAMPLES = int(os.environ.get("FLASHSALE_MODEL_EXAMPLES", "200"))
STEPS = 40


def _compared(
    server: RedisServer, *phases: Phase, examples: int, fault: Fault | None
) -> Counter[str]:
    """Runs sequences on a server and returns counts of the results."""
    with asyncio.Runner() as runner:
        client = redis_client.connect(server.url)
        inventory = Inventory(client, outbox_limit=Item().outbox_limit)
        outbox, recovery = Outbox(client), Recovery(client)
        if fault is not None:
            fault.into(inventory, outbox, recovery)
        run_id = runner.run(inventory.server()).run_id
        connected = Connected(
            runner, client, inventory, outbox, recovery, run_id, itertools.count(), Counter()
        )
        machine = type("OnServer", (Scripts,), {"server": connected})
        try:
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=STEPS,
                    phases=phases,
                    derandomize=os.environ.get("FLASHSALE_MODEL_RANDOM") != "1",
                    database=None,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(client.aclose())
    return connected.seen


@pytest.mark.parametrize("kind", sorted(redis_binaries()))
def test_the_scripts_agree_with_their_model(kind: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path, binary=redis_binaries()[kind]) as server:
        seen = _compared(server, Phase.generate, Phase.shrink, examples=EXAMPLES, fault=None)
    # Sequences without these results would prove nothing.
    decided = {*Outcome} - {Outcome.UNSUPPORTED}
    assert seen["rebuilt"]
    answered = {f"apply: {answer}" for answer in Applied if answer is not Applied.UNSUPPORTED}
    answered |= {f"free: {answer}" for answer in Freed if answer is not Freed.UNSUPPORTED}
    answered |= {f"close: {answer}" for answer in Closed if answer is not Closed.UNSUPPORTED}
    answered |= {f"fence: {answer}" for answer in Fenced if answer is not Fenced.UNSUPPORTED}
    assert len((decided | answered) - seen.keys()) <= 3, (decided | answered) - seen.keys()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.script}: {fault.right}")
def test_a_mistake_in_a_script_is_found(fault: Fault, redis_server: RedisServer) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - any check may fail first
        _compared(redis_server, Phase.generate, examples=1_000, fault=fault)
