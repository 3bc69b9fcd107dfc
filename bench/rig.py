"""The engine on real servers with each process on its core, and a crowd of buyers."""

import asyncio
import os
import socket
import subprocess
import sys
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, ClassVar, Final, Self, TypeVar, cast

import msgspec

from bench.load import Plan, Tally
from bench.machine import Cores, ahead, cpu_seconds, placed
from bench.results import Parts, Round
from dev.paths import ROOT
from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.process import Server
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from flashsale import redis_client
from flashsale.outbox import Outbox

QUIET_SECONDS: Final = 120.0
BEHIND: Final = 10
"""The niceness of Kafka, PostgreSQL and the consumer. If they share a core with Redis and the
crowd, those have priority, so that a starting JVM does not slow down Redis.
"""
_TOKEN: Final = "bench-" + "0" * 40
"""The token of the order ports."""

_S = TypeVar("_S", bound=Server)


class Api(ApiServer):
    """An API process on the measured Python."""

    def __init__(self, data: Path, addresses: Addresses, python: Path) -> None:
        super().__init__(data, addresses, order_tokens=_TOKEN)
        self._python = python

    def _command(self) -> list[str]:
        return [str(self._python), "-m", self.module]

    def _environment(self) -> dict[str, str]:
        return super()._environment() | python_path()


class Baseline(Api):
    """The bare app. Its /readyz means nothing, so an open port counts as ready."""

    name: ClassVar[str] = "baseline"
    module: ClassVar[str] = "bench.baseline"

    def _ready(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=2):
            return True


class Unbounded(Api):
    """An API process without its bounds on clients."""

    name: ClassVar[str] = "unbounded"
    module: ClassVar[str] = "bench.unbounded"


class Consumer(ConsumerServer):
    """A consumer process on the measured Python."""

    def __init__(self, data: Path, addresses: Addresses, python: Path) -> None:
        super().__init__(data, addresses)
        self._python = python

    def _command(self) -> list[str]:
        return [str(self._python), "-m", self.module]

    def _environment(self) -> dict[str, str]:
        return super()._environment() | python_path()


def python_path() -> dict[str, str]:
    """Return the variables with which the measured Python finds the engine and the bench."""
    folders = (ROOT / "src", ROOT / "services/api", ROOT / "services/consumer", ROOT)
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


class Sample(msgspec.Struct, frozen=True):
    """One request: its due time (`time.perf_counter`), its latency in seconds, its status."""

    due: float
    seconds: float
    status: int


