"""The engine's own processes, started and ended like the servers of the stack."""

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dev.stack.servers import Server


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the three servers are."""

    redis_url: str
    kafka_bootstrap: str
    database_url: str

    def environment(self) -> dict[str, str]:
        """The variables that every process of the engine reads."""
        return {
            "FLASHSALE_REDIS_URL": self.redis_url,
            "FLASHSALE_KAFKA_BOOTSTRAP": self.kafka_bootstrap,
            "FLASHSALE_DATABASE_URL": self.database_url,
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
        """`addresses` may be left out of what is not started here, as in `attach`."""
        super().__init__(data, port, detached=detached)
        self._addresses = addresses

    @property
    def url(self) -> str:
        """Where it serves HTTP."""
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        """Nothing is stored but the log."""

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
    """One API process; started once Redis has answered it."""

    name: ClassVar[str] = "api"
    module: ClassVar[str] = "flashsale_api"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus would look."""
        return f"http://127.0.0.1:{self._port('metrics')}/metrics"

    def _environment(self) -> dict[str, str]:
        return {
            **super()._environment(),
            "FLASHSALE_METRICS_LISTEN": f"127.0.0.1:{self._port('metrics')}",
        }


class ConsumerServer(_Service):
    """One consumer process; started once it has joined its group."""

    name: ClassVar[str] = "consumer"
    module: ClassVar[str] = "flashsale_consumer"


class OperatorServer(Server):
    """One operator process; started once it serves its health. `environment` is its own."""

    name: ClassVar[str] = "operator"

    def __init__(
        self, data: Path, environment: Mapping[str, str] | None = None, *, detached: bool = False
    ) -> None:
        super().__init__(data, detached=detached)
        self._own = environment or {}

    def get(self, path: str) -> str:
        """What it answers over HTTP."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            text: bytes = answer.read()
            return text.decode()

    def _prepare(self) -> None:
        """Nothing is stored but the log."""

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "flashsale_operator"]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self._own, "FLASHSALE_LISTEN": f"127.0.0.1:{self.port}"}

    def _ready(self) -> bool:
        return self.get("/healthz") == "alive\n"
