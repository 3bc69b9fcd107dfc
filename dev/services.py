"""The engine's own processes, started and stopped like the servers of the stack."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dev.stack.errors import StackError
from dev.stack.process import Server


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of Redis, Kafka and PostgreSQL."""

    redis_url: str
    kafka_bootstrap: str
    database_url: str
    engine: str = "flashsale"

    def environment(self) -> dict[str, str]:
        """Return the addresses as the variables that every process of the engine reads."""
        return {
            "FLASHSALE_REDIS_URL": self.redis_url,
            "FLASHSALE_KAFKA_BOOTSTRAP": self.kafka_bootstrap,
            "FLASHSALE_DATABASE_URL": self.database_url,
            "FLASHSALE_ENGINE": self.engine,
        }


class _Service(Server):
    module: ClassVar[str]

    def __init__(
        self,
        data: Path,
        addresses: Addresses | None = None,
        port: int | None = None,
        *,
        detached: bool = False,
    ) -> None:
        """`addresses` is needed only to start the process, not to `attach` to it."""
        super().__init__(data, port, detached=detached)
        self._addresses = addresses

    @property
    def url(self) -> str:
        """The base URL of its HTTP server."""
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        """The process stores nothing but its log."""

    def _command(self) -> list[str]:
        return [sys.executable, "-m", self.module]

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            **(self._addresses.environment() if self._addresses else {}),
            "FLASHSALE_LISTEN": f"127.0.0.1:{self.port}",
        }

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False


class ApiServer(_Service):
    """One API process. It counts as started when Redis has answered it."""

    name: ClassVar[str] = "api"
    module: ClassVar[str] = "flashsale_api"

    @property
    def metrics_url(self) -> str:
        """The URL of its Prometheus metrics."""
        return f"http://127.0.0.1:{self._port('metrics')}/metrics"

    def _environment(self) -> dict[str, str]:
        return {
            **super()._environment(),
            "FLASHSALE_METRICS_LISTEN": f"127.0.0.1:{self._port('metrics')}",
        }


class ConsumerServer(_Service):
    """One consumer process. It counts as started when it has joined its group."""

    name: ClassVar[str] = "consumer"
    module: ClassVar[str] = "flashsale_consumer"


class OperatorServer(Server):
    """One operator process. It counts as started when it answers its health check."""

    name: ClassVar[str] = "operator"

    def __init__(
        self, data: Path, environment: Mapping[str, str] | None = None, *, detached: bool = False
    ) -> None:
        """`environment` is added to this process's environment."""
        super().__init__(data, detached=detached)
        self._own = environment or {}

    def get(self, path: str) -> str:
        """Return the body of a GET request to its HTTP server."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            text: bytes = answer.read()
            return text.decode()

    def _prepare(self) -> None:
        """The process stores nothing but its log."""

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "flashsale_operator"]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self._own, "FLASHSALE_LISTEN": f"127.0.0.1:{self.port}"}

    def _ready(self) -> bool:
        return self.get("/healthz") == "alive\n"


def flashsalectl(addresses: Addresses, *arguments: str) -> None:
    """Run flashsalectl to its end, with its output on the terminal.

    Raises StackError if it fails.
    """
    done = subprocess.run(
        [Path(sys.executable).with_name("flashsalectl"), *arguments],
        env={**os.environ, **addresses.environment()},
        check=False,
    )
    if done.returncode != 0:
        raise StackError(
            f"`flashsalectl {arguments[0]}` failed (exit code {done.returncode}); see its message "
            "above"
        )
