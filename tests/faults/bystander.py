"""A sale on another node of a Redis Cluster than the one that a schedule's faults hit."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from dev.crowd import Client, percentile
from dev.journal import Attempt, Entry
from tests.faults.check import Broken
from tests.faults.redis_shards import shard_of, spared
from tests.faults.schedule import ON_TOP, Kind, Schedule
from tests.faults.world import Sale

STOCK: Final = 1_000_000
PAUSE_SECONDS: Final = 0.02
_number = itertools.count()


def bystander_of(item: str) -> Sale:
    """Return a sale of an item on a node that no fault of the given item's sale hits."""
    while shard_of(name := f"bystander-{next(_number)}") != spared(shard_of(item)):
        pass
    return Sale(name, max_per_user=1, stock=STOCK, highest_stock=STOCK)


class Bystander:
    """A buyer of that sale, who sends one request after the other until `stop` is called."""

    def __init__(
        self, urls: Sequence[str], sale: Sale, token_of: Callable[[str], str] | None = None
    ) -> None:
        self._urls = urls
        self._token_of = token_of
        self.sale = sale
        self._stopped = asyncio.Event()
        self.journal: list[Entry] = []

    async def run(self) -> None:
        clients = [Client(url) for url in self._urls]
        for number in itertools.count():
            if self._stopped.is_set():
                break
            user = f"user-{number}-{time.time_ns()}"
            body: dict[str, object] = {"userId": user, "itemId": self.sale.item, "quantity": 1}
            token = self._token_of(user) if self._token_of else ""
            attempt = Attempt(user, body, f"key-{user}", token)
            entry = await clients[number % len(clients)].send(attempt)
            self.journal.append(entry)
            await asyncio.sleep(PAUSE_SECONDS)
        for client in clients:
            client.close()

    def stop(self) -> None:
        self._stopped.set()

    def check(self, schedule: Schedule) -> str:
        """Raise Broken if the faults of another node alone have refused a request.

        Returns the answers as text.
        """
        kinds = {step.kind for step in schedule.steps}
        if Kind.REDIS_TWO_LOST not in kinds and all(
            kind.name.startswith("REDIS_") or kind in ON_TOP for kind in kinds
        ):
            refused = Counter(entry.outcome for entry in self.journal if entry.status != 202)
            if refused:
                raise Broken(f"a sale on another node was refused: {dict(refused)}")
        return str(self)

    def __str__(self) -> str:
        counts = Counter(entry.status for entry in self.journal)
        p95 = percentile((entry.seconds for entry in self.journal), 95)
        return (
            f"on another node: {len(self.journal)} answers, {counts[202]} of them 202 and "
            f"{counts[503]} of them 503, P95 {p95 * 1000:.0f} ms"
        )
