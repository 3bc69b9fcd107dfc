"""Ends servers whose parent has died, and answers questions about processes.

As a script, it reads from its standard input which servers exist. When that input closes, it ends
the servers that are left. The kernel closes the input even if the parent was killed.

PR_SET_PDEATHSIG would not do. It fires when the *thread* that started the server ends, it misses
PostgreSQL's children, and it has no effect on a server that was paused.

The script is run by its path in isolated mode, so it imports only the standard library.
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
    """Return a text that only this process with this id ever has, or None once it is dead.

    A zombie counts as dead, because it holds no port, no lock and no memory. While other threads of
    the process are still ending, it does hold them and counts as alive.
    """
    if not _HAS_PROC:
        out = _ps("-o", "stat=,lstart=", "-p", str(pid)).split(maxsplit=1)
        return None if len(out) < 2 or out[0].startswith("Z") else out[1].strip()
    fields = _stat(pid)
    if fields is None or (fields[0] in "ZX" and int(fields[17]) <= 1):
        return None
    boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{fields[19]}"


def family(pid: int) -> list[int]:
    """Return the process and all its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found = [pid]
    for member in found:
        found.extend(children.get(member, ()))
    return found


def send(pids: list[int], sent: signal.Signals) -> None:
    """Send the signal to each process that still exists."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, sent)


def freeze(pid: int) -> list[int]:
    """Stop the process and all its descendants, and return them.

    The parent is stopped first, so that it starts no child that would be missed. A process group
    would not do, because each PostgreSQL backend becomes the leader of its own group.
    """
    members = [pid]
    send(members, signal.SIGSTOP)
    while (found := family(pid)) != members:
        send([each for each in found if each not in members], signal.SIGSTOP)
        members = found
    return members


def destroy(pid: int) -> None:
    """Kill the process and all its descendants, and wait at most 10 s until they are dead."""
    members = {member: identity(member) for member in freeze(pid)}
    send(list(members), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if all(was is None or identity(member) != was for member, was in members.items()):
            return
        time.sleep(0.005)


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the name, which can contain any character."""
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
        ["ps", *arguments],  # noqa: S607 - its path differs between systems
        capture_output=True,
        text=True,
        check=False,
    ).stdout


def _end(pid: int, recorded: str, first: signal.Signals) -> None:
    """End a server with its first signal, or after 5 s with SIGKILL.

    A later process with the same id is left alone.
    """
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
    """Read "+ PID SIGNAL IDENTITY" and "- PID" lines, then end the servers that are left.

    A forked child of the parent can hold the other end of the pipe open, so the parent's id is
    checked as well.
    """
    # Ctrl-C is meant for the parent. This process acts when the parent has ended.
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
