"""A stopped cluster leaves nothing, and a cluster that did not start leaves only its logs."""

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
    """Return a cluster's processes, mounts, control groups and files."""
    processes = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            command = (each / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # the process has ended
            continue
        if str(state) in command:
            processes.append(command)
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(state) in line]
    folders = (folder for folder, _, _ in os.walk("/sys/fs/cgroup"))
    groups = sorted(each for each in folders if Path(each).name.startswith("flashsale-"))
    files = sorted(str(path) for path in [*state.parent.glob(f"{state.name}*"), *state.glob("*")])
    return [*processes, *mounts, *groups, *files]


def logs(state: Path) -> list[str]:
    """Return the files of a cluster that did not start."""
    return [str(state), str(state.with_name(f"{state.name}.lock")), str(state / "log")]


def start(state: Path) -> subprocess.Popen[bytes]:
    program = "import sys; from pathlib import Path; from dev.cluster.node import Cluster; "
    program += "Cluster(Path(sys.argv[1])).up()"
    return subprocess.Popen(
        [sys.executable, "-c", program, str(state)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("moment", ["first-process", "etcd", "kubelet"])
def test_down_cleans_up_after_a_start_that_was_killed(tmp_path: Path, moment: str) -> None:
    state = tmp_path / "state"
    before = traces(state)
    with start(state) as up:
        log = state / "log" / f"{moment}.log"
        eventually(log.exists, f"{moment} starts", seconds=START_SECONDS)
        up.send_signal(signal.SIGKILL)
    Cluster(state).down()
    assert traces(state) == before


def test_an_interrupted_start_cleans_up(tmp_path: Path) -> None:
    state = tmp_path / "state"
    before = traces(state)
    with start(state) as up:
        eventually((state / "log" / "etcd.log").exists, "etcd starts", seconds=START_SECONDS)
        up.send_signal(signal.SIGINT)
    left = traces(state)
    Cluster(state).down()
    assert left == [*before, *logs(state)]
    assert traces(state) == before


def test_a_failed_start_reports_the_reason_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    before = traces(state)
    # This containerd exits immediately.
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "containerd").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", f"{broken}:{os.environ['PATH']}")
    with pytest.raises(StackError, match=r"containerd ended \(exit code 1\)"):
        Cluster(state).up()
    assert traces(state) == [*before, *logs(state)]


def test_up_and_down_may_be_repeated(tmp_path: Path) -> None:
    state = tmp_path / "state"
    before = traces(state)
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
