"""Certificates of a cluster: an authority, the API server's, and a kubeconfig for each user."""

import base64
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from dev.stack.errors import StackError

_DAYS: Final = "365"
_NAMES: Final = (
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
)
# Whom Kubernetes' own roles know by these names.
USERS: Final[Mapping[str, str]] = {
    "admin": "/O=system:masters/CN=admin",
    "controllers": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "proxy": "/CN=system:kube-proxy",
    "kubelet": "/O=system:nodes/CN=system:node:node",
}


def make(folder: Path, url: str, addresses: Sequence[str]) -> None:
    """Makes them all: `ca`, `apiserver` (for the IP addresses) and a `USER.kubeconfig` each.

    And `service-accounts.key` and `.pub`, for tokens.
    """
    folder.mkdir(mode=0o700)
    _key(folder, "ca")
    _openssl(
        folder,
        *("req", "-x509", "-new", "-key", "ca.key", "-subj", "/CN=flashsale-cluster"),
        # Python is strict from 3.13 on: an authority without this is none.
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        *("-days", _DAYS, "-out", "ca.crt"),
    )
    names = [*(f"DNS:{name}" for name in _NAMES), *(f"IP:{each}" for each in addresses)]
    _signed(folder, "apiserver", "/CN=kube-apiserver", f"subjectAltName={','.join(names)}")
    _key(folder, "service-accounts")
    public = ("-pubout", "-out", "service-accounts.pub")
    _openssl(folder, "ec", "-in", "service-accounts.key", *public)
    for user, who in USERS.items():
        _signed(folder, user, who, "extendedKeyUsage=clientAuth")
        _write_kubeconfig(folder, user, url)


def _signed(folder: Path, name: str, subject: str, extension: str) -> None:
    _key(folder, name)
    _openssl(folder, "req", "-new", "-key", f"{name}.key", "-subj", subject, "-out", f"{name}.csr")
    extensions = folder / f"{name}.ext"
    extensions.write_text(f"authorityKeyIdentifier=keyid\n{extension}\n")
    _openssl(
        folder,
        *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key"),
        *("-CAcreateserial", "-days", _DAYS, "-extfile", extensions.name, "-out", f"{name}.crt"),
    )


def _key(folder: Path, name: str) -> None:
    curve = ("-name", "prime256v1", "-genkey", "-noout")
    _openssl(folder, "ecparam", *curve, "-out", f"{name}.key")


def _openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        ["openssl", *arguments],  # noqa: S607 - wherever this system has it
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise StackError(f"`openssl {arguments[0]}` failed: {done.stderr.strip()}")


def _write_kubeconfig(folder: Path, user: str, url: str) -> None:
    def content(name: str) -> str:
        return base64.b64encode((folder / name).read_bytes()).decode()

    name = "flashsale-cluster"
    cluster = {"server": url, "certificate-authority-data": content("ca.crt")}
    certificate = {
        "client-certificate-data": content(f"{user}.crt"),
        "client-key-data": content(f"{user}.key"),
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": user, "user": certificate}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": user}}],
        "current-context": name,
    }
    (folder / f"{user}.kubeconfig").write_text(json.dumps(config, indent=2) + "\n")  # is YAML
