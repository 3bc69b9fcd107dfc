"""The engine's own processes, started and stopped like the servers of the stack."""

import json
import os
import subprocess
import sys
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dev.stack import loopback
from dev.stack.errors import StackError
from dev.stack.ports import check_free, listener
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
        if listener(self.port) not in (self.pid, None):
            return False  # another program took the port in the meantime: ours is about to fail
        try:
            with loopback.get(f"{self.url}/readyz", 2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False

    def _advice(self) -> str:
        return f"the whole log is {self.log}"

    def _explained(self, lines: list[str]) -> list[str]:
        records = [_record(line) for line in lines]
        errors = [text for level, text in records if level in ("error", "critical")]
        return [*errors, *(text for level, text in records if level not in ("error", "critical"))]


def _record(line: str) -> tuple[str, str]:
    """Return the level and the text of a line of a service's log."""
    try:
        record = json.loads(line)
        level = record["level"].lower()
        return level, f"{level}: {record['message']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", line


class ApiServer(_Service):
    """One API process. It counts as started when Redis has answered it.

    It opens its order port if it has `order_tokens`.
    """

    name: ClassVar[str] = "api"
    module: ClassVar[str] = "flashsale_api"

    def __init__(  # noqa: PLR0913 - one per setting
        self,
        data: Path,
        addresses: Addresses | None = None,
        port: int | None = None,
        *,
        metrics_port: int | None = None,
        orders_port: int | None = None,
        order_tokens: str = "",
        settings: Mapping[str, str] | None = None,
        detached: bool = False,
    ) -> None:
        """`settings` are further variables of the process."""
        super().__init__(data, addresses, port, detached=detached)
        self.order_tokens = order_tokens
        self._settings = settings or {}
        if metrics_port is not None:
            self._ports["metrics"] = metrics_port
        if orders_port is not None:
            self._ports["orders"] = orders_port

    @property
    def orders_url(self) -> str:
        """The base URL of the port for the shop's order service."""
        return f"http://127.0.0.1:{self._port('orders')}"

    @property
    def metrics_url(self) -> str:
        """The URL of its Prometheus metrics."""
        return f"http://127.0.0.1:{self._port('metrics')}/metrics"

    def _prepare(self) -> None:
        check_free(self._port("metrics"), "the API's metrics")
        if self.order_tokens:
            check_free(self._port("orders"), "the order port")

    def _environment(self) -> dict[str, str]:
        environment = {
            **super()._environment(),
            "FLASHSALE_METRICS_LISTEN": f"127.0.0.1:{self._port('metrics')}",
        }
        # The user may have sourced the tokens of another API process.
        environment.pop("FLASHSALE_ORDER_TOKENS", None)
        if self.order_tokens:
            environment["FLASHSALE_ORDER_TOKENS"] = self.order_tokens
            environment["FLASHSALE_ORDERS_LISTEN"] = f"127.0.0.1:{self._port('orders')}"
        return {**environment, **self._settings}


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
        with loopback.get(f"http://127.0.0.1:{self.port}{path}", 5) as answer:
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


def flashsalectl(addresses: Addresses, *arguments: str, quiet: bool = False) -> None:
    """Run flashsalectl to its end, with its output on the terminal unless it is `quiet`.

    Raises StackError if it fails.
    """
    done = subprocess.run(
        [Path(sys.executable).with_name("flashsalectl"), *arguments],
        env={**os.environ, **addresses.environment()},
        stdout=subprocess.DEVNULL if quiet else None,
        check=False,
    )
    if done.returncode != 0:
        raise StackError(
            f"`flashsalectl {arguments[0]}` failed (exit code {done.returncode}); see its message "
            "above"
        )
