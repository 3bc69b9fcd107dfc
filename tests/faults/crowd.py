"""Buyers who do not give up, and a journal of every answer they got."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from dev.crowd import Client
from dev.journal import Attempt, Entry
from tests.faults.orders import Shop

BUYERS: Final = 10
PATIENCE_SECONDS: Final = 3.0
IMPOSTORS: Final = 0.02
"""The share of requests with no token or another user's, if the API takes buyers from tokens."""
LEAVING: Final = 0.01
"""The share of requests whose buyer disconnects before the answer and asks again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request and its answer. Times are in Unix seconds. `api` is the index of the process.

    `status` is 0 if there was no answer. An `impostor` has not sent a token of the user.
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
    impostor: bool = False

    def line(self, began: float) -> str:
        """Return the answer as one line of text, with seconds since `began`."""
        order = f"{self.user} x {self.quantity}, {f'key {self.key}' if self.key else 'no key'}"
        order += ", no token of this user" if self.impostor else ""
        return (
            f"{self.sent - began:8.3f} to {self.received - began:8.3f} s  API {self.api + 1}  "
            f"{order}: {self.status} {self.kind} {self.reservation_id}".rstrip()
        )


class Crowd:
    """Buyers who ask two APIs for one item until `stop` is called."""

    def __init__(
        self,
        urls: Sequence[str],
        item: str,
        *,
        seed: int,
        users: int,
        max_per_user: int,
        shop: Shop | None = None,
        token_of: Callable[[str], str] | None = None,
    ) -> None:
        """With a `shop`, each reservation goes to it once. `token_of` returns a user's token."""
        self._urls = urls
        self._token_of = token_of
        self._shop = shop
        self._taken: set[str] = set()
        self._item = item
        self._seed = seed
        self._users = users
        self._max_per_user = max_per_user
        self._stopped = asyncio.Event()
        self.journal: list[Answer] = []

    async def run(self) -> None:
        """Buy until `stop` is called and every buyer has finished."""
        async with asyncio.TaskGroup() as buyers:
            for number in range(BUYERS):
                buyers.create_task(self._buy(random.Random(self._seed * 100 + number)))

    def stop(self) -> None:
        """Let no buyer begin a new request."""
        self._stopped.set()

    async def flood(self, buyers: int) -> None:
        """Let so many new buyers send one request each, all at the same time."""
        first = len(self.journal)
        async with asyncio.TaskGroup() as asking:
            for number in range(buyers):
                user = f"flood-{first}-{number}"
                asking.create_task(self.ask(number % len(self._urls), user, f"key-{user}", 1))

    async def ask(self, api: int, user: str, key: str, quantity: int) -> Answer:
        """Send one request on a new connection."""
        client = Client(self._urls[api])
        try:
            return await self._send(client, api, user, key, quantity)
        finally:
            client.close()

    async def _buy(self, chance: random.Random) -> None:
        clients = [Client(url) for url in self._urls]
        try:
            while not self._stopped.is_set():
                user = f"user-{chance.randrange(self._users)}"
                # A key always asks for the same quantity.
                number = chance.randrange(3)
                quantity = 1 + (number if number < self._max_per_user else 0)
                key = f"{user}-{number}" if chance.random() < 0.7 else ""
                if self._token_of and chance.random() < IMPOSTORS:
                    api, other = chance.randrange(len(clients)), chance.choice(("", "impostor"))
                    await self._send(clients[api], api, user, key, quantity, named_by=other)
                await self._insist(clients, chance, user, key, quantity)
                await asyncio.sleep(chance.uniform(0.01, 0.05))
        finally:
            for client in clients:
                client.close()

    async def _insist(
        self,
        clients: Sequence[Client],
        chance: random.Random,
        user: str,
        key: str,
        quantity: int,
    ) -> None:
        while True:
            api = chance.randrange(len(clients))
            patience = 0.005 if chance.random() < LEAVING else PATIENCE_SECONDS
            answer = await self._send(clients[api], api, user, key, quantity, patience)
            if answer.status not in (0, 503) or not key or self._stopped.is_set():
                return
            await asyncio.sleep(chance.uniform(0.05, 0.3))

    async def _send(
        self,
        client: Client,
        api: int,
        user: str,
        key: str,
        quantity: int,
        patience: float = PATIENCE_SECONDS,
        named_by: str | None = None,
    ) -> Answer:
        """Send a request with the token of its user, of `named_by`, or none if that is empty."""
        body: dict[str, object] = {"userId": user, "itemId": self._item, "quantity": quantity}
        named = user if named_by is None else named_by
        token = self._token_of(named) if self._token_of and named else ""
        attempt, sent = Attempt(user, body, key, token), time.time()
        try:
            async with asyncio.timeout(patience):
                entry = await client.send(attempt)
        except TimeoutError:
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
            impostor=named != user,
        )
        self.journal.append(answer)
        if answer.status == 202 and self._shop and answer.reservation_id not in self._taken:
            self._taken.add(answer.reservation_id)
            self._shop.take(answer.reservation_id)
        return answer
