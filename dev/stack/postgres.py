"""PostgreSQL as a plain process that listens on TCP only."""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from dev.stack import unprivileged
from dev.stack.errors import StackError
from dev.stack.packages import postgres_programs
from dev.stack.process import Server

# The name of the role, which is a superuser, and of the database.
_NAME = "flashsale"


class PostgresServer(Server):
    """A server with one role and one database, both named `flashsale`.

    PostgreSQL refuses to run as root. If root starts it, it runs as the user `nobody`, who then
    owns the data.
    """

    name: ClassVar[str] = "postgres"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT  # fast: does not wait for clients
    orphan_signal: ClassVar[signal.Signals] = signal.SIGQUIT  # immediate, shared memory freed

    def __init__(
        self,
        data: Path,
        port: int | None = None,
        *,
        durable: bool = True,
        detached: bool = False,
    ) -> None:
        """Without `durable`, nothing is flushed to disk.

        A killed server still loses nothing, because the kernel has all committed data. A power cut
        can lose it.
        """
        super().__init__(data, port, detached=detached)
        self.durable = durable

    @property
    def url(self) -> str:
        """The address with the password. Raises StackError before the first start."""
        try:
            password = self._password_file.read_text().strip()
        except FileNotFoundError:
            raise StackError(f"{self.name}: {self.data} has no password yet; start it") from None
        return f"postgresql://{_NAME}:{password}@127.0.0.1:{self.port}/{_NAME}"

    @property
    def _password_file(self) -> Path:
        return self.data / "password"

    @property
    def _cluster(self) -> Path:
        return self.data / "cluster"

    @property
    def _lock(self) -> Path:
        return self._cluster / "postmaster.pid"

    def _lock_names(self, pid: int | None) -> bool:
        """Return whether PostgreSQL's own lock file names this process.

        The caller removes the lock of a dead process. Otherwise PostgreSQL would take a later
        process with the same id for a running server. PostgreSQL handles all other locks itself.
        """
        return self._lock.exists() and self._lock.read_text().split("\n", 1)[0] == str(pid)

    def kill(self) -> None:
        """Kill the server and its children, and return when they are dead."""
        pid = self.pid
        super().kill()
        if pid is not None and self._lock_names(pid):
            self._lock.unlink()

    def _prepare(self) -> None:
        if not self._cluster.exists():
            self._initialise()
        if _is_root() and self._cluster.stat().st_uid != _nobody().pw_uid:
            for path in [self._cluster, *self._cluster.rglob("*")]:
                os.chown(path, _nobody().pw_uid, _nobody().pw_gid)
        if self._lock_names(self._recorded().get("pid")):
            self._lock.unlink()

    def _initialise(self) -> None:
        """Create the cluster under another name and rename it, so that it is never incomplete."""
        new = self.data / "cluster.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        self._password_file.unlink(missing_ok=True)
        self._password_file.touch(mode=0o600)
        self._password_file.write_text(secrets.token_urlsafe(24) + "\n")
        if _is_root():
            for path in (new, self._password_file):
                os.chown(path, _nobody().pw_uid, _nobody().pw_gid)
        options = [
            f"--pgdata={new}",
            f"--username={_NAME}",
            f"--pwfile={self._password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            # Sort order and character classes must not depend on the machine's locale.
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            "--no-instructions",
        ]
        if not self.durable:
            options.append("--no-sync")
        self._once("initdb", *options)
        statement = f"CREATE DATABASE {_NAME}"
        self._once("postgres", "--single", "-D", str(new), "postgres", stdin=statement)
        new.rename(self._cluster)

    def _command(self) -> list[str]:
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "200",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "fsync": "on" if self.durable else "off",
        }
        return [
            *self._program("postgres"),
            "-D",
            str(self._cluster),
            *(f"--{name}={value}" for name, value in settings.items()),
        ]

    def _ready(self) -> bool:
        asked = subprocess.run(
            [str(postgres_programs() / "psql"), "-XqtA", "-c", "SELECT 1"],
            env={
                "PGHOST": "127.0.0.1",
                "PGPORT": str(self.port),
                "PGUSER": _NAME,
                "PGDATABASE": _NAME,
                "PGPASSWORD": self._password_file.read_text().strip(),
                "PGCONNECT_TIMEOUT": "2",
            },
            capture_output=True,
            check=False,
        )
        return asked.stdout.strip() == b"1"

    def _environment(self) -> dict[str, str]:
        """Return the caller's environment without client settings, which affect the server too."""
        return {name: value for name, value in os.environ.items() if not name.startswith("PG")}

    def _program(self, name: str) -> list[str]:
        program = postgres_programs() / name
        if not _is_root():
            return [str(program)]
        reach = not (_reachable(program) and _reachable(self.data))
        return [
            sys.executable,
            "-I",
            "-S",
            unprivileged.__file__,
            str(_nobody().pw_uid),
            str(_nobody().pw_gid),
            str(int(reach)),
            str(program),
        ]

    def _once(self, name: str, *arguments: str, stdin: str = "") -> None:
        """Run a program of PostgreSQL to its end. Raises StackError if it fails."""
        done = subprocess.run(
            [*self._program(name), *arguments],
            cwd=self.data,
            env=self._environment(),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise StackError(
                f"{self.name}: {name} failed on {self.data}; {self._advice()}. "
                f"The end of its output:\n{done.stderr.strip()[-2000:]}"
            )

    def _advice(self) -> str:
        if not _is_root():
            return super()._advice()
        return (
            f"{super()._advice()}. If root starts it, it runs as the user `nobody`, who needs "
            f"access to {self.data} and {postgres_programs()}. If the log says that access is "
            "denied, use folders that every user can enter, or start it as another user"
        )


def _is_root() -> bool:
    return os.geteuid() == 0


def _nobody() -> pwd.struct_passwd:
    return pwd.getpwnam("nobody")


def _reachable(path: Path) -> bool:
    """Return whether every user can enter the path and all folders that lead to it."""
    real = path.resolve()
    return all(each.stat().st_mode & 0o001 for each in (real, *real.parents))
