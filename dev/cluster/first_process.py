"""`python -m dev.cluster.first_process PLAN`: process 1 in the namespaces of a cluster.

Only `Cluster.up` starts it. It makes the mounts and the network, starts every program of the node,
and then waits. The cluster lives as long as this process.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

ADDRESS: Final = "10.99.0.1"
"""The node's address, on a bridge without ports. The cluster's network has no way out."""
SERVICES: Final = "10.96.0.0/16"
API_SERVICE: Final = "10.96.0.1"
_DNS: Final = "10.96.0.10"
_PODS: Final = "10.244.0.0/16"
_NODE_PODS: Final = "10.244.0.0/24"
_VOLUMES: Final = 16
_SOCKET: Final = "/run/containerd/containerd.sock"
# The kubelet sets these for the whole machine unless they already have its values. The cluster
# shows it files with those values, so that it sets nothing.
_SYSCTLS: Final = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1_000_000,
    "kernel/keys/root_maxbytes": 25_000_000,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The input of this process: absolute paths."""

    state: str
    """The folder of the cluster's data. It has the folders `log` and `pki`."""
    control_plane: str
    node: str
    coredns: str
    """The manifest of CoreDNS."""
    images: str
    """An archive with the images of pause and CoreDNS."""

    def written(self) -> str:
        return json.dumps(asdict(self), indent=2)


class _Node:
    def __init__(self, plan: Plan) -> None:
        self._state = Path(plan.state)
        self._pki = self._state / "pki"
        self._plan = plan
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._began = time.monotonic()

    def run(self) -> None:
        self._mount()
        self._connect()
        self._containerd()
        self._control_plane()
        self._import_images()
        self._kubelet()
        self._await("the node", "wait", "--for=condition=Ready", "node/node", "--timeout=1s")
        rollout = ("rollout", "status", "deployment/coredns", "--timeout=1s")
        self._await("the cluster's DNS", "--namespace=kube-system", *rollout)
        (self._state / "ready").touch()
        self._wait()

    def _mount(self) -> None:
        """Make shared mounts for the kubelet, and own folders /run, /var/lib and /var/log."""
        _do("mount", "--make-rshared", "/")
        _do("mount", "-t", "sysfs", "sysfs", "/sys")
        _do("mount", "-t", "tmpfs", "-o", "mode=755", "cgroups", "/sys/fs/cgroup")
        for controller in controllers():
            name = controller.removeprefix("name=")
            folder = Path("/sys/fs/cgroup") / name
            folder.mkdir()
            options = controller if name == controller else f"none,{controller}"
            _do("mount", "-t", "cgroup", "-o", options, "cgroup", str(folder))
        _do("mount", "-t", "tmpfs", "-o", "mode=755", "run", "/run")
        for shared in ("var/lib", "var/log"):
            own = self._state / "root" / shared
            own.mkdir(parents=True)
            _do("mount", "--bind", str(own), f"/{shared}")
        for name, value in _SYSCTLS.items():
            _write_over(Path("/proc/sys") / name, f"{value}\n")
        # No DNS server is reachable from inside, so a query fails at once.
        _write_over(Path("/etc/resolv.conf"), "")
        _write_over(Path("/etc/hosts"), f"127.0.0.1 localhost\n{ADDRESS} node\n")

    @staticmethod
    def _connect() -> None:
        """Make the network.

        It needs a route to the services, too. Without one, packets fail before kube-proxy's rules
        rewrite them.
        """
        _do("hostname", "node")
        _do("ip", "link", "set", "lo", "up")
        _do("ip", "link", "add", "node0", "type", "bridge")
        _do("ip", "address", "add", f"{ADDRESS}/24", "dev", "node0")
        _do("ip", "link", "set", "node0", "up")
        _do("ip", "route", "add", SERVICES, "dev", "node0")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")

    def _containerd(self) -> None:
        cni = Path("/run/cni")
        cni.mkdir()
        (cni / "10-bridge.conflist").write_text(json.dumps(_CNI))
        Path("/run/containerd.toml").write_text(_CONTAINERD)
        self._start("containerd", "containerd", "--config", "/run/containerd.toml")

    def _control_plane(self) -> None:
        client = "http://127.0.0.1:2379"
        self._start(
            "etcd",
            f"{self._plan.control_plane}/etcd",
            f"--data-dir={self._state / 'etcd'}",
            # The data is deleted with the cluster, so there is no need to flush it to disk.
            "--unsafe-no-fsync",
            "--log-level=warn",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
        )
        pki = str(self._pki)
        self._start(
            "kube-apiserver",
            f"{self._plan.control_plane}/kube-apiserver",
            f"--etcd-servers={client}",
            f"--advertise-address={ADDRESS}",
            f"--tls-cert-file={pki}/apiserver.crt",
            f"--tls-private-key-file={pki}/apiserver.key",
            f"--client-ca-file={pki}/ca.crt",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged",
            f"--service-cluster-ip-range={SERVICES}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={pki}/service-accounts.key",
            f"--service-account-signing-key-file={pki}/service-accounts.key",
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={pki}/admin.crt",
            f"--kubelet-client-key={pki}/admin.key",
        )
        self._await("the API server", "get", "--raw", "/readyz")
        self._start(
            "kube-controller-manager",
            f"{self._plan.node}/kube-controller-manager",
            f"--kubeconfig={pki}/controllers.kubeconfig",
            "--leader-elect=false",
            "--use-service-account-credentials",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            f"--root-ca-file={pki}/ca.crt",
            f"--service-account-private-key-file={pki}/service-accounts.key",
            f"--cluster-signing-cert-file={pki}/ca.crt",
            f"--cluster-signing-key-file={pki}/ca.key",
        )
        self._start(
            "kube-scheduler",
            f"{self._plan.node}/kube-scheduler",
            f"--kubeconfig={pki}/scheduler.kubeconfig",
            "--leader-elect=false",
        )
        config = {**_PROXY, "clientConnection": {"kubeconfig": f"{pki}/proxy.kubeconfig"}}
        Path("/run/kube-proxy.json").write_text(json.dumps(config))
        proxy = f"{self._plan.node}/kube-proxy"
        self._start("kube-proxy", proxy, "--config", "/run/kube-proxy.json")
        volumes = Path("/run/volumes.json")
        volumes.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": _volumes()}))
        self._await("DNS and volumes", "apply", "-f", self._plan.coredns, "-f", str(volumes))

    def _import_images(self) -> None:
        self._until("containerd", lambda: _succeeds("ctr", "version"))
        _do("ctr", "--namespace", "k8s.io", "images", "import", self._plan.images)
        self._say("images: imported")

    def _kubelet(self) -> None:
        authority = {"x509": {"clientCAFile": f"{self._pki}/ca.crt"}}
        own = {"anonymous": {"enabled": False}, "webhook": {"enabled": True}}
        config = {**_KUBELET, "authentication": {**authority, **own}}
        Path("/run/kubelet.json").write_text(json.dumps(config))
        self._start(
            "kubelet",
            f"{self._plan.node}/kubelet",
            "--config=/run/kubelet.json",
            f"--kubeconfig={self._pki}/kubelet.kubeconfig",
            "--hostname-override=node",
            f"--node-ip={ADDRESS}",
        )

    def _start(self, name: str, *command: str) -> None:
        with (self._state / "log" / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def _await(self, subject: str, *arguments: str) -> None:
        """Wait until kubectl succeeds with these arguments."""
        config = f"--kubeconfig={self._pki}/admin.kubeconfig"
        kubectl = f"{self._plan.control_plane}/kubectl"
        self._until(subject, lambda: _succeeds(kubectl, config, *arguments))
        self._say(f"{subject}: ready")

    def _until(self, subject: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not done():
            for name, program in self._running.items():
                if program.poll() is not None:
                    sys.exit(f"{name} ended (exit code {program.returncode}): see {name}.log")
            if time.monotonic() > deadline:
                sys.exit(f"gave up waiting for {subject}")
            time.sleep(0.1)

    def _wait(self) -> None:
        """Reap orphans until one of the programs ends, which none should."""
        programs = {program.pid: name for name, program in self._running.items()}
        while True:
            pid, status = os.wait()
            if pid in programs:
                sys.exit(f"{programs[pid]} ended (status {status}), so the cluster ends")

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self._began:5.1f} s  {line}", flush=True)


def _volumes() -> list[dict[str, object]]:
    """Return volumes that are folders of the node. Each can be claimed once."""
    name = "node-folders"
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    found: list[dict[str, object]] = [
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": name, "annotations": default},
            "provisioner": "kubernetes.io/no-provisioner",
            "volumeBindingMode": "WaitForFirstConsumer",
        }
    ]
    where = {"key": "kubernetes.io/hostname", "operator": "In", "values": ["node"]}
    for number in range(_VOLUMES):
        folder = Path(f"/var/lib/volumes/{number}")
        folder.mkdir(parents=True)
        found.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"{name}-{number}"},
                "spec": {
                    "capacity": {"storage": "10Gi"},
                    "accessModes": ["ReadWriteOnce"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "storageClassName": name,
                    "local": {"path": str(folder)},
                    "nodeAffinity": {
                        "required": {"nodeSelectorTerms": [{"matchExpressions": [where]}]}
                    },
                },
            }
        )
    return found


