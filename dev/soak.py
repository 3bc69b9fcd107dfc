"""`python -m dev.soak`: an hour of buyers with holds, while each process is restarted once.

It starts servers of its own, two API processes and a consumer. A new sale begins every few minutes,
and the former one is audited, closed and freed. In the end no promise may be missing in the ledger.
"""

import argparse
import asyncio
import resource
import secrets
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncpg
import uvloop

from dev.crowd import percentile
from dev.local import start_stack
from dev.paths import LOCAL, ROOT
from dev.progress import ending_quietly, say
from dev.services import Addresses, ApiServer, ConsumerServer, flashsalectl
from dev.stack import lifeline
from dev.stack.errors import StackError
from dev.stack.process import Server
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from dev.steady import Buyers
from dev.verdict import quiet

FOLDER: Final = LOCAL / "soak"
HOLD_SECONDS: Final = 60
ENDED_SECONDS: Final = 85.0
"""How long after the end of a sale its holds have expired: their seconds, the grace, the sweep."""
SALE_SECONDS: Final = 300.0
STOCK: Final = 10_000_000
MEASURED: Final = (1 / 6, 1 / 2, 1.0)
"""The parts of the duration after which memory is measured: 10, 30 and 60 minutes of an hour."""
_RESTARTED: Final = 1 / 48
"""The restarts are this part of the duration apart, so that all precede the first measurement."""
_FREED_SECONDS: Final = 120.0
_TRIES: Final = 5
"""How often a sale is freed. Each try waits for the ledger for 20 s."""


@dataclass
class Report:
    """The results, which `text` prints."""

    buyers: Buyers
    minutes: float
    rate: float
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """Megabytes by process, after so many minutes."""
    restarts: list[str] = field(default_factory=list)
    promised: int = 0
    confirmed: int = 0
    expired: int = 0
    lost: list[str] = field(default_factory=list)
    """Promises that the ledger does not have."""
    audits: dict[str, bool] = field(default_factory=dict)
    """Whether Redis and the ledger agreed, by sale."""

    @property
    def passed(self) -> bool:
        failed = self.lost or self.buyers.counts.failures or not all(self.audits.values())
        return bool(self.promised) and not failed

    def text(self) -> str:
        """Return the report as Markdown."""
        counts, names = self.buyers.counts, list(self.memory[0][1]) if self.memory else []
        head = " | ".join(f"{minutes:.4g} min" for minutes, _ in self.memory)
        answers = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.answers.items()))
        failures = ", ".join(f"{count:,} {name}" for name, count in counts.failures.items())
        latency = (percentile(counts.latencies, percent) * 1000 for percent in (50, 95, 99))
        return "\n".join(
            [
                f"{self.minutes:g} minutes at {self.rate:,.0f} requests per second",
                "",
                f"| memory of | {head} |",
                "|---" * (len(self.memory) + 1) + "|",
                *(
                    f"| {name} | {' | '.join(f'{mb[name]:.0f} MB' for _, mb in self.memory)} |"
                    for name in names
                ),
                "",
                f"Restarted: {', '.join(self.restarts) or 'none'}.",
                f"{self.promised:,} reservations were promised, and {self.confirmed:,} confirmed.",
                f"{self.expired:,} holds expired.",
                f"Answers: {answers}.",
                f"{counts.repeated:,} requests were repeated.",
                f"The slowest request was served after {counts.slowest_seconds:.1f} s.",
                "P50 {:.1f}, P95 {:.1f}, P99 {:.1f} ms of the last requests.".format(*latency),
                f"Failed: {failures or 0}.",
                f"Lost: {len(self.lost)}. {' '.join(self.lost[:5])}".rstrip(),
                f"Audits: {sum(self.audits.values())} of {len(self.audits)} sales agree.",
            ]
        )