class Rig:
    """Redis, Kafka and PostgreSQL on the rest of the cores, and processes of the engine.

    A context manager. At its end it stops everything.
    """

    def __init__(
        self, data: Path, python: Path, redis_servers: Sequence[RedisServer] | None = None
    ) -> None:
        """`redis_servers` replace the only Redis. The engine gets the address of the first one."""
        self.cores = Cores()
        self.python = python
        self.data = data
        self.redis_servers = redis_servers or [RedisServer(data / "redis")]
        self.redis = self.redis_servers[0]
        self.parts_of_redis: dict[str, Sequence[RedisServer]] = {"Redis": [self.redis]}
        """The servers of Redis whose CPU time is measured, by a name for their sum."""
        self.kafka = KafkaServer(data / "kafka")
        self.postgres = PostgresServer(data / "postgres")
        self._running = ExitStack()
        self._sales = 0
        self._crowds = 0

    def __enter__(self) -> Self:
        for redis in self.redis_servers:
            self._start(redis, self.cores.rest)
        for server in (self.kafka, self.postgres):
            self._start(server, self.cores.rest, nice=BEHIND)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._running.close()

    @property
    def addresses(self) -> Addresses:
        """The addresses of the servers."""
        return Addresses(self.redis.url, self.kafka.bootstrap, self.postgres.url)

    def api(self, name: str = "api", cores: set[int] | None = None) -> Api:
        """Start an API process, by default on the first core."""
        api = Api(self.data / name, self.addresses, self.python)
        return self._start(api, cores or self.cores.first)

    def baseline(self) -> Baseline:
        """Start the bare app on the first core."""
        baseline = Baseline(self.data / "baseline", self.addresses, self.python)
        return self._start(baseline, self.cores.first)

    def unbounded(self) -> Unbounded:
        """Start an API process without its bounds on clients, on the first core."""
        return self._start(
            Unbounded(self.data / "unbounded", self.addresses, self.python), self.cores.first
        )

    def consumer(self, cores: set[int]) -> Consumer:
        """Start a consumer process."""
        consumer = Consumer(self.data / "consumer", self.addresses, self.python)
        return self._start(consumer, cores, nice=BEHIND)

    def again(self, server: Server) -> None:
        """Start a stopped server on the same cores."""
        placed(self.cores.rest, server.start, nice=BEHIND)

    def _start(self, server: _S, cores: set[int], *, nice: int = 0) -> _S:
        self._running.callback(server.stop)
        placed(cores, server.start, nice=nice)
        return server

    def sales(
        self, count: int = 1, stock: int = 100_000_000, hold_seconds: int | None = None
    ) -> list[str]:
        """Declare new sales with flashsalectl, and return their items."""
        first, self._sales = self._sales, self._sales + count
        items = [f"bench-{number}" for number in range(first, self._sales)]
        holds = "" if hold_seconds is None else f", holdSeconds: {hold_seconds}"
        manifest = self.data / "sales.yaml"
        manifest.write_text(
            "---\n".join(
                "apiVersion: flashsale.dev/v1alpha1\nkind: FlashSale\n"
                f"metadata: {{name: {item}}}\nspec: {{itemId: {item}, stock: {stock}{holds}}}\n"
                for item in items
            )
        )
        done = subprocess.run(
            [Path(sys.executable).with_name("flashsalectl"), "apply", "-f", manifest],
            env={**os.environ, **self.addresses.environment()},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"`flashsalectl apply` failed: {done.stderr}")
        return items

    def crowd(
        self,
        apis: Sequence[ApiServer],
        items: Sequence[str],
        seconds: float,
        *,
        connections: int = 100,
        keys: bool = False,
        rate: float | None = None,
        samples: Path | None = None,
        journal: Path | None = None,
        confirm: Path | None = None,
    ) -> "Crowd":
        """Start a crowd in the background, on the rest of the cores.

        It confirms the reservations of the journal `confirm`, if there is one.
        """
        self._crowds += 1
        plan = Plan(
            urls=[api.orders_url if confirm else api.url for api in apis],
            items=list(items),
            users=f"u{self._crowds}",
            seconds=seconds,
            connections=connections,
            keys=keys,
            rate=rate,
            samples=str(samples) if samples else None,
            journal=str(journal) if journal else None,
            confirm=str(confirm) if confirm else None,
            token=_TOKEN,
        )
        return placed(self.cores.rest, lambda: Crowd(plan, self.python))

    def parts(self) -> Parts:
        """Measure the parts of a request separately, on the first core."""

        def run() -> bytes:
            return subprocess.run(
                [self.python, "-m", "bench.path"],
                cwd=ROOT,
                env={**os.environ, **self.addresses.environment(), **python_path()},
                stdout=subprocess.PIPE,
                check=True,
            ).stdout

        return msgspec.json.decode(placed(self.cores.first, run), type=Parts)

    def round(
        self,
        apis: Sequence[ApiServer],
        items: Sequence[str],
        seconds: float,
        *,
        connections: int = 100,
        keys: bool = False,
        rate: float | None = None,
        confirm: Path | None = None,
    ) -> Round:
        """Run a crowd, and measure the CPU time until everything is published."""
        processes: dict[str, Sequence[Server]] = {
            "API": apis,
            **self.parts_of_redis,
            "Kafka": [self.kafka],
        }
        before = {name: _cpu(servers) for name, servers in processes.items()}
        tally = self.crowd(
            apis, items, seconds, connections=connections, keys=keys, rate=rate, confirm=confirm
        ).tally()
        self.drain(items)
        spent = {name: _cpu(servers) - before[name] for name, servers in processes.items()}
        spent["crowd"] = tally.cpu_seconds
        return Round(tally, {name: used / tally.requests * 10_000 for name, used in spent.items()})

    def drain(self, items: Sequence[str]) -> None:
        """Wait until the items' outboxes are empty."""
        asyncio.run(self._drain(items))

    async def _drain(self, items: Sequence[str]) -> None:
        client = redis_client.connect(self.redis.url)
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                while any((await Outbox(client).lengths(items)).values()):
                    await asyncio.sleep(0.02)
        finally:
            await client.aclose()


class Crowd:
    """A crowd in a process of its own."""

    def __init__(self, plan: Plan, python: Path) -> None:
        self._plan = plan
        self._process = subprocess.Popen(
            [python, "-m", "bench.load"],
            cwd=ROOT,
            env={**os.environ, **python_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        ahead(self._process.pid)  # buyers have machines of their own
        stdin = cast("IO[bytes]", self._process.stdin)
        stdin.write(msgspec.json.encode(plan))
        stdin.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tally(self) -> Tally:
        """Wait for the end of the crowd, and return its tally."""
        answer = cast("IO[bytes]", self._process.stdout).read()
        if self._process.wait():
            raise SystemExit("the crowd failed; see its message above")
        return msgspec.json.decode(answer, type=Tally)

    def samples(self) -> list[Sample]:
        """Return every request, in the order of their due times."""
        values = array("d")
        values.frombytes(Path(self._plan.samples or "").read_bytes())
        count = len(values) // 3
        due, took, statuses = values[:count], values[count : 2 * count], values[2 * count :]
        return [
            Sample(at, seconds, int(status))
            for at, seconds, status in sorted(zip(due, took, statuses, strict=True))
        ]


def _cpu(servers: Sequence[Server]) -> float:
    return sum(cpu_seconds(server.pid) for server in servers if server.pid is not None)
