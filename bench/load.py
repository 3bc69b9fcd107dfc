"""`python -m bench.load`: one run of a crowd. Reads a `Plan` and prints a `Tally`, both as JSON.

The crowd is a process of its own, so that it can be pinned to a core.
"""

import sys
import time
from array import array
from collections import Counter
from pathlib import Path

import msgspec
import uvloop

from dev.crowd import Load, order_request, percentile, reserve_request


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The requests to send. Each user id begins with `users`, and each key too if `keys` is set.

    With a `rate` in requests per second the loop is open, otherwise it is closed. `samples` names a
    file for the due time, the latency in seconds and the status of each request, as doubles.
    `journal` names a file for the id of each accepted reservation and the Unix time of its 202.
    `confirm` names a file like a journal. The crowd then confirms its reservations, each once, at
    order ports that take `token`.
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
    confirm: str | None = None
    token: str = ""


class Tally(msgspec.Struct, frozen=True):
    """The answers of one run. Latencies are in milliseconds. `cpu_seconds` are the crowd's own."""

    requests: int
    seconds: float
    statuses: dict[str, int]
    p50: float
    p95: float
    p99: float
    cpu_seconds: float

    @property
    def rps(self) -> float:
        """Answers per second."""
        return self.requests / self.seconds


class Run:
    """One run of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.latencies = array("d")
        self.due = array("d")
        self.statuses = array("d")
        self.journal: list[tuple[str, float]] = []
        self._number = 0
        self._held = _held(plan.confirm) if plan.confirm else None
        make = self._template if self._held is None else self._confirmation
        self._templates = [make(item) for item in plan.items]

    async def run(self) -> Tally:
        """Send the plan's requests and wait for all answers."""
        plan = self.plan
        async with Load(plan.urls, plan.connections, self._request, self._record) as load:
            cpu, begun = time.process_time(), time.perf_counter()
            if plan.rate is None:
                await load.closed_loop(plan.seconds)
            else:
                await load.open_loop(plan.seconds, plan.rate)
            seconds, within = time.perf_counter() - begun, len(self.latencies)
            await load.drain()
            cpu = time.process_time() - cpu
        return self._tally(seconds, within, cpu)

    def save(self) -> None:
        """Write the plan's `samples` and `journal`."""
        if self.plan.samples:
            with Path(self.plan.samples).open("wb") as file:
                for values in (self.due, self.latencies, self.statuses):
                    values.tofile(file)
        if self.plan.journal:
            Path(self.plan.journal).write_bytes(msgspec.json.encode(self.journal))

    def _template(self, item: str) -> bytes:
        user = f"{self.plan.users}-NNNNNNNNN"
        body = f'{{"userId":"{user}","itemId":"{item}","quantity":1}}'
        request = reserve_request(body.encode(), user if self.plan.keys else "")
        return request.replace(b"%", b"%%").replace(b"NNNNNNNNN", b"%(n)09d")

    def _confirmation(self, item: str) -> bytes:
        path = f"/sales/{item}/reservations/%(id)s/confirm"
        body = f'{{"orderRef":"{self.plan.users}-NNNNNNNNN"}}'
        request = order_request(path, body.encode(), self.plan.token)
        return request.replace(b"NNNNNNNNN", b"%(n)09d")

    def _request(self) -> bytes:
        number = self._number
        self._number += 1
        values: dict[bytes, object] = {b"n": number}
        if self._held is not None:
            if number >= len(self._held):
                # asyncio only logs any other exception of a callback.
                raise SystemExit(f"all {len(self._held)} holds were confirmed too early")
            values[b"id"] = self._held[number]
        return self._templates[number % len(self._templates)] % values

    def _record(self, due: float, status: int, body: bytes) -> None:
        self.latencies.append(time.perf_counter() - due)
        self.due.append(due)
        self.statuses.append(status)
        if status == 202 and self.plan.journal:
            begin = body.index(b'"reservationId":"') + 17
            self.journal.append((body[begin : begin + 36].decode(), time.time()))

    def _tally(self, seconds: float, within: int, cpu: float) -> Tally:
        statuses = Counter(int(status) for status in self.statuses)
        # The end of a closed loop interrupts its last requests. Its rate leaves them out.
        requests = within if self.plan.rate is None else len(self.latencies)
        return Tally(
            requests=requests,
            seconds=seconds,
            statuses={str(status): count for status, count in sorted(statuses.items())},
            p50=percentile(self.latencies, 50) * 1000,
            p95=percentile(self.latencies, 95) * 1000,
            p99=percentile(self.latencies, 99) * 1000,
            cpu_seconds=cpu,
        )


def _held(journal: str) -> list[bytes]:
    """Returns the ids in a journal."""
    accepted = msgspec.json.decode(Path(journal).read_bytes(), type=list[tuple[str, float]])
    return [identity.encode() for identity, _ in accepted]


def main() -> int:
    run = Run(msgspec.json.decode(sys.stdin.buffer.read(), type=Plan))
    try:
        tally = uvloop.run(run.run())
    except TimeoutError as error:
        sys.exit(str(error))
    run.save()
    sys.stdout.buffer.write(msgspec.json.encode(tally))
    return 0


if __name__ == "__main__":
    sys.exit(main())
