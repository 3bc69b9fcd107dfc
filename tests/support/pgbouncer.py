"""PgBouncer of Debian's packages, unpacked into the cache. Nothing is installed."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Final
from urllib.parse import urlsplit

from dev.stack import unprivileged
from dev.stack.errors import StackError
from dev.stack.locks import exclusive
from dev.stack.packages import cache_folder
from dev.stack.process import Server

PACKAGES: Final = ("pgbouncer", "libevent-2.1-7", "libc-ares2")


def program() -> Path:
    """Return PgBouncer's program. Raises StackError where Debian's packages cannot be had."""
    if on_path := shutil.which("pgbouncer"):
        return Path(on_path)
    folder = cache_folder() / "pgbouncer"
    with exclusive(folder):
        if not folder.exists():
            if shutil.which("apt-get") is None:
                raise StackError("PgBouncer comes from Debian's packages")
            part = folder.with_name("pgbouncer.part")
            with TemporaryDirectory(prefix="flashsale-pgbouncer-") as scratch:
                _run("apt-get", "download", *PACKAGES, folder=scratch)
                for package in Path(scratch).glob("*.deb"):
                    _run("dpkg-deb", "--extract", str(package), str(part), folder=scratch)
            part.rename(folder)
    return folder / "usr/sbin/pgbouncer"


def _run(*command: str, folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StackError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


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
