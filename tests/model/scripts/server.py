"""A real server that the sequences run on, and the mistakes that can be made in its scripts."""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from hashlib import sha1
from typing import Any, NamedTuple, TypeVar

from redis import Redis

from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale_operator.sales.recovery import Recovery

T = TypeVar("T")


class Fault(NamedTuple):
    """A mistake in a script: the correct text and the wrong one."""

    script: str
    right: str
    wrong: str

    def into(self, *clients: Inventory | Outbox | Recovery) -> None:
        name = f"_{self.script}"
        [script] = [getattr(client, name) for client in clients if hasattr(client, name)]
        assert script.source.count(self.right) == 1
        script.source = script.source.replace(self.right, self.wrong)
        script.sha = sha1(script.source.encode(), usedforsecurity=False).hexdigest()


@dataclass(slots=True)
class Connected:
    """A server, and the event loop of all calls to it."""

    loop: asyncio.AbstractEventLoop
    redis: Redis
    """Sends the commands of the test itself. It is quicker without a loop."""
    inventory: Inventory
    outbox: Outbox
    recovery: Recovery
    run_id: str
    names: Iterator[int]
    seen: Counter[str]

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        # `Runner.run` would also set and reset a handler of signals.
        return self.loop.run_until_complete(call)