class Soak:
    """The servers of a run, its sales and its report."""

    def __init__(
        self, addresses: Addresses, servers: dict[str, Server], minutes: float, rate: float
    ) -> None:
        self._addresses = addresses
        self._servers = servers
        self._seconds = minutes * 60
        self._item = ""
        self._open: list[str] = []
        apis = [server for server in servers.values() if isinstance(server, ApiServer)]
        buyers = Buyers(
            [api.url for api in apis],
            [api.orders_url for api in apis],
            apis[0].order_tokens,
            lambda: self._item,
            rate,
        )
        self.report = Report(buyers, minutes, rate)

    async def run(self) -> None:
        """Run it all. Cancels the rest if a part fails."""
        await self._declare(0)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.report.buyers.run(self._seconds))
            tasks.create_task(self._sell(tasks))
            tasks.create_task(self._restart())
            tasks.create_task(self._measure())
        for item in list(self._open):
            await self._end(item)

    async def _sell(self, tasks: asyncio.TaskGroup) -> None:
        """Begin a sale every few minutes, and end the one before it."""
        length = min(SALE_SECONDS, self._seconds / 3)
        began = time.monotonic()
        for number in range(1, round(self._seconds / length)):
            await asyncio.sleep(max(0.0, began + number * length - time.monotonic()))
            before = self._item
            await self._declare(number)
            tasks.create_task(self._end_later(before, min(ENDED_SECONDS, length / 2)))

    async def _end_later(self, item: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._end(item)

    async def _declare(self, number: int) -> None:
        item = f"soak-{number}"
        manifest = FOLDER / "sale.yaml"
        manifest.write_text(
            "apiVersion: flashsale.dev/v1alpha1\nkind: FlashSale\n"
            f"metadata: {{name: {item}}}\n"
            f"spec: {{itemId: {item}, stock: {STOCK}, holdSeconds: {HOLD_SECONDS}}}\n"
        )
        await self._ctl("apply", "-f", str(manifest))
        self._open.append(item)
        self._item = item

    async def _end(self, item: str) -> None:
        """Wait until the holds of a sale have ended, compare it with the promises, and free it."""
        counts = self.report.buyers.counts
        promised = counts.promised.pop(item, set())
        confirmed = counts.confirmed.pop(item, set())
        await asyncio.to_thread(self._compare, item, promised, confirmed)
        self.report.audits[item] = await self._tried("audit", item)
        self._open.remove(item)
        # A consumer behind other work needs longer than `delete` waits.
        for _ in range(_TRIES):
            if await self._tried("delete", item):
                return
        say(f"{item} could not be freed")

    def _compare(self, item: str, promised: set[str], confirmed: set[str]) -> None:
        """Compare the ledger with the promises, in a thread, so that the buyers do not wait."""
        states = asyncio.run(self._states(item, len(promised)))
        report = self.report
        report.promised += len(promised)
        report.confirmed += len(confirmed)
        report.expired += sum(state == "expired" for state in states.values())
        report.lost += [
            f"{identity} is {states.get(identity, 'not recorded')}"
            for kept, ids in (
                (("confirmed", "expired"), promised),
                (("confirmed",), confirmed),
            )
            for identity in ids
            if states.get(identity) not in kept
        ]

    async def _states(self, item: str, count: int) -> dict[str, str]:
        """Wait for `count` reservations without an open hold, and return the states by id."""
        connection = await asyncpg.connect(self._addresses.database_url)
        try:
            deadline = time.monotonic() + _FREED_SECONDS
            while time.monotonic() < deadline:
                recorded = await connection.fetchval(_COUNT, f"default/{item}")
                if recorded >= count and not await connection.fetchval(_HELD, f"default/{item}"):
                    break
                await asyncio.sleep(0.5)
            rows = await connection.fetch(_STATES, f"default/{item}")
        finally:
            await connection.close()
        return {row["id"]: row["state"] for row in rows}

    async def _restart(self) -> None:
        """Restart one process after the other."""
        apart = max(12.0, self._seconds * _RESTARTED)
        began = time.monotonic()
        for number, (name, server) in enumerate(self._servers.items()):
            await asyncio.sleep(max(0.0, began + (number + 1) * apart - time.monotonic()))
            stopped = time.monotonic()
            await asyncio.to_thread(server.restart)
            if isinstance(server, RedisServer):
                # A new Redis process trusts no sale of the former one. Here no operator rebuilds.
                await self._ctl("rebuild", "--all")
            minutes = (stopped - began) / 60
            self.report.restarts.append(
                f"{name} at {minutes:.1f} min for {time.monotonic() - stopped:.1f} s"
            )
            say(self.report.restarts[-1])

    async def _measure(self) -> None:
        began = time.monotonic()
        for part in MEASURED:
            # The last figure is taken under load, too.
            await asyncio.sleep(max(0.0, began + part * self._seconds - 1 - time.monotonic()))
            megabytes = {name: _memory(server) for name, server in self._servers.items()}
            self.report.memory.append((part * self._seconds / 60, megabytes))
            say(f"{part * self._seconds / 60:.4g} min: {megabytes}")

    async def _ctl(self, *arguments: str) -> None:
        await asyncio.to_thread(flashsalectl, self._addresses, *arguments, quiet=True)

    async def _tried(self, *arguments: str) -> bool:
        try:
            await self._ctl(*arguments)
        except StackError as error:
            say(f"{' '.join(arguments)}: {error}")
            return False
        return True


_HELD: Final = "SELECT held FROM sales WHERE sale_id = $1"
_COUNT: Final = "SELECT count(*) FROM reservations WHERE sale_id = $1"
_STATES: Final = "SELECT reservation_id::text AS id, state FROM reservations WHERE sale_id = $1"


def _memory(server: Server) -> float:
    """Return the memory of a server and its children in megabytes. Shared pages count once.

    A server that is being restarted has none.
    """
    total = 0
    if (leader := server.pid) is None:
        return 0.0
    for pid in lifeline.family(leader):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def soak(minutes: float, rate: float) -> Report:
    """Run the engine and its buyers for some minutes. Everything stops at the end."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    with ExitStack() as running:
        stack: list[Server] = []

        def started(server: Server) -> None:
            running.callback(server.kill)
            stack.append(server)

        addresses = start_stack(FOLDER, {}, started)
        token = secrets.token_urlsafe(32)
        engine: dict[str, Server] = {
            "API 1": ApiServer(FOLDER / "api-1", addresses, order_tokens=token),
            "API 2": ApiServer(FOLDER / "api-2", addresses, order_tokens=token),
            "consumer": ConsumerServer(FOLDER / "consumer", addresses),
        }
        for server in engine.values():
            started(server)
            server.start()
        kinds = (("Kafka", KafkaServer), ("PostgreSQL", PostgresServer), ("Redis", RedisServer))
        for name, kind in kinds:
            engine[name] = next(server for server in stack if isinstance(server, kind))
        made = Soak(addresses, engine, minutes, rate)
        try:
            uvloop.run(made.run())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        uvloop.run(quiet(addresses, ["soak-0"]))
        return made.report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.soak", description=__doc__)
    parser.add_argument(
        "--minutes", type=_positive, default=60.0, help="how long buyers arrive (default: 60)"
    )
    parser.add_argument(
        "--rate", type=_positive, default=2_000.0, help="requests per second (default: 2000)"
    )
    options = parser.parse_args()
    # Each connection needs a descriptor, and many systems allow 1,024 by default.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    report = soak(options.minutes, options.rate)
    text = report.text()
    (FOLDER / "report.md").write_text(f"{text}\n")
    print(f"\n{text}\nThe report is in {(FOLDER / 'report.md').relative_to(ROOT)}.")
    return int(not report.passed)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
