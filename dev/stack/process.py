"""A server process: start it, wait for it, pause it, kill it and stop it, always by its id."""

import json
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from dev.stack import keeper, lifeline
from dev.stack.errors import StackError
from dev.stack.ports import check_free, free_port

START_SECONDS = 60.0
_LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class _Process:
    """A process with its identity. `child` is set if this process has to wait for its end."""

    pid: int
    identity: str
    child: subprocess.Popen[bytes] | None = None

    def alive(self) -> bool:
        if self.child is not None:
            return self.child.poll() is None
        return lifeline.identity(self.pid) == self.identity

    def wait(self, seconds: float) -> bool:
        """Return whether it ended within that time."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


class Server(ABC):
    """One server on loopback with its data in one folder.

    It is one process tree in its own session. Unless it is `detached`, it ends when this process
    ends, even if this process is killed. The folder's `server.json` records the ports, the process
    id and the process's identity. A new object on the same folder keeps the port, and `attach`
    finds a server that another process started.

    An object is not thread-safe, but any thread can use it while no other does.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    # The signal that ends it at once after this process has died.
    orphan_signal: ClassVar[signal.Signals] = signal.SIGKILL
    stop_seconds: ClassVar[float] = 30.0
    # How often it is asked to stop in that time.
    stop_tries: ClassVar[int] = 1

    def __init__(self, data: Path, port: int | None = None, *, detached: bool = False) -> None:
        """`data` is created if it is missing. Without `port`, a free port is chosen and kept."""
        self.data = Path(data).absolute()
        self.detached = detached
        self._ports: dict[str, int] = self._recorded().get("ports", {})
        if port is not None:
            self._ports["main"] = port
        self._process: _Process | None = None
        self._log_start = 0

    @classmethod
    def attach(cls, data: Path) -> Self:
        """Return the server on this folder, which another process may have started.

        `pid` is None if it is not running. The result is meant for stop, kill, pause and resume:
        settings other than the port are the defaults.
        """
        server = cls(data, detached=True)
        server._process = server._running_elsewhere()
        return server

    @property
    def port(self) -> int:
        """The port. It is chosen at first use, outside the range of outgoing ports."""
        return self._port("main")

    @property
    def pid(self) -> int | None:
        """The id of the running process, or None if it is not running."""
        if self._process is not None and not self._process.alive():
            self._forget()
        return self._process.pid if self._process is not None else None

    @property
    def log(self) -> Path:
        """The file with the server's output."""
        return self.data / f"{self.name}.log"

    def start(self) -> None:
        """Start the server and return when it answers. Does nothing if it is already running.

        The first start initialises the data folder. Raises StackError if the server does not answer
        within 60 seconds, or if another process runs one on this folder.
        """
        if self.pid is not None:
            return
        if (other := self._running_elsewhere()) is not None:
            raise StackError(
                f"{self.name}: process {other.pid} already runs on {self.data}; "
                f"stop it ({type(self).__name__}.attach(data).stop()) or use another folder"
            )
        check_free(self.port, self.name)
        self.data.mkdir(parents=True, exist_ok=True)
        try:
            self._prepare()
            self._spawn()
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Stop the server gracefully. After `stop_seconds` it is killed."""
        if self.pid is None or self._process is None:
            return
        lifeline.send(lifeline.family(self._process.pid), signal.SIGCONT)
        for _ in range(self.stop_tries):
            lifeline.send([self._process.pid], self.stop_signal)
            if self._process.wait(self.stop_seconds / self.stop_tries):
                self._forget()
                return
        self.kill()

    def kill(self) -> None:
        """Kill the server and its children, and return when they are dead."""
        if self.pid is None or self._process is None:
            return
        lifeline.destroy(self._process.pid)
        self._process.wait(self.stop_seconds)
        self._forget()

    def pause(self) -> None:
        """Freeze the server and its children. Connections stay open, but get no answer."""
        lifeline.freeze(self._required_pid())

    def resume(self) -> None:
        """End a pause."""
        lifeline.send(lifeline.family(self._required_pid())[::-1], signal.SIGCONT)

    def restart(self) -> None:
        """Stop the server and start it on the same port and data."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @abstractmethod
    def _prepare(self) -> None:
        """Prepare the data folder. Called before every start."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Return the program and its arguments. It runs in the folder `data`."""

    @abstractmethod
    def _ready(self) -> bool:
        """Return whether the server does its work. False and OSError mean not yet."""

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _advice(self) -> str:
        """Return the advice for a server that did not start."""
        return f"read {self.log}; if its data is broken, remove {self.data}"

    def _port(self, role: str) -> int:
        if role not in self._ports:
            self._ports[role] = free_port()
        return self._ports[role]

    def _spawn(self) -> None:
        command = self._command()
        try:
            with self.log.open("ab") as log:
                self._log_start = log.tell()
                child = subprocess.Popen(
                    command,
                    cwd=self.data,
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise StackError(f"{self.name}: cannot run {command[0]}: {error}") from error
        # No later process can have this id yet, because the child has not been waited for. The
        # identity is None if the child has already ended.
        identity = lifeline.identity(child.pid)
        if self.detached:
            # The server can outlive this process, so nothing here waits for its end. Without an
            # exit code, Popen's finaliser would warn that the child is still running.
            child.returncode = 0
            self._process = _Process(child.pid, identity or "")
        else:
            self._process = _Process(child.pid, identity or "", child)
        if identity is None:
            return
        if not self.detached:
            keeper.add(child.pid, identity, self.orphan_signal)
        self._record(self._process)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        delay = 0.005
        while True:
            if self._process is None or not self._process.alive():
                raise self._failure("ended while starting")
            with suppress(OSError):
                if self._ready():
                    return
            if time.monotonic() > deadline:
                raise self._failure(f"did not answer within {START_SECONDS:.0f} s")
            time.sleep(delay)
            delay = min(delay * 1.5, 0.1)

    def _failure(self, reason: str) -> StackError:
        """Make the error of a failed start, with the log of this start and its errors first."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        tail = "\n".join(f"    {line}" for line in self._explained(lines)[:_LOG_LINES])
        return StackError(
            f"{self.name} on port {self.port} {reason}; {self._advice()}. Its log of this start:\n"
            f"{tail or '    (empty)'}"
        )

    def _explained(self, lines: list[str]) -> list[str]:
        """Return the lines of the log that explain a failed start, the most important first."""
        return lines[-_LOG_LINES:]

    def _required_pid(self) -> int:
        if (pid := self.pid) is None:
            raise StackError(f"{self.name} on {self.data} is not running; start it first")
        return pid

    def _forget(self) -> None:
        if self._process is not None:
            keeper.remove(self._process.pid)
            # Another process may have started a new server here in the meantime.
            if self._recorded().get("identity") == self._process.identity:
                self._record(None)
            self._process = None

    @property
    def _state(self) -> Path:
        return self.data / "server.json"

    def _record(self, process: _Process | None) -> None:
        recorded: dict[str, object] = {"name": self.name, "ports": self._ports}
        if process is not None:
            recorded |= {"pid": process.pid, "identity": process.identity}
        with suppress(FileNotFoundError):  # the folder may have been removed
            temporary = self._state.with_suffix(".new")
            with temporary.open("w") as file:
                file.write(json.dumps(recorded, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())  # the ledger knows Redis by its port
            temporary.replace(self._state)

    def _recorded(self) -> dict[str, Any]:
        try:
            recorded = json.loads(self._state.read_text())
        except (FileNotFoundError, ValueError):  # a power cut can damage it
            return {}
        return recorded if isinstance(recorded, dict) and recorded.get("name") == self.name else {}

    def _running_elsewhere(self) -> _Process | None:
        recorded = self._recorded()
        if "pid" not in recorded:
            return None
        process = _Process(recorded["pid"], recorded["identity"])
        return process if process.alive() else None
