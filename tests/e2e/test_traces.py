"""A cluster leaves nothing but its logs, whether it is stopped, killed or fails to start."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from dev.cluster.node import Cluster
from dev.stack.errors import StackError
from tests.support.eventually import eventually
from tests.support.paths import ROOT

START_SECONDS: Final = 120.0
"""How long a part of the cluster may take to start. A test that meets it has failed."""


def traces(state: Path) -> list[str]:
    """Return a cluster's processes, mounts and control groups, and the files in its folder."""
    processes = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            command = (each / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # the process has ended
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
    # A shell lets its background processes ignore Ctrl-C, and children inherit this.
    program += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "Cluster(Path(sys.argv[1])).up()"
    return subprocess.Popen(
        [sys.executable, "-c", program, str(state)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("moment", ["first-process", "etcd", "kubelet"])
def test_down_cleans_up_after_a_start_that_was_killed(tmp_path: Path, moment: str) -> None:
    before = traces(tmp_path)
    state = tmp_path / "state"
    with start(state) as up:
        log = state / "log" / f"{moment}.log"
        eventually(log.exists, f"{moment} starts", seconds=START_SECONDS)
        up.send_signal(signal.SIGKILL)
    Cluster(state).down()
    assert traces(state) == before


def test_an_interrupted_start_cleans_up(tmp_path: Path) -> None:
    before = traces(tmp_path)
    state = tmp_path / "state"
    with start(state) as up:
        eventually((state / "log" / "etcd.log").exists, "etcd starts", seconds=START_SECONDS)
        up.send_signal(signal.SIGINT)
    left = traces(state)
    Cluster(state).down()
    assert left == before


def test_a_failed_start_reports_the_reason_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = traces(tmp_path)
    state = tmp_path / "state"
    # This containerd exits immediately.
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "containerd").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", f"{broken}:{os.environ['PATH']}")
    with pytest.raises(StackError, match=r"containerd ended \(exit code 1\)"):
        Cluster(state).up()
    assert traces(state) == before


def test_up_and_down_may_be_repeated(tmp_path: Path) -> None:
    before = traces(tmp_path)
    state = tmp_path / "state"
    cluster = Cluster(state)
    cluster.up()
    try:
        nodes = [str(cluster.commands / "kubectl"), "get", "nodes", "--no-headers"]
        output = subprocess.run(nodes, capture_output=True, text=True, check=True).stdout.split()
        assert output[:2] == ["node", "Ready"]
        cluster.up()
    finally:
        cluster.down()
    cluster.down()
    assert traces(state) == before
