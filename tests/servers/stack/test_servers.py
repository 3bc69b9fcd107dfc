"""Every server of the stack starts, stops, pauses and dies alike: real servers, real clients."""

import gc
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from dev.stack import lifeline
from dev.stack.errors import StackError
from dev.stack.ports import free_port
from dev.stack.process import Server
from dev.stack.servers import RedisServer
from tests.support.eventually import eventually
from tests.support.paths import ROOT

PROC = Path("/proc")


class Kind(Protocol):
    """The part of `Kind` in conftest.py that these tests use."""

    server: type[Server]

    def make(self, data: Path, port: int | None = None) -> Server: ...
    async def write(self, server: Server, text: str) -> None: ...
    async def read(self, server: Server) -> str: ...


def members(server: Server) -> dict[int, str]:
    """Return the server's processes with their identities."""
    assert server.pid is not None
    found = {pid: lifeline.identity(pid) for pid in lifeline.family(server.pid)}
    return {pid: identity for pid, identity in found.items() if identity is not None}


def alive(processes: dict[int, str]) -> list[int]:
    return [pid for pid, identity in processes.items() if lifeline.identity(pid) == identity]


def another_process(server: type[Server], data: Path, then: str, **settings: object) -> list[str]:
    """Return the command of a Python that starts the server, prints a line, and runs `then`."""
    program = f"""
import sys, signal, os
from pathlib import Path
from dev.stack.servers import {server.__name__}
server = {server.__name__}(Path({str(data)!r}), **{settings!r})
server.start()
print("started", flush=True)
{then}
"""
    return [sys.executable, "-c", program]


async def test_a_killed_server_starts_again_with_its_port_and_data(
    kind: Kind, tmp_path: Path
) -> None:
    with kind.make(tmp_path / "data") as server:
        port = server.port
        await kind.write(server, "kept")
        left = members(server)
        server.kill()
        assert server.pid is None
        assert not alive(left)
        server.start()
        assert server.port == port
        assert await kind.read(server) == "kept"


async def test_a_restart_keeps_port_and_data(light_kind: Kind, tmp_path: Path) -> None:
    with light_kind.make(tmp_path / "data") as server:
        port, pid = server.port, server.pid
        await light_kind.write(server, "kept")
        server.restart()
        assert server.port == port
        assert server.pid != pid
        assert await light_kind.read(server) == "kept"


def test_a_stopped_server_leaves_no_process(kind: Kind, tmp_path: Path) -> None:
    server = kind.make(tmp_path / "data")
    server.start()
    left = members(server)
    server.stop()
    assert not alive(left)
    assert server.pid is None
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port)).close()


@pytest.mark.skipif(not PROC.exists(), reason="reads the state of processes from /proc")
async def test_every_process_of_a_paused_server_is_stopped_until_it_is_resumed(
    kind: Kind, tmp_path: Path
) -> None:
    def states(processes: dict[int, str]) -> set[str]:
        stats = [(PROC / str(pid) / "stat").read_text() for pid in processes]
        return {stat.rpartition(")")[2].split()[0] for stat in stats}

    with kind.make(tmp_path / "data") as server:
        await kind.write(server, "kept")
        server.pause()
        paused = members(server)
        eventually(lambda: states(paused) == {"T"})
        server.resume()
        assert await kind.read(server) == "kept"


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_paused_server_can_be_stopped_and_killed(
    light_kind: Kind, tmp_path: Path, end: str
) -> None:
    server = light_kind.make(tmp_path / "data")
    server.start()
    server.pause()
    left = members(server)
    getattr(server, end)()
    assert not alive(left)


