"""A cluster that has ended, in whatever way, has left nothing but its logs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dev.cluster.node import Cluster
from dev.stack.errors import StackError
from tests.e2e.shop import eventually
from tests.support.paths import ROOT


def traces(state: Path) -> list[str]:
    """Processes, mounts and control groups of a cluster, and what its folder has."""
    processes = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            command = (each / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended meanwhile
            continue
        if str(state) in command:
            processes.append(command)
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(state) in line]
    folders = (folder for folder, _, _ in os.walk("/sys/fs/cgroup"))
    groups = sorted(each for each in folders if Path(each).name.startswith("flashsale-"))
    files = [str(path) for path in state.glob("*") if path.name != "log"]
    return [*processes, *mounts, *groups, *files]


def start(state: Path) -> subprocess.Popen[bytes]:
    program = "import signal, sys; from pathlib import Path; from dev.cluster.node import Cluster; "
    # Whoever runs in the background of a shell has inherited that Ctrl-C is ignored.
    program += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "Cluster(Path(sys.argv[1])).up()"
    return subprocess.Popen(
        [sys.executable, "-c", program, str(state)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("moment", ["first-process", "etcd", "kubelet"])
def test_a_start_that_is_killed_in_the_middle(tmp_path: Path, moment: str) -> None:
    before = traces(tmp_path)
    state = tmp_path / "state"
    with start(state) as up:
        eventually(f"{moment} starts", (state / "log" / f"{moment}.log").exists)
        up.send_signal(signal.SIGKILL)
    Cluster(state).down()
    assert traces(state) == before


def test_a_start_that_is_interrupted_cleans_up_itself(tmp_path: Path) -> None:
    before = traces(tmp_path)
    state = tmp_path / "state"
    with start(state) as up:
        eventually("etcd starts", (state / "log" / "etcd.log").exists)
        up.send_signal(signal.SIGINT)
    left = traces(state)
    Cluster(state).down()
    assert left == before


def test_a_start_that_fails_says_why_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = traces(tmp_path)
    state = tmp_path / "state"
    # A containerd that ends at once.
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "containerd").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", f"{broken}:{os.environ['PATH']}")
    with pytest.raises(StackError, match=r"containerd ended \(exit code 1\)"):
        Cluster(state).up()
    assert traces(state) == before


def test_a_cluster_that_ran_and_its_end_twice(tmp_path: Path) -> None:
    before = traces(tmp_path)
    state = tmp_path / "state"
    cluster = Cluster(state)
    cluster.up()
    try:
        nodes = [str(cluster.commands / "kubectl"), "get", "nodes", "--no-headers"]
        said = subprocess.run(nodes, capture_output=True, text=True, check=True).stdout.split()
        assert said[:2] == ["node", "Ready"]
        cluster.up()  # It runs: nothing happens.
    finally:
        cluster.down()
    cluster.down()
    assert traces(state) == before
