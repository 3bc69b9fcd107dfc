"""Buyers who do not give up, and the journal of every answer that they were given."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dev.crowd import Attempt, Connection, Entry

BUYERS: Final = 10
PATIENCE_SECONDS: Final = 3.0
LEAVING: Final = 0.01
"""Of the requests, those whose buyer is gone before the answer and comes back for it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request and its answer; times are Unix seconds, `api` is the number of the process.

    `status` 0: there was none.
    """

    api: int
    user: str
    key: str
    quantity: int
    sent: float
    received: float
    status: int
    kind: str
    reservation_id: str = ""

    def told(self, began: float) -> str:
        """A line about it; `began` is what its seconds count from."""
        order = f"{self.user} x {self.quantity}, {f'key {self.key}' if self.key else 'no key'}"
        return (
            f"{self.sent - began:8.3f} to {self.received - began:8.3f} s  API {self.api + 1}  "
            f"{order}: {self.status} {self.kind} {self.reservation_id}".rstrip()
        )


class Crowd:
    """Asks two APIs for one item until it is told to go home."""

    def __init__(
        self, urls: Sequence[str], item: str, *, seed: int, users: int, max_per_user: int
    ) -> None:
        self._urls = urls
        self._item = item
        self._seed = seed
        self._users = users
        self._max_per_user = max_per_user
        self._home = asyncio.Event()
        self.journal: list[Answer] = []

    async def run(self) -> None:
        """Returns once everybody has gone home."""
        async with asyncio.TaskGroup() as buyers:
            for number in range(BUYERS):
                buyers.create_task(self._buy(random.Random(self._seed * 100 + number)))

    def go_home(self) -> None:
        """Nobody begins anything new."""
        self._home.set()

    async def ask(self, api: int, user: str, key: str, quantity: int) -> Answer:
        """One request on a connection of its own."""
        connection = Connection(self._urls[api])
        try:
            return await self._send(connection, api, user, key, quantity)
        finally:
            connection.close()

    async def _buy(self, chance: random.Random) -> None:
        connections = [Connection(url) for url in self._urls]
        try:
            while not self._home.is_set():
                user = f"user-{chance.randrange(self._users)}"
                # The same key always asks for the same.
                number = chance.randrange(3)
                quantity = 1 + (number if number < self._max_per_user else 0)
                key = f"{user}-{number}" if chance.random() < 0.7 else ""
                await self._insist(connections, chance, user, key, quantity)
                await asyncio.sleep(chance.uniform(0.01, 0.05))
        finally:
            for connection in connections:
                connection.close()

    async def _insist(
        self,
        connections: Sequence[Connection],
        chance: random.Random,
        user: str,
        key: str,
        quantity: int,
    ) -> None:
        while True:
            api = chance.randrange(len(connections))
            leaves = chance.random() < LEAVING
            answer = await self._send(
                connections[api], api, user, key, quantity, 0.005 if leaves else PATIENCE_SECONDS
            )
            if answer.status not in (0, 503) or not key or self._home.is_set():
                return
            await asyncio.sleep(chance.uniform(0.05, 0.3))

    async def _send(
        self,
        connection: Connection,
        api: int,
        user: str,
        key: str,
        quantity: int,
        patience: float = PATIENCE_SECONDS,
    ) -> Answer:
        body: dict[str, object] = {"userId": user, "itemId": self._item, "quantity": quantity}
        attempt, sent = Attempt(user, body, key), time.time()
        try:
            async with asyncio.timeout(patience):
                entry = await connection.send(attempt)
        except TimeoutError:
            connection.close()
            entry = Entry(attempt, 0, {}, time.time(), patience)
        answer = Answer(
            api=api,
            user=user,
            key=key,
            quantity=quantity,
            sent=sent,
            received=entry.received_at,
            status=entry.status,
            kind=entry.outcome,
            reservation_id=str(entry.answer.get("reservationId", "")),
        )
        self.journal.append(answer)
        return answer
