"""The certificates of a cluster: its authority, its API server, and a kubeconfig per user."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import trustme

_NAME: Final = "flashsale-cluster"
_HOSTS: Final = (
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
)
USERS: Final[Mapping[str, tuple[str, str | None]]] = {
    "admin": ("admin", "system:masters"),
    "controllers": ("system:kube-controller-manager", None),
    "scheduler": ("system:kube-scheduler", None),
    "proxy": ("system:kube-proxy", None),
    "kubelet": ("system:node:node", "system:nodes"),
}
"""The common name and the organisation of each user. Kubernetes' own roles name them as its users
and groups.
"""


def make(folder: Path, url: str, addresses: Sequence[str]) -> None:
    """Write everything into a new folder.

    The authority `ca`, the API server's `apiserver` and each user have a `.crt` and a `.key` file.
    The API server's certificate is valid for its host names and for `addresses`. Each user also has
    a `USER.kubeconfig` for the API server at `url`. `service-accounts.key` signs and verifies
    tokens.
    """
    folder.mkdir(mode=0o700)
    authority = trustme.CA(organization_name=_NAME)
    authority.cert_pem.write_to_path(folder / "ca.crt")
    authority.private_key_pem.write_to_path(folder / "ca.key")
    _write(folder, "apiserver", authority.issue_cert(*_HOSTS, *addresses))
    tokens = authority.issue_cert(common_name="service-accounts")
    tokens.private_key_pem.write_to_path(folder / "service-accounts.key")
    for user, (common_name, organisation) in USERS.items():
        # Go refuses a certificate without any alternative name, because trustme marks that
        # extension as critical.
        issued = authority.issue_cert(user, common_name=common_name, organization_name=organisation)
        _write(folder, user, issued)
        _write_kubeconfig(folder, user, url)


def _write(folder: Path, name: str, issued: trustme.LeafCert) -> None:
    issued.cert_chain_pems[0].write_to_path(folder / f"{name}.crt")
    issued.private_key_pem.write_to_path(folder / f"{name}.key")


def _write_kubeconfig(folder: Path, user: str, url: str) -> None:
    def content(name: str) -> str:
        return base64.b64encode((folder / name).read_bytes()).decode()

    cluster = {"server": url, "certificate-authority-data": content("ca.crt")}
    certificate = {
        "client-certificate-data": content(f"{user}.crt"),
        "client-key-data": content(f"{user}.key"),
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": _NAME, "cluster": cluster}],
        "users": [{"name": user, "user": certificate}],
        "contexts": [{"name": _NAME, "context": {"cluster": _NAME, "user": user}}],
        "current-context": _NAME,
    }
    # JSON is YAML.
    (folder / f"{user}.kubeconfig").write_text(json.dumps(config, indent=2) + "\n")
