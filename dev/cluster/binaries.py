"""The programs of etcd, Kubernetes, CoreDNS, Helm and a release, built from their Go modules.

`tools` pins the modules of Kubernetes and etcd. The other programs need other versions of shared
modules, so `tools/helm`, `tools/system` and `tools/release` pin theirs. The main packages of the
projects are built, with two exceptions in `tools/system`: CoreDNS, whose own program has plugins
for every cloud, and pause, which has no module. To add a program, add it to a toolset here and to
the `tool` lines of its go.mod.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from dev.cluster.toolset import NoGoError, Toolset, built, cache_of, go_for

__all__ = [
    "Binaries",
    "NoGoError",
    "binaries",
    "helm",
    "helm_if_built",
    "node",
    "release",
    "require_go",
    "system",
]

TOOLS: Final = Path(__file__).with_name("tools")


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs of the control plane, in a folder of the cache."""

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
    """Return the stamps of Helm's own Makefile. `helm template` assumes this Kubernetes version."""
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
# A separate toolset, because most tests need only the control plane.
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
_RELEASE: Final = Toolset(
    title="Release",
    folder=TOOLS / "release",
    module="github.com/rhysd/actionlint",
    programs={
        "actionlint": "github.com/rhysd/actionlint/cmd/actionlint",
        "crane": "github.com/google/go-containerregistry/cmd/crane",
    },
    stamps=dict,
    cost="about a minute",
)
TOOLSETS: Final = {
    tools.title.lower(): tools for tools in (_KUBERNETES, _NODE, _SYSTEM, _HELM, _RELEASE)
}


@cache
def binaries() -> Binaries:
    """Return the programs of the control plane. The first call builds them, which takes minutes.

    Progress goes to stderr. After an interruption, Go continues with the packages that it has
    compiled. Another process that calls this waits. Raises NoGoError without a Go that is new
    enough, and StackError if the build fails.
    """
    return Binaries(built(_KUBERNETES))


@cache
def node() -> Path:
    """Return the folder of the other programs of a node, built like `binaries`."""
    return built(_NODE)


@cache
def system() -> Path:
    """Return the folder of the programs that run in pods of the cluster, built like `binaries`."""
    return built(_SYSTEM)


@cache
def helm() -> Path:
    """Return the path of Helm, built like `binaries`."""
    return built(_HELM) / "helm"


@cache
def release() -> Path:
    """Return the folder of actionlint and crane, built like `binaries`."""
    return built(_RELEASE)


def helm_if_built() -> Path | None:
    """Return the path of Helm if it has been built on this machine. Builds nothing."""
    try:
        program = cache_of(_HELM) / "helm"
    except NoGoError:
        return None
    return program if program.exists() else None


def require_go() -> None:
    """Check that Go is new enough for every toolset. Raises NoGoError otherwise. Builds nothing."""
    for tools in TOOLSETS.values():
        go_for(tools)


def kubernetes_version() -> str:
    """Return the version in go.mod, for example "v1.34.4"."""
    return _KUBERNETES.version
