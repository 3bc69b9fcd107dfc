"""A real one-node Kubernetes without Docker: kubelet, containerd, runc and CNI on Linux, as root.

It runs in its own namespaces (network, mounts, processes, control groups). Outside of them it has
only a folder, and a control group in each hierarchy. Its network has no way out, NetworkPolicies
are not enforced, and its only volumes are sixteen folders of its node.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dev import debian
from dev.cluster import pki
from dev.cluster.binaries import binaries, helm, kubernetes_version, node, system
from dev.cluster.first_process import ADDRESS, API_SERVICE, Plan, controllers
from dev.images.archive import save
from dev.images.building import wrap
from dev.paths import LOCAL, ROOT
from dev.progress import Progress, say
from dev.stack import lifeline
from dev.stack.errors import StackError
from dev.stack.locks import exclusive

OF_TESTS: Final = LOCAL / "e2e"
"""The folder of the cluster of `make e2e`."""
_CGROUPS: Final = Path("/sys/fs/cgroup")
_PACKAGES: Final = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "ip": "iproute2",
}
_SECONDS: Final = 180.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster of one folder, running or not. Any process can stop a cluster of another."""

    state: Path = LOCAL / "cluster"

    @property
    def runs(self) -> bool:
        """Whether it is up. A cluster that is still starting is not."""
        return (self.state / "ready").exists() and self._first_process() is not None

    @property
    def commands(self) -> Path:
        """A folder for PATH with kubectl, helm and `in-cluster COMMAND` for this cluster."""
        return self.state / "bin"

    def up(self) -> None:
        """Start it unless it is running. Returns when its node is Ready and its DNS answers.

        A start that fails or is interrupted leaves nothing but its logs. Raises StackError.
        """
        _require_machine()
        for build in (binaries, node, system, helm):  # takes minutes the first time
            build()
        with exclusive(self.state):
            if self.runs:
                return
            self._clear()
            progress = Progress()
            say(f"Kubernetes {kubernetes_version()}: starting one node")
            try:
                self._prepare()
                self._start(progress)
            except BaseException:
                self._clear()
                raise
            progress.end("Kubernetes: node Ready after {seconds} s")

    def down(self) -> None:
        """Stop it in any state, and remove its folder."""
        with exclusive(self.state, remove=True):
            self._clear()
            if self.state.exists():
                shutil.rmtree(self.state)

    def inside(self, *command: str) -> list[str]:
        """Return a command that runs inside the cluster's network, which has Services and pods."""
        return [*self._enter("net"), *command]

    def load(self, names: Mapping[str, str]) -> None:
        """Load images that were built here. `names` maps each reference to its name there."""
        command = [*self._enter("mnt"), "ctr", "--namespace=k8s.io", "images", "import", "-"]
        archive = self.state / "images.tar"
        save(names, archive)
        with archive.open("rb") as images:
            done = subprocess.run(
                command, stdin=images, capture_output=True, text=True, check=False
            )
        archive.unlink()
        if done.returncode != 0:
            raise StackError(f"images cannot be imported: {done.stderr.strip()}")

    def _clear(self) -> None:
        """Stop everything, and remove everything but the logs."""
        deadline = time.monotonic() + 30
        # The first process of a start that was killed can still be about to join the groups.
        while left := [group for group in self._groups() if not _removed(group)]:
            members = sorted({pid for group in left for pid in _members(group)})
            lifeline.send(members, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise StackError(
                    f"these control groups cannot be removed: {left}. Their processes: {members}"
                )
            time.sleep(0.05)
        for path in self.state.glob("*"):
            if path.is_dir() and path != self._log.parent:
                shutil.rmtree(path)
            elif path.is_file() and path != self._group_list:
                path.unlink()
        self._group_list.unlink(missing_ok=True)

    def _prepare(self) -> None:
        for folder in ("bin", "log"):
            (self.state / folder).mkdir(parents=True, exist_ok=True)
        addresses = ("127.0.0.1", ADDRESS, API_SERVICE)
        pki.make(self.state / "pki", f"https://{ADDRESS}:6443", addresses)
        images = {name: f"flashsale.dev/{name}:local" for name in ("pause", "coredns")}
        for name, reference in images.items():
            wrap(system() / name, reference)
        archive = self.state / "system.tar"
        save({reference: reference for reference in images.values()}, archive)
        plan = Plan(
            state=str(self.state),
            control_plane=str(binaries().folder),
            node=str(node()),
            coredns=str(Path(__file__).with_name("coredns.yaml")),
            images=str(archive),
        )
        (self.state / "plan.json").write_text(plan.written())

    def _start(self, progress: Progress) -> None:
        self._make_groups()
        # The process joins its control groups before it enters its namespaces, so that they are the
        # roots in there.
        joining = 'while read -r group; do echo $$ >"$group/cgroup.procs"; done; exec "$@"'
        shell = ["sh", "-euc", joining, "sh"]
        namespaces = ["--net", "--mount", "--uts", "--ipc", "--cgroup", "--pid"]
        unshare = ["unshare", *namespaces, "--fork", "--mount-proc"]
        plan = self.state / "plan.json"
        process = [sys.executable, "-m", "dev.cluster.first_process", str(plan)]
        with self._log.open("wb") as log, self._group_list.open() as groups:
            outer = subprocess.Popen(
                [*shell, *unshare, *process],
                cwd=ROOT,
                stdin=groups,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + _SECONDS
        while not (self.state / "ready").exists():
            lines = self._log.read_text(errors="replace").splitlines()
            if outer.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(f"    {line}" for line in lines[-20:])
                raise StackError(
                    f"Kubernetes did not start; its logs are in {self._log.parent}\n{tail}"
                )
            step = lines[-1].strip() if lines else "starting"
            progress.show(f"Kubernetes: {step}, {{seconds}} s")
            time.sleep(0.1)
        (first,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        identity = lifeline.identity(int(first))
        (self.state / "process.json").write_text(json.dumps({"pid": int(first), "is": identity}))
        self._write_commands()
        # The cluster can outlive this process, so nothing here waits for its end. Without an exit
        # code, Popen's finaliser would warn that the child is still running.
        outer.returncode = 0

    def _write_commands(self) -> None:
        own = {
            "KUBECONFIG": str(self.state / "pki" / "admin.kubeconfig"),
            "KUBECACHEDIR": str(self.state / "kubectl"),
            "KUBERC": "off",
            **{
                f"HELM_{each}_HOME": str(self.state / "helm")
                for each in ("CACHE", "CONFIG", "DATA")
            },
        }
        settings = [f"{name}={value}" for name, value in own.items()]
        programs = {"kubectl": [str(binaries().kubectl)], "helm": [str(helm())], "in-cluster": []}
        for name, program in programs.items():
            command = shlex.join([*self.inside("env"), *settings, *program])
            path = self.commands / name
            path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            path.chmod(0o755)

    @property
    def _log(self) -> Path:
        return self.state / "log" / "first-process.log"

    @property
    def _group_list(self) -> Path:
        return self.state / "groups"

    def _groups(self) -> list[Path]:
        listed = self._group_list.read_text().splitlines() if self._group_list.exists() else []
        return [Path(line) for line in listed]

    def _make_groups(self) -> None:
        """Make a control group in each hierarchy, inside this process's own.

        The list is written before, so that `down` can remove groups of a failed start.
        """
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        # The name depends on the folder, which has only one cluster at a time.
        name = f"flashsale-{hashlib.sha256(str(self.state).encode()).hexdigest()[:12]}"
        groups = [
            _CGROUPS / found.removeprefix("name=") / path.strip("/") / name
            for line in lines
            for _, found, path in [line.split(":", 2)]
            if found
        ]
        self._group_list.write_text("".join(f"{group}\n" for group in groups))
        for group in groups:
            group.mkdir()
            # In a hierarchy with cpusets, a new group has no processors.
            for each in ("cpuset.cpus", "cpuset.mems"):
                if (group / each).exists():
                    (group / each).write_text((group.parent / each).read_text())

    def _enter(self, namespace: str) -> list[str]:
        if (pid := self._first_process()) is None:
            raise StackError("the cluster is not running; start it with: make cluster")
        option = {"net": "--net", "mnt": "--mount"}[namespace]
        return ["nsenter", f"{option}=/proc/{pid}/ns/{namespace}"]

    def _first_process(self) -> int | None:
        try:
            recorded = json.loads((self.state / "process.json").read_text())
        except FileNotFoundError:
            return None
        pid: int = recorded["pid"]
        return pid if lifeline.identity(pid) == recorded["is"] else None


def _require_machine() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise StackError("a node needs Linux and root; elsewhere use kind: kind-config.yaml")
    if not controllers():
        raise StackError(
            "this machine has only version 2 of control groups, but the node needs version 1; "
            "use kind: kind-config.yaml"
        )
    debian.require(_PACKAGES, "a node")


def _members(group: Path) -> list[int]:
    """Return every process in a control group and its descendants."""
    found = []
    # os.walk, unlike Path.rglob, ignores folders that disappear in the meantime.
    for each, _, _ in os.walk(group):
        with suppress(OSError):  # it has disappeared
            found += [int(pid) for pid in Path(each, "cgroup.procs").read_text().split()]
    return found


def _removed(group: Path) -> bool:
    """Remove an empty control group and its descendants. Returns whether that succeeded."""
    for each, _, _ in os.walk(group, topdown=False):
        with suppress(OSError):  # its last process may still be ending
            Path(each).rmdir()
    return not group.exists()
