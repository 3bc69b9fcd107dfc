"""A real one-node Kubernetes without Docker: kubelet, containerd, runc and CNI on Linux, as root.

All of it runs in namespaces of its own (network, mounts, processes, control groups). Outside there
is nothing of it but a folder, and a control group in each hierarchy. There is no way out of its
network, NetworkPolicies are not enforced in it, and its only volumes are eight folders of its node.
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
"""The folder of the cluster that `make e2e` has for itself."""
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
    """The cluster of one folder, which may run or not; any process may end what another started."""

    state: Path = LOCAL / "cluster"

    @property
    def runs(self) -> bool:
        """Whether it is up, and not only on its way."""
        return (self.state / "ready").exists() and self._first_process() is not None

    @property
    def commands(self) -> Path:
        """A folder for PATH: kubectl and helm on this cluster, and `in-cluster COMMAND`."""
        return self.state / "bin"

    def up(self) -> None:
        """Starts it unless it runs; returns once its node is Ready and its DNS answers.

        What a start that fails, or is interrupted, leaves goes away with it. Raises StackError.
        """
        _require_machine()
        for build in (binaries, node, system, helm):  # minutes, the first time
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
            progress.end("Kubernetes: node Ready, in {seconds} s")

    def down(self) -> None:
        """Ends it, and removes every trace but its logs, in whatever state it is."""
        with exclusive(self.state):
            self._clear()

    def inside(self, *command: str) -> list[str]:
        """A command in the cluster's network, where Services and pods have their addresses."""
        return [*self._enter("net"), *command]

    def load(self, names: Mapping[str, str]) -> None:
        """Gives the node images that were built here; `names` says what each is called there."""
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
        groups = self._groups()
        deadline = time.monotonic() + 30
        while left := [pid for group in groups for pid in _members(group)]:
            lifeline.send(left, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise StackError(f"these processes do not end: {sorted(set(left))}")
            time.sleep(0.05)
        while left_groups := [group for group in groups if not _removed(group)]:
            if time.monotonic() > deadline:
                raise StackError(f"these control groups do not go: {left_groups}")
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
        # It joins the control groups before it enters its namespaces, in which they are the roots.
        joining = 'while read -r group; do echo $$ >"$group/cgroup.procs"; done; exec "$@"'
        namespaces = ("--net", "--mount", "--uts", "--ipc", "--cgroup", "--pid")
        command = [
            *("sh", "-euc", joining, "sh"),
            *("unshare", *namespaces, "--fork", "--mount-proc"),
            *(sys.executable, "-m", "dev.cluster.first_process", str(self.state / "plan.json")),
        ]
        with self._log.open("wb") as log, self._group_list.open() as groups:
            outer = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=groups,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + _SECONDS
        while not (self.state / "ready").exists():
            said = self._log.read_text(errors="replace").splitlines()
            if outer.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(f"    {line}" for line in said[-20:])
                raise StackError(f"Kubernetes did not start; its logs: {self._log.parent}\n{tail}")
            progress.show(f"Kubernetes: {said[-1].strip() if said else 'starting'}, {{seconds}} s")
            time.sleep(0.1)
        (first,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        identity = lifeline.identity(int(first))
        (self.state / "process.json").write_text(json.dumps({"pid": int(first), "is": identity}))
        self._write_commands()
        outer.returncode = 0  # It is to outlive this process: nobody waits for it.

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
        """One in each hierarchy, below our own; listed before they are made, for `down`."""
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        # Of the folder, which only one cluster has at a time.
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
            # Where there are processors to choose, a new group has none.
            for each in ("cpuset.cpus", "cpuset.mems"):
                if (group / each).exists():
                    (group / each).write_text((group.parent / each).read_text())

    def _enter(self, namespace: str) -> list[str]:
        if (pid := self._first_process()) is None:
            raise StackError("the cluster does not run; start it with: make cluster")
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
        raise StackError("a node takes Linux and root; anywhere else use kind: kind-config.yaml")
    if not controllers():
        raise StackError(
            "this machine has version 2 of control groups only, and this node knows version 1; "
            "use kind: kind-config.yaml"
        )
    debian.require(_PACKAGES, "a node")


def _members(group: Path) -> list[int]:
    """Every process in a control group and those below it."""
    found = []
    # os.walk, unlike Path.rglob, does not mind what goes while it looks.
    for each, _, _ in os.walk(group):
        with suppress(OSError):  # it has gone meanwhile
            found += [int(pid) for pid in Path(each, "cgroup.procs").read_text().split()]
    return found


def _removed(group: Path) -> bool:
    """Removes an empty control group and those below it, as far as they can be by now."""
    for each, _, _ in os.walk(group, topdown=False):
        with suppress(OSError):  # the last process may be on its way out
            Path(each).rmdir()
    return not group.exists()
