"""PgBouncer of Debian's packages, unpacked into the cache. Nothing is installed."""

import os
import pwd
import shutil
import socket
import sys
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import urlsplit

from dev.stack import unprivileged
from dev.stack.process import Server
from tests.support import downloads

PACKAGES: Final = ("pgbouncer", "libevent-2.1-7", "libc-ares2")


def program() -> Path:
    """Return PgBouncer's program. Raises StackError where Debian's packages cannot be had."""
    if on_path := shutil.which("pgbouncer"):
        return Path(on_path)
    return downloads.debian("pgbouncer", *PACKAGES) / "usr/sbin/pgbouncer"


class PgBouncer(Server):
    """A pooler in transaction mode, with fewer connections than its clients have."""

    name: ClassVar[str] = "pgbouncer"

    def __init__(self, data: Path, server_url: str) -> None:
        super().__init__(data)
        self._server = urlsplit(server_url)

    def url(self, database: str) -> str:
        """Return the address of a database behind the pooler."""
        user, password = self._server.username, self._server.password
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def _prepare(self) -> None:
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "plain",
            "auth_file": self.data / "users.txt",
            "pool_mode": "transaction",
            "default_pool_size": 2,
        }
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        server = f"* = host=127.0.0.1 port={self._server.port}\n"
        (self.data / "pgbouncer.ini").write_text(
            "[databases]\n" + server + "[pgbouncer]\n" + "".join(lines)
        )
        (self.data / "users.txt").write_text(
            f'"{self._server.username}" "{self._server.password}"\n'
        )

    def _command(self) -> list[str]:
        command = [str(program()), str(self.data / "pgbouncer.ini")]
        if os.geteuid() != 0:
            return command
        # It refuses to run as root.
        nobody = pwd.getpwnam("nobody")
        as_nobody = [unprivileged.__file__, str(nobody.pw_uid), str(nobody.pw_gid), "1"]
        return [sys.executable, "-I", "-S", *as_nobody, *command]

    def _environment(self) -> dict[str, str]:
        libraries = program().parents[1].glob("lib/*-linux-gnu")
        return {**super()._environment(), "LD_LIBRARY_PATH": ":".join(map(str, libraries))}

    def _ready(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