def test_a_second_start_of_a_running_server_does_nothing(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        pid = server.pid
        server.start()
        assert server.pid == pid


def test_a_second_server_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        with pytest.raises(StackError, match=r"already runs on .*; stop it"):
            RedisServer(tmp_path).start()
        assert server.pid is not None


def test_a_new_object_on_the_same_folder_has_the_same_port(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as first:
        port = first.port
    assert RedisServer(tmp_path).port == port


def test_a_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    left = members(server)
    # PR_SET_PDEATHSIG would have killed the server at the end of the thread.
    assert alive(left)
    server.restart()
    server.stop()


def test_a_detached_server_can_be_stopped_from_another_process(
    light_kind: Kind, tmp_path: Path, cleanup: Callable[[Server], None]
) -> None:
    data = tmp_path / "data"
    starter = another_process(light_kind.server, data, "server.port", detached=True)
    subprocess.run(starter, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    server = light_kind.server.attach(data)
    cleanup(server)
    left = members(server)
    assert alive(left)
    socket.create_connection(("127.0.0.1", server.port)).close()
    server.stop()
    assert not alive(left)
    assert light_kind.server.attach(data).pid is None


def test_a_detached_server_is_no_child_to_wait_for(
    tmp_path: Path, cleanup: Callable[[Server], None]
) -> None:
    server = RedisServer(tmp_path, detached=True)
    server.start()
    cleanup(server)
    children = [each for each in gc.get_objects() if isinstance(each, subprocess.Popen)]
    assert not [child for child in children if child.pid == server.pid and child.poll() is None]


@pytest.mark.parametrize("then", ["", "server.pause()"], ids=["running", "paused"])
@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_a_server_ends_when_its_parent_is_killed(
    light_kind: Kind, tmp_path: Path, then: str, fatal: signal.Signals
) -> None:
    data = tmp_path / "data"
    ending = f"{then}\nprint('paused', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        another_process(light_kind.server, data, ending),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        assert parent.stdout.readline() == "paused\n"
        left = members(light_kind.server.attach(data))
        assert left
        parent.send_signal(fatal)
    eventually(lambda: not alive(left))


def test_a_server_ends_when_its_parent_exits_without_stopping_it(tmp_path: Path) -> None:
    starter = another_process(RedisServer, tmp_path, "")
    subprocess.run(starter, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert RedisServer.attach(tmp_path).pid is None


def test_a_later_process_with_the_recorded_id_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        server = RedisServer(tmp_path)
        server.start()
        server.stop()
        state = tmp_path / "server.json"
        recorded = json.loads(state.read_text())
        identity = lifeline.identity(stranger.pid)
        earlier = f"{identity}1"
        state.write_text(json.dumps({**recorded, "pid": stranger.pid, "identity": earlier}))
        attached = RedisServer.attach(tmp_path)
        assert attached.pid is None
        attached.stop()
        attached.kill()
        with pytest.raises(StackError, match="is not running"):
            attached.pause()
        assert lifeline.identity(stranger.pid) == identity
        with RedisServer(tmp_path) as again:
            assert again.pid != stranger.pid
        stranger.communicate(b"\n")
        assert stranger.returncode == 0


@pytest.mark.parametrize("damaged", [b"", b"\0\0", b"\xff", b"[]"])
def test_a_damaged_record_counts_as_none(damaged: bytes, tmp_path: Path) -> None:
    (tmp_path / "server.json").write_bytes(damaged)
    assert RedisServer.attach(tmp_path).pid is None


def test_the_error_of_a_failed_start_has_the_log_and_no_process_is_left(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, options=("--no-such-setting", "1"))
    with pytest.raises(StackError, match="no-such-setting"):
        server.start()
    assert server.pid is None


def test_the_error_of_a_failed_start_names_the_port(light_kind: Kind, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = light_kind.make(tmp_path / "data", port=port)
        with pytest.raises(StackError, match=f"listens on port {port}"):
            server.start()


def test_a_server_that_is_not_running_cannot_be_paused(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="is not running; start it first"):
        RedisServer(tmp_path).pause()


@pytest.mark.skipif(not PROC.exists(), reason="the range is in /proc")
def test_a_free_port_is_outside_the_range_of_outgoing_ports() -> None:
    first = int((PROC / "sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first <= 12_000:
        pytest.skip("no room below this machine's outgoing ports")
    assert free_port() < first


def test_a_port_is_given_once_although_nothing_listens_on_it_yet() -> None:
    assert len({free_port() for _ in range(300)}) == 300


def test_a_killed_lifeline_is_replaced(tmp_path: Path) -> None:
    ending = """
from dev.stack import lifeline
for pid in set(lifeline.family(os.getpid())[1:]) - {server.pid}:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
with RedisServer(server.data / "second"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run(another_process(RedisServer, tmp_path, ending), cwd=ROOT, check=False)
    eventually(lambda: RedisServer.attach(tmp_path).pid is None)
    eventually(lambda: RedisServer.attach(tmp_path / "second").pid is None)