def controllers() -> list[str]:
    """Return this process's cgroup v1 hierarchies, for example "cpu,cpuacct" or "name=systemd"."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return [found for line in lines if (found := line.split(":")[1])]


def _write_over(path: Path, content: str) -> None:
    """Show another content of a file inside the cluster."""
    own = Path("/run/over") / path.relative_to("/")
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text(content)
    _do("mount", "--bind", str(own), str(path))


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


_CNI: Final = {
    "cniVersion": "0.4.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": _NODE_PODS}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}
_CONTAINERD: Final = f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "flashsale.dev/pause:local"
  # A lower OOM score needs CAP_SYS_RESOURCE, which this process may lack.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/run/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
_PROXY: Final = {
    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
    "kind": "KubeProxyConfiguration",
    "clusterCIDR": _PODS,
    "hostnameOverride": "node",
    "mode": "iptables",
    "iptables": {"minSyncPeriod": "100ms"},
    "oomScoreAdj": 0,
    # Zero leaves these settings alone, which apply to the whole machine.
    "conntrack": {
        "maxPerCore": 0,
        "min": 0,
        "tcpEstablishedTimeout": "0s",
        "tcpCloseWaitTimeout": "0s",
    },
}
_KUBELET: Final = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "authorization": {"mode": "Webhook"},
    "containerRuntimeEndpoint": f"unix://{_SOCKET}",
    "cgroupDriver": "cgroupfs",
    "failCgroupV1": False,
    "failSwapOn": False,
    "oomScoreAdj": 0,
    "maxOpenFiles": 20_000,
    "clusterDNS": [_DNS],
    "clusterDomain": "cluster.local",
    "resolvConf": "/etc/resolv.conf",
    # Images cannot be pulled again, so none may be deleted for lack of space.
    "imageGCHighThresholdPercent": 100,
    "evictionHard": {
        "memory.available": "100Mi",
        "nodefs.available": "0%",
        "nodefs.inodesFree": "0%",
        "imagefs.available": "0%",
        "imagefs.inodesFree": "0%",
    },
}


def main() -> None:
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text()))
    _Node(plan).run()


if __name__ == "__main__":
    main()
