"""Ends servers whose parent has died; also the process facts that this needs.

Run as a script, it is told on its standard input which servers exist, and ends those that are left
when that input closes, which the kernel does however the parent died. This is not
PR_SET_PDEATHSIG because that fires when the *thread* that started the server ends, misses
PostgreSQL's children, and would leave a server that was paused when its parent was killed.

The script is run by its path, isolated: it imports nothing but the standard library.
"""

import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_HAS_PROC = (_PROC / "self" / "stat").exists()


def identity(pid: int) -> str | None:
    """What tells this process from a later one with the same id; None once it is dead.

    A zombie counts as dead: it holds no port, no lock and no memory.
    """
    if not _HAS_PROC:
        out = _ps("-o", "stat=,lstart=", "-p", str(pid)).split(maxsplit=1)
        return None if len(out) < 2 or out[0].startswith("Z") else out[1].strip()
    fields = _stat(pid)
    if fields is None or fields[0] in "ZX":
        return None
    boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{fields[19]}"


def family(pid: int) -> list[int]:
    """The process and all that descend from it, parents first."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found = [pid]
    for member in found:
        found.extend(children.get(member, ()))
    return found


def send(pids: list[int], sent: signal.Signals) -> None:
    """Sends the signal to each process that still exists."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, sent)


def freeze(pid: int) -> list[int]:
    """Stops the process and all its descendants; returns them.

    The parent is stopped first, so none is missed because it was just being started. A process
    group would not do: each PostgreSQL backend makes itself the leader of its own.
    """
    members = [pid]
    send(members, signal.SIGSTOP)
    while (found := family(pid)) != members:
        send([each for each in found if each not in members], signal.SIGSTOP)
        members = found
    return members


def destroy(pid: int) -> None:
    """Kills the process and all its descendants, and waits (10 s at most) until none is left."""
    members = {member: identity(member) for member in freeze(pid)}
    send(list(members), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if all(was is None or identity(member) != was for member, was in members.items()):
            return
        time.sleep(0.005)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on (the name before it may hold anything)."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _parents() -> list[tuple[int, int]]:
    if not _HAS_PROC:
        lines = _ps("-axo", "pid=,ppid=").splitlines()
        return [(int(pid), int(parent)) for pid, parent in (line.split() for line in lines)]
    pids = [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]
    return [(pid, int(stat[1])) for pid in pids if (stat := _stat(pid)) is not None]


def _ps(*arguments: str) -> str:
    return subprocess.run(
        ["ps", *arguments],  # noqa: S607 - wherever this system has it
        capture_output=True,
        text=True,
        check=False,
    ).stdout


def _end(pid: int, recorded: str, first: signal.Signals) -> None:
    """Ends a server: its own quick way first, then without mercy; never a process with its id."""
    if identity(pid) != recorded:
        return
    if first is not signal.SIGKILL:
        send(family(pid), signal.SIGCONT)
        send([pid], first)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if identity(pid) != recorded:
                return
            time.sleep(0.02)
    destroy(pid)


def _watch() -> None:
    """Reads "+ PID SIGNAL IDENTITY" and "- PID" lines; at their end, ends what is left.

    A forked child of the parent may hold the other end of the pipe open, so the parent's id is
    watched as well.
    """
    # Ctrl-C is for the parent, whose end is what counts here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = int(sys.argv[1])
    servers: dict[int, tuple[str, signal.Signals]] = {}
    pending = b""
    os.set_blocking(0, False)
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout=1):
                if os.getppid() != parent:
                    break
                continue
            if not (read := os.read(0, 65536)):
                break
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                verb, pid, *rest = line.decode().split(maxsplit=3)
                servers.pop(int(pid), None)
                if verb == "+":
                    servers[int(pid)] = (rest[1], signal.Signals(int(rest[0])))
    for server, (recorded, first) in servers.items():
        _end(server, recorded, first)


if __name__ == "__main__":
    _watch()
