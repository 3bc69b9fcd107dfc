"""PostgreSQL as a plain process, over TCP only."""

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

# Both the role, a superuser, and the database.
_NAME = "flashsale"


class PostgresServer(Server):
    """A server with one role and one database, both `flashsale`.

    PostgreSQL refuses to run as root: for root it runs as `nobody`, who then owns the data.
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
        """Without `durable` nothing is flushed to disk.

        A kill loses nothing even then, since the kernel has what was committed; a power cut may.
        """
        super().__init__(data, port, detached=detached)
        self.durable = durable

    @property
    def url(self) -> str:
        """Where clients find it, with the password. Raises StackError before the first start."""
        try:
            password = self._password_file.read_text().strip()
        except FileNotFoundError:
            raise StackError(f"{self.name}: no password in {self.data} yet; start it") from None
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
        """Whether PostgreSQL's own lock is of that process.

        It is removed when that process is known to be dead: PostgreSQL would take whatever process
        has its id by now for a server that runs. A lock of any other is PostgreSQL's to judge.
        """
        return self._lock.exists() and self._lock.read_text().split("\n", 1)[0] == str(pid)

    def kill(self) -> None:
        """Kills the server and its children without warning; returns when they are gone."""
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
        """Makes the cluster beside its place and moves it there, so that it is whole or absent."""
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
            *("--username", _NAME),
            *("--pwfile", str(self._password_file)),
            *("--auth", "scram-sha-256"),
            *("--encoding", "UTF8"),
            # The same order and the same rules for letters whatever the machine has.
            *("--locale", "C", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"),
            "--no-instructions",
            *(() if self.durable else ("--no-sync",)),
        ]
        self._once("initdb", "-D", str(new), *options)
        statement = f"CREATE DATABASE {_NAME}"
        self._once("postgres", "--single", "-D", str(new), "postgres", said=statement)
        new.rename(self._cluster)

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "200",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "fsync": "on" if self.durable else "off",
        }
        return [
            *self._program("postgres"),
            *("-D", str(self._cluster)),
            *("-p", str(self.port)),
            *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
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
        """The caller's, without the client settings that would change the server's."""
        return {name: value for name, value in os.environ.items() if not name.startswith("PG")}

    def _program(self, name: str) -> list[str]:
        program = postgres_programs() / name
        if not _is_root():
            return [str(program)]
        reach = not (_reachable(program) and _reachable(self.data))
        return [
            *(sys.executable, "-I", "-S", unprivileged.__file__),
            *(str(_nobody().pw_uid), str(_nobody().pw_gid), str(int(reach))),
            str(program),
        ]

    def _once(self, name: str, *arguments: str, said: str = "") -> None:
        """Runs a program of PostgreSQL to its end. Raises StackError if it fails."""
        done = subprocess.run(
            [*self._program(name), *arguments],
            cwd=self.data,
            env=self._environment(),
            input=said,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise StackError(
                f"{self.name}: {name} failed on {self.data}; {self._advice()}. "
                f"Its last words:\n{done.stderr.strip()[-2000:]}"
            )

    def _advice(self) -> str:
        if not _is_root():
            return super()._advice()
        return (
            f"{super()._advice()}. Started by root it runs as `nobody`, who must be able to enter "
            f"{self.data} and {postgres_programs()}: if the log says it is denied, use folders "
            "that everybody may enter or start it as another user"
        )


def _is_root() -> bool:
    return os.geteuid() == 0


def _nobody() -> pwd.struct_passwd:
    return pwd.getpwnam("nobody")


def _reachable(path: Path) -> bool:
    """Whether everybody may enter the folders that lead to it, and it."""
    real = path.resolve()
    return all(each.stat().st_mode & 0o001 for each in (real, *real.parents))
