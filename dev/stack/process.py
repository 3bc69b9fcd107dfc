"""A server process: started, waited for, paused, killed and stopped by the id it was given."""

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
from dev.stack.ports import free_port

START_SECONDS = 60.0
_LOG_LINES = 20

# A detached server outlives its Popen, whose finaliser would warn about exactly that.
_detached: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True, slots=True)
class _Process:
    """A process that was started here or, by its recorded identity, elsewhere."""

    pid: int
    identity: str
    child: subprocess.Popen[bytes] | None = None

    def alive(self) -> bool:
        if self.child is not None:
            return self.child.poll() is None
        return lifeline.identity(self.pid) == self.identity

    def wait(self, seconds: float) -> bool:
        """Whether it ended within that time."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


class Server(ABC):
    """One server on loopback with its data in one folder.

    It is one process tree in a session of its own. Unless `detached`, it ends with this process,
    however this process ends. The folder's `server.json` records port, process id and what tells
    that process from a later one with the same id: a new object on the same folder keeps the port,
    and `attach` finds a server that another process started.

    An object is not thread-safe, but may be used from any one thread at a time.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    # What ends it at once, its own way, when there is nobody left to wait for it.
    orphan_signal: ClassVar[signal.Signals] = signal.SIGKILL
    stop_seconds: ClassVar[float] = 30.0

    def __init__(self, data: Path, port: int | None = None, *, detached: bool = False) -> None:
        """`data` is made when missing; `port` is a free one, kept with the data, unless given."""
        self.data = Path(data).absolute()
        self.detached = detached
        self._ports: dict[str, int] = self._recorded().get("ports", {})
        if port is not None:
            self._ports["main"] = port
        self._process: _Process | None = None

    @classmethod
    def attach(cls, data: Path) -> Self:
        """The server that may run on this folder already, whoever started it.

        `pid` is None if it does not run. Settings other than the port are the defaults: meant for
        stop, kill, pause and resume.
        """
        server = cls(data, detached=True)
        server._process = server._running_elsewhere()
        return server

    @property
    def port(self) -> int:
        """The port, chosen at first use: free then, and outside the range of outgoing ones."""
        return self._port("main")

    @property
    def pid(self) -> int | None:
        """The id of the running process, None when it does not run."""
        if self._process is not None and not self._process.alive():
            self._forget()
        return self._process.pid if self._process is not None else None

    @property
    def log(self) -> Path:
        """What the server prints."""
        return self.data / f"{self.name}.log"

    def start(self) -> None:
        """Starts the server and returns once it answers; does nothing if this object runs it.

        The first start initialises the data folder. Raises StackError if the server has not become
        useful within 60 seconds or another process runs one on this folder.
        """
        if self.pid is not None:
            return
        if (other := self._running_elsewhere()) is not None:
            raise StackError(
                f"{self.name}: process {other.pid} runs on {self.data} already; "
                f"stop it ({type(self).__name__}.attach(data).stop()) or take another folder"
            )
        self.data.mkdir(parents=True, exist_ok=True)
        try:
            self._prepare()
            self._spawn()
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Ends the server gracefully, killing it after `stop_seconds`; returns when it is gone."""
        if self.pid is None or self._process is None:
            return
        lifeline.send(lifeline.family(self._process.pid), signal.SIGCONT)
        lifeline.send([self._process.pid], self.stop_signal)
        if self._process.wait(self.stop_seconds):
            self._forget()
        else:
            self.kill()

    def kill(self) -> None:
        """Kills the server and its children without warning; returns when they are gone."""
        if self.pid is None or self._process is None:
            return
        lifeline.destroy(self._process.pid)
        self._process.wait(self.stop_seconds)
        self._forget()

    def pause(self) -> None:
        """Freezes the server and its children: connections stay open, nothing is answered."""
        lifeline.freeze(self._required_pid())

    def resume(self) -> None:
        """Ends a pause."""
        lifeline.send(lifeline.family(self._required_pid())[::-1], signal.SIGCONT)

    def restart(self) -> None:
        """Stops and starts on the same port and data."""
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
        """Makes the data folder ready for the server, the first time and later; idempotent."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The program and its arguments; its folder is `data`."""

    @abstractmethod
    def _ready(self) -> bool:
        """Whether it does its work now; False or OSError if not yet."""

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _advice(self) -> str:
        """What to do when it did not start."""
        return f"read {self.log}; if its data is broken, remove {self.data}"

    def _port(self, role: str) -> int:
        if role not in self._ports:
            self._ports[role] = free_port(frozenset(self._ports.values()))
        return self._ports[role]

    def _spawn(self) -> None:
        command = self._command()
        try:
            with self.log.open("ab") as log:
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
        if self.detached:
            _detached.append(child)
        # A child that was not waited for keeps its id, so this identity is its own; it has none if
        # it has ended already.
        identity = lifeline.identity(child.pid)
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
                raise self._failure(f"does not answer after {START_SECONDS:.0f} s")
            time.sleep(delay)
            delay = min(delay * 1.5, 0.1)

    def _failure(self, what: str) -> StackError:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        tail = "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])
        return StackError(
            f"{self.name} on port {self.port} {what}; {self._advice()}. Its last words:\n{tail}"
        )

    def _required_pid(self) -> int:
        if (pid := self.pid) is None:
            raise StackError(f"{self.name} on {self.data} does not run; start it first")
        return pid

    def _forget(self) -> None:
        if self._process is not None:
            keeper.remove(self._process.pid)
            # Another process may have started a new server here since.
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
        with suppress(FileNotFoundError):  # the folder may have been removed since
            temporary = self._state.with_suffix(".new")
            temporary.write_text(json.dumps(recorded, indent=2) + "\n")
            temporary.replace(self._state)

    def _recorded(self) -> dict[str, Any]:
        try:
            recorded: dict[str, Any] = json.loads(self._state.read_text())
        except FileNotFoundError:
            return {}
        return recorded if recorded.get("name") == self.name else {}

    def _running_elsewhere(self) -> _Process | None:
        recorded = self._recorded()
        if "pid" not in recorded:
            return None
        process = _Process(recorded["pid"], recorded["identity"])
        return process if process.alive() else None
