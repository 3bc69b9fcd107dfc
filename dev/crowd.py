"""A crowd of buyers over real HTTP connections that journals every answer it is given.

The journal is the crowd's own: what it was promised is checked against the ledger, never against
what the system says of itself.
"""

import asyncio
import contextlib
import json
import math
import random
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

BAD_REQUESTS: Final = (
    {"quantity": -1},
    {"quantity": 0},
    {"quantity": "2"},
    {"quantity": 1.9},
    {"quantity": None},
    {"quantity": 1001},
    {"userId": None},
    {"userId": "x" * 300},
    {"userId": "nul\x00"},
    {"itemId": "*"},
    {"itemId": "flashsale:{x}:sale"},
)
"""Fields that replace good ones; each must be refused, and take nothing."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request that a buyer wants to make; without a key if that is empty."""

    user_id: str
    body: dict[str, object]
    request_key: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer. `status` 0 means that the connection broke before it came.

    `received_at` is Unix seconds, `seconds` the time from sending to the whole answer.
    """

    attempt: Attempt
    status: int
    answer: dict[str, object]
    received_at: float
    seconds: float

    @property
    def outcome(self) -> str:
        """`202`, or the last part of the problem's type."""
        if self.status in (0, 202):
            return "202" if self.status else "no answer"
        return str(self.answer.get("type", self.status)).rpartition(":")[2]


@dataclass(slots=True)
class Journal:
    """Every answer, in the order of arrival."""

    entries: list[Entry] = field(default_factory=list)

    def outcomes(self) -> Counter[tuple[int, str]]:
        """Answers by status and outcome; repeats of an accepted reservation apart."""
        seen: set[object] = set()
        counts: Counter[tuple[int, str]] = Counter()
        for entry in self.entries:
            outcome = entry.outcome
            if entry.status == 202:
                identity = entry.answer["reservationId"]
                outcome = "replayed" if identity in seen else "accepted"
                seen.add(identity)
            counts[entry.status, outcome] += 1
        return counts

    def accepted(self) -> dict[str, Entry]:
        """The first 202 of each reservation id."""
        first: dict[str, Entry] = {}
        for entry in self.entries:
            if entry.status == 202:
                first.setdefault(str(entry.answer["reservationId"]), entry)
        return first

    def broken_keys(self) -> list[tuple[str, str]]:
        """(user, key) pairs that were given more than one reservation."""
        given: dict[tuple[str, str], set[object]] = {}
        for entry in self.entries:
            if entry.status == 202 and entry.attempt.request_key:
                pair = (entry.attempt.user_id, entry.attempt.request_key)
                given.setdefault(pair, set()).add(entry.answer["reservationId"])
        return [pair for pair, identities in given.items() if len(identities) > 1]


def attempts(item_id: str, users: int, seed: int) -> list[Attempt]:
    """Ten attempts a user, shuffled: one key four times, another key, no key four times, one bad.

    Nobody may get more than one unit of it where the sale allows one a buyer.
    """
    chance = random.Random(seed)
    made = []
    for number in range(users):
        user_id = f"user-{number}"
        good = {"userId": user_id, "itemId": item_id, "quantity": 1}
        key = str(uuid.UUID(int=chance.getrandbits(128)))
        made += [Attempt(user_id, good, key)] * 4
        made += [Attempt(user_id, good, f"{key}-again")]
        made += [Attempt(user_id, good)] * 4
        made += [Attempt(user_id, {**good, **chance.choice(BAD_REQUESTS)})]
    chance.shuffle(made)
    return made


async def stampede(
    urls: Sequence[str],
    wanted: Iterable[Attempt],
    *,
    connections: int = 100,
    tries: int = 1,
    journal: Journal | None = None,
) -> Journal:
    """Sends the attempts over keep-alive connections to the APIs in turn.

    All connections are opened before the first attempt: buyers are there when the sale opens.
    Each connection sends its next attempt when the last was answered. A keyed attempt that gets a
    503 or no answer is sent again, up to `tries` times in all. `journal` is filled as answers come.
    """
    journal = Journal() if journal is None else journal
    queue = deque(wanted)
    everyone = [Connection(urls[number % len(urls)]) for number in range(connections)]
    await asyncio.gather(*(connection.open() for connection in everyone))

    async def buy(connection: Connection) -> None:
        try:
            while queue:
                attempt = queue.popleft()
                for again in range(tries if attempt.request_key else 1):
                    entry = await connection.send(attempt)
                    journal.entries.append(entry)
                    if entry.status not in (0, 503):
                        break
                    await asyncio.sleep(0.05 * 2 ** min(again, 5))
        finally:
            connection.close()

    async with asyncio.TaskGroup() as buyers:
        for connection in everyone:
            buyers.create_task(buy(connection))
    return journal


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


class Connection:
    """One keep-alive connection, opened again when it broke."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 80
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self) -> None:
        """Connects if it is not connected; an API that is away is met by `send`."""
        if self._streams is None:
            with contextlib.suppress(OSError):
                self._streams = await asyncio.open_connection(self._host, self._port)

    async def send(self, attempt: Attempt) -> Entry:
        """Sends one request and waits for its answer."""
        body = json.dumps(attempt.body).encode()
        key = f"Idempotency-Key: {attempt.request_key}\r\n" if attempt.request_key else ""
        head = (
            f"POST /reserve HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: application/json\r\n{key}Content-Length: {len(body)}\r\n\r\n"
        )
        started = time.perf_counter()
        try:
            await self.open()
            if self._streams is None:
                raise ConnectionError
            reader, writer = self._streams
            writer.write(head.encode() + body)
            answer_head = await reader.readuntil(b"\r\n\r\n")
            status = int(answer_head[9:12])
            length = int(answer_head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            answer = json.loads(await reader.readexactly(length))
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            status, answer = 0, {}
        return Entry(attempt, status, answer, time.time(), time.perf_counter() - started)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
