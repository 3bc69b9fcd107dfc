"""A crowd on one core: `python -m bench.load` reads a `Plan` (JSON) and prints a `Tally` (JSON).

Closed loop: every connection sends its next request when the last was answered. Open loop: requests
are sent at a constant rate whatever the API does, and a request's latency counts from when it was
to be sent: one that had to wait for a free connection, or for this process, waited as a buyer does.
"""

import asyncio
import sys
import time
from array import array
from collections import Counter, deque
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import uvloop

TICK_SECONDS: Final = 0.001
"""Arrivals of the open loop are gathered to this, since timers are no finer."""

DRAIN_SECONDS: Final = 15.0
"""How long answers are waited for after the last request was sent."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to send. `users` begins every user id and, with `keys`, every key: fresh ones each run.

    `rate` in requests a second makes it an open loop. `samples` is a file for (when it was to be
    sent, seconds it took, status) of each request as doubles, `journal` one for the id of each
    accepted reservation and the Unix seconds at which its 202 came.
    """

    urls: list[str]
    items: list[str]
    users: str
    seconds: float
    connections: int = 100
    keys: bool = False
    rate: float | None = None
    samples: str | None = None
    journal: str | None = None


class Tally(msgspec.Struct, frozen=True):
    """What was answered. Latencies are milliseconds, of all requests; `cpu_seconds` its own."""

    requests: int
    seconds: float
    statuses: dict[str, int]
    p50: float
    p95: float
    p99: float
    cpu_seconds: float

    @property
    def rps(self) -> float:
        """Answers a second."""
        return self.requests / self.seconds


class Crowd:
    """The connections and what they were answered."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.latencies = array("d")
        self.due = array("d")
        self.statuses = array("d")
        self.journal: list[tuple[str, float]] = []
        self.sending = True
        self.outstanding = 0
        self._number = 0
        # In turn, so that none is idle for so long that the API closes it.
        self._free: deque[Connection] = deque()
        self._late: deque[float] = deque()
        self._templates = [self._template(item) for item in plan.items]

    def _template(self, item: str) -> bytes:
        body = f'{{"userId":"{self.plan.users}-NNNNNNNNN","itemId":"{item}","quantity":1}}'
        key = f"Idempotency-Key: {self.plan.users}-NNNNNNNNN\r\n" if self.plan.keys else ""
        head = (
            "POST /reserve HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"{key}Content-Length: {len(body)}\r\n\r\n"
        )
        return (head + body).encode().replace(b"%", b"%%").replace(b"NNNNNNNNN", b"%(n)09d")

    def request(self) -> bytes:
        number = self._number
        self._number += 1
        return self._templates[number % len(self._templates)] % {b"n": number}

    def answered(self, connection: "Connection", status: int, data: bytes) -> None:
        now = time.perf_counter()
        self.latencies.append(now - connection.due)
        self.due.append(connection.due)
        self.statuses.append(status)
        self.outstanding -= 1
        if status == 202 and self.plan.journal:
            begin = data.index(b'"reservationId":"') + 17
            self.journal.append((data[begin : begin + 36].decode(), time.time()))
        if self.plan.rate is None:
            if self.sending:
                self.outstanding += 1
                connection.send(now)
        elif self._late:
            connection.send(self._late.popleft())
        else:
            self._free.append(connection)

    async def run(self) -> Tally:
        loop = asyncio.get_running_loop()
        addresses = [urlsplit(url) for url in self.plan.urls]
        connections: list[Connection] = []
        for number in range(self.plan.connections):
            address = addresses[number % len(addresses)]
            _, connection = await loop.create_connection(
                lambda: Connection(self), address.hostname or "", address.port or 80
            )
            connections.append(connection)
        cpu, begun = time.process_time(), time.perf_counter()
        if self.plan.rate is None:
            self.outstanding = len(connections)
            for connection in connections:
                connection.send(begun)
            await asyncio.sleep(self.plan.seconds)
        else:
            self._free.extend(connections)
            await self._arrive(begun, self.plan.rate)
        self.sending = False
        seconds = time.perf_counter() - begun
        within = len(self.latencies)
        deadline = time.perf_counter() + DRAIN_SECONDS
        while self.outstanding and time.perf_counter() < deadline:
            await asyncio.sleep(0.005)
        if self.outstanding:
            raise SystemExit(f"{self.outstanding} requests had no answer after {DRAIN_SECONDS} s")
        cpu = time.process_time() - cpu
        for connection in connections:
            connection.close()
        return self._tally(seconds, within, cpu)

    async def _arrive(self, begun: float, rate: float) -> None:
        sent, tick = 0, 0
        ticks = round(self.plan.seconds / TICK_SECONDS)
        while tick < ticks:
            now = time.perf_counter()
            while tick < ticks and begun + tick * TICK_SECONDS <= now:
                due = begun + tick * TICK_SECONDS
                tick += 1
                until = int(tick * TICK_SECONDS * rate)
                self.outstanding += until - sent
                for _ in range(until - sent):
                    if self._free:
                        self._free.popleft().send(due)
                    else:
                        self._late.append(due)
                sent = until
            await asyncio.sleep(max(0.0, begun + tick * TICK_SECONDS - time.perf_counter()))

    def _tally(self, seconds: float, within: int, cpu: float) -> Tally:
        ordered = sorted(self.latencies)
        statuses = Counter(int(status) for status in self.statuses)
        # A closed loop is cut off with its last requests in flight, which its rate leaves out.
        requests = within if self.plan.rate is None else len(ordered)
        return Tally(
            requests=requests,
            seconds=seconds,
            statuses={str(status): count for status, count in sorted(statuses.items())},
            p50=rank(ordered, 50) * 1000,
            p95=rank(ordered, 95) * 1000,
            p99=rank(ordered, 99) * 1000,
            cpu_seconds=cpu,
        )


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request in flight at most."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._answer = b""
        self.due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def send(self, due: float) -> None:
        self.due = due
        self._transport.write(self._crowd.request())  # type: ignore[attr-defined] # TCP has it

    def data_received(self, data: bytes) -> None:
        if self._answer:
            data = self._answer + data
        head = data.find(b"\r\n\r\n")
        if head >= 0:
            begin = data.index(b"content-length: ") + 16
            size = int(data[begin : data.index(b"\r", begin)])
            if len(data) == head + 4 + size:
                self._answer = b""
                self._crowd.answered(self, int(data[9:12]), data)
                return
        self._answer = data

    def connection_lost(self, exc: Exception | None) -> None:
        if self._crowd.outstanding:
            raise SystemExit(f"the API closed a connection: {exc}")

    def close(self) -> None:
        self._transport.close()


def rank(ordered: "list[float] | array[float]", percent: float) -> float:
    """The nearest-rank percentile of sorted values; 0 of none."""
    if not ordered:
        return 0.0
    return ordered[max(0, -(-len(ordered) * percent // 100).__int__() - 1)]


def main() -> int:
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    crowd = Crowd(plan)
    tally = uvloop.run(crowd.run())
    if plan.samples:
        with Path(plan.samples).open("wb") as file:
            for values in (crowd.due, crowd.latencies, crowd.statuses):
                values.tofile(file)
    if plan.journal:
        Path(plan.journal).write_bytes(msgspec.json.encode(crowd.journal))
    sys.stdout.buffer.write(msgspec.json.encode(tally))
    return 0


if __name__ == "__main__":
    sys.exit(main())
