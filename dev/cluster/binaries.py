"""etcd, Kubernetes, CoreDNS and Helm: which of their programs there are, and where.

The folder `tools` pins the modules of Kubernetes and etcd, `tools/helm` and `tools/system` those of
programs that do not agree with them on versions. What is built are their own main packages, but for
CoreDNS, whose own has plugins for every cloud, and pause, which has no module. Another program is a
line in a toolset below and a `tool` line in its go.mod.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from dev.cluster.toolset import NoGoError, Toolset, built, go_for

__all__ = ["Binaries", "NoGoError", "binaries", "helm", "node", "require_go", "system"]

TOOLS: Final = Path(__file__).with_name("tools")


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs of the control plane, in one folder of the cache."""

    folder: Path

    @property
    def etcd(self) -> Path:
        return self.folder / "etcd"

    @property
    def kube_apiserver(self) -> Path:
        return self.folder / "kube-apiserver"

    @property
    def kubectl(self) -> Path:
        return self.folder / "kubectl"


def _kubernetes_stamps() -> dict[str, str]:
    version = kubernetes_version()
    major, minor, _patch = version.removeprefix("v").split(".", 2)
    facts = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
    return {
        f"{package}.{name}": value
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
        for name, value in facts.items()
    }


def _helm_stamps() -> dict[str, str]:
    """As Helm's own Makefile. The Kubernetes is the one that `helm template` takes for granted."""
    _, minor, _patch = _HELM.in_go_mod(r"k8s\.io/client-go (v\S+)").split(".", 2)
    helm = "helm.sh/helm/v3"
    return {
        f"{helm}/internal/version.version": _HELM.version,
        f"{helm}/internal/version.metadata": "",
        **{
            f"{helm}/pkg/{package}.k8sVersion{name}": value
            for package in ("lint/rules", "chartutil")
            for name, value in (("Major", "1"), ("Minor", minor))
        },
    }


_KUBERNETES: Final = Toolset(
    title="Kubernetes",
    folder=TOOLS,
    module="k8s.io/kubernetes",
    programs={
        "etcd": "go.etcd.io/etcd/server/v3",
        "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
        "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    },
    stamps=_kubernetes_stamps,
    cost="about ten minutes",
)
# Apart, since a control plane alone, which most tests take, does without them.
_NODE: Final = Toolset(
    title="Node",
    folder=TOOLS,
    module="k8s.io/kubernetes",
    programs={
        name: f"k8s.io/kubernetes/cmd/{name}"
        for name in ("kube-controller-manager", "kube-proxy", "kube-scheduler", "kubelet")
    },
    stamps=_kubernetes_stamps,
    cost="about five minutes",
)
_SYSTEM: Final = Toolset(
    title="CoreDNS",
    folder=TOOLS / "system",
    module="github.com/coredns/coredns",
    programs={name: f"flashsale/system/{name}" for name in ("coredns", "pause")},
    stamps=dict,
    cost="about two minutes",
)
_HELM: Final = Toolset(
    title="Helm",
    folder=TOOLS / "helm",
    module="helm.sh/helm/v3",
    programs={"helm": "helm.sh/helm/v3/cmd/helm"},
    stamps=_helm_stamps,
    cost="about three minutes",
)
TOOLSETS: Final = {tools.title.lower(): tools for tools in (_KUBERNETES, _NODE, _SYSTEM, _HELM)}


@cache
def binaries() -> Binaries:
    """The programs of the control plane, built first if need be (minutes), progress on stderr.

    Safe against an interruption, after which Go goes on from what it had compiled, and against
    another process that does the same. Raises NoGoError without a Go that is new enough, StackError
    if the build fails.
    """
    return Binaries(built(_KUBERNETES))


@cache
def node() -> Path:
    """The folder of what a node takes besides, as `binaries`."""
    return built(_NODE)


@cache
def system() -> Path:
    """The folder of what runs in pods of every cluster, as `binaries`."""
    return built(_SYSTEM)


@cache
def helm() -> Path:
    """The program, as `binaries`."""
    return built(_HELM) / "helm"


def require_go() -> None:
    """Raises NoGoError without a Go that is new enough for all; builds nothing."""
    for tools in TOOLSETS.values():
        go_for(tools)


def kubernetes_version() -> str:
    """The version that go.mod names, such as "v1.34.4"."""
    return _KUBERNETES.version
