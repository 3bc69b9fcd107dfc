"""Clients that misuse the ports for metrics and health checks. No server but the process runs."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from dev.stack.ports import free_port
from flashsale.monitoring import EXCHANGE_SECONDS, MAX_CONNECTIONS
from tests.support.eventually import until
from tests.support.wire import GET, connection

SCRAPE = GET.replace(b"healthz", b"metrics")
GROWTH_BYTES = 16 * 1024 * 1024
KUBECONFIG = {
    "current-context": "away",
    "contexts": [{"name": "away", "context": {"cluster": "away", "user": "away"}}],
    "clusters": [{"name": "away", "cluster": {"server": "https://127.0.0.1:1"}}],
    "users": [{"name": "away", "user": {"token": "x"}}],
}


@dataclass(frozen=True, slots=True)
class Monitored:
    """A process, and its port for metrics."""

    process: subprocess.Popen[bytes]
    port: int

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))  # noqa: PTH208 - counts links

    def number(self, name: str) -> int:
        """Return a number from /proc/PID/status."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(status.partition(f"{name}:")[2].split()[0])

    async def answers(self, request: bytes = SCRAPE) -> bool:
        try:
            async with connection(self.port) as wire:
                wire.send(request)
                return await wire.status() == 200
        except ConnectionError:
            return False


def start(module: str, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


@pytest.fixture(params=["api", "consumer", "operator"])
async def monitored(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Monitored]:
    """A process of each kind. Redis, Kafka, PostgreSQL and Kubernetes are away."""
    port = free_port()
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(json.dumps(KUBECONFIG))
    environment = {
        **os.environ,
        "FLASHSALE_REDIS_URL": "redis://127.0.0.1:1/0",
        "FLASHSALE_KAFKA_BOOTSTRAP": "127.0.0.1:1",
        "FLASHSALE_DATABASE_URL": "postgresql://user@127.0.0.1:1/none",
        "FLASHSALE_LISTEN": f"127.0.0.1:{port}",
        "KUBECONFIG": str(kubeconfig),
    }
    if request.param == "api":
        environment["FLASHSALE_LISTEN"] = f"127.0.0.1:{free_port()}"
        environment["FLASHSALE_METRICS_LISTEN"] = f"127.0.0.1:{port}"
    log = tmp_path / "log"
    process = start(f"flashsale_{request.param}", environment, log)
    own = Monitored(process, port)
    try:
        await until(own.answers, log.read_text)
        yield own
        assert process.poll() is None
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


async def test_of_many_connections_in_one_moment_the_oldest_are_closed(
    monitored: Monitored,
) -> None:
    async with AsyncExitStack() as stack:
        monitored.process.send_signal(signal.SIGSTOP)
        many = range(MAX_CONNECTIONS + 20)
        wires = [await stack.enter_async_context(connection(monitored.port)) for _ in many]
        monitored.process.send_signal(signal.SIGCONT)
        for wire in wires[:20]:
            await wire.rest()


async def test_misused_connections_are_bounded_and_closed(monitored: Monitored) -> None:
    """Takes as long as the deadline of a connection."""
    files, threads, memory = (
        monitored.open_files(),
        monitored.number("Threads"),
        monitored.number("VmRSS"),
    )
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connection(monitored.port)) for _ in range(600)]
        silent, half, large, unread = wires[:150], wires[150:300], wires[300:450], wires[450:]
        for wire in half:
            wire.send(SCRAPE[:-2])
        for wire in large:
            wire.send(SCRAPE[:-2] + b"X: " + b"x" * 100_000)
        for wire in unread:
            wire.stop_reading()
            wire.send(SCRAPE)
        slow = await stack.enter_async_context(connection(monitored.port))

        async def drip() -> None:
            while True:
                slow.send(b"x")
                await slow.writer.drain()
                await asyncio.sleep(0.1)

        dripping = asyncio.create_task(drip())
        closed = await stack.enter_async_context(connection(monitored.port))
        closed.send(SCRAPE)
        closed.writer.write_eof()
        assert await closed.status() == 200
        assert await monitored.answers()
        assert monitored.open_files() <= files + MAX_CONNECTIONS + 10
        assert monitored.number("Threads") <= threads + 8
        assert (monitored.number("VmRSS") - memory) * 1024 < GROWTH_BYTES
        for wire in (*silent, *half, *large):
            await wire.rest()
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(dripping, 3 * EXCHANGE_SECONDS)
    assert monitored.open_files() <= files + 10
