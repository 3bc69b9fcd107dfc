"""A Kubernetes API on loopback: real etcd and kube-apiserver, but nothing that could run a pod.

Custom resources, validation, RBAC, watches and Events are real. No controller runs. A namespace
therefore gets no default service account, dependents of a deleted owner stay, and a deleted
namespace stays Terminating.
"""

import base64
import http.client
import json
import os
import secrets
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any, ClassVar, Self

from dev.cluster.binaries import binaries
from dev.stack.errors import StackError
from dev.stack.process import Server

_CONTEXT = "flashsale-control-plane"
_TOKEN_HOURS = 24


class EtcdServer(Server):
    """One etcd that does not flush to disk. A power cut can lose data, but a kill cannot."""

    name: ClassVar[str] = "etcd"

    @property
    def url(self) -> str:
        """The address for the API server."""
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        """The server needs only an empty folder."""

    def _command(self) -> list[str]:
        peer = f"http://127.0.0.1:{self._port('peer')}"
        return [
            str(binaries().etcd),
            "--name=only",
            f"--initial-cluster=only={peer}",
            f"--data-dir={self.data / 'store'}",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def _environment(self) -> dict[str, str]:
        """Return the caller's environment without ETCD_ variables, which are etcd's settings."""
        return {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        return _status(connection, "/readyz") == 200


class ControlPlane(Server):
    """A kube-apiserver with its etcd, started and stopped together. RBAC is enforced.

    `pid`, `log`, `pause` and `resume` refer to the API server. The first start makes a token for
    the administrator. The server signs its own certificate.
    """

    name: ClassVar[str] = "kubernetes"

    def __init__(self, data: Path, port: int | None = None, *, detached: bool = False) -> None:
        super().__init__(data, port, detached=detached)
        self.etcd = EtcdServer(self.data / "etcd", detached=detached)

    @classmethod
    def attach(cls, data: Path) -> Self:
        """Return the control plane that another process started on this folder."""
        found = super().attach(data)
        found.etcd = EtcdServer.attach(found.etcd.data)
        return found

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig. It does not exist before the first start."""
        return self.data / "kubeconfig"

    def start(self) -> None:
        """Start both, and return when the API answers. See `Server.start`."""
        super().start()
        self._write_kubeconfig(self.kubeconfig, "admin", self._token(), "default")

    def stop(self) -> None:
        """Stop both gracefully."""
        super().stop()
        self.etcd.stop()

    def kill(self) -> None:
        """Kill both."""
        super().kill()
        self.etcd.kill()

    def kubectl(
        self,
        *arguments: str,
        stdin: str | None = None,
        kubeconfig: Path | None = None,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl to its end, as the administrator unless a kubeconfig is given.

        It does not read or write the files of the user's own kubectl. With `check`, raises
        StackError with its error message if it fails.
        """
        own = {
            "KUBECONFIG": str(kubeconfig or self.kubeconfig),
            "KUBECACHEDIR": str(self.data / "kubectl"),
            "KUBERC": "off",
        }
        done = subprocess.run(
            [str(binaries().kubectl), *arguments],
            env={**os.environ, **own},
            input=stdin or "",
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise StackError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def kubeconfig_for_service_account(self, namespace: str, name: str) -> Path:
        """Return a kubeconfig with a token of a service account, valid for 24 hours.

        RBAC decides what its client is allowed to do. Raises StackError if the account does not
        exist.
        """
        asked = self.kubectl(
            "create",
            "token",
            name,
            f"--namespace={namespace}",
            f"--duration={_TOKEN_HOURS}h",
            check=True,
        )
        path = self.data / f"kubeconfig.{namespace}.{name}"
        self._write_kubeconfig(path, name, asked.stdout.strip(), namespace)
        return path

    @property
    def _pki(self) -> Path:
        return self.data / "pki"

    @property
    def _certificate(self) -> Path:
        return self._pki / "apiserver.crt"

    @property
    def _tokens(self) -> Path:
        return self.data / "tokens.csv"

    def _token(self) -> str:
        return self._tokens.read_text().partition(",")[0]

    def _prepare(self) -> None:
        if not self.kubeconfig.exists():
            # An interrupted first start can leave a certificate without its key.
            shutil.rmtree(self._pki, ignore_errors=True)
            self._pki.mkdir(mode=0o700)
            _write_private(
                self._tokens, f"{secrets.token_urlsafe(32)},admin,admin,system:masters\n"
            )
        if self.detached and (left := EtcdServer.attach(self.etcd.data)).pid is not None:
            # This etcd has outlived its API server.
            self.etcd = left
        self.etcd.start()

    def _command(self) -> list[str]:
        key = self._pki / "apiserver.key"
        return [
            str(binaries().kube_apiserver),
            f"--etcd-servers={self.etcd.url}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.port}",
            "--advertise-address=127.0.0.1",
            # The server writes its own certificate and key into this folder before it reads the key
            # for service accounts, so one key serves both purposes.
            f"--cert-dir={self._pki}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--token-auth-file={self._tokens}",
            "--authorization-mode=RBAC",
            # This plugin waits for a service account, which a controller would have to make.
            "--disable-admission-plugins=ServiceAccount",
            # The reconciler refuses an address on loopback, and no pod needs the endpoint.
            "--endpoint-reconciler-type=none",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--profiling=false",
        ]

    def _ready(self) -> bool:
        # /readyz does not wait for the namespace `default`.
        return all(self._get(path) == 200 for path in ("/readyz", "/api/v1/namespaces/default"))

    def _get(self, path: str) -> int:
        connection = http.client.HTTPSConnection(
            "127.0.0.1",
            self.port,
            timeout=2,
            context=ssl.create_default_context(cafile=str(self._certificate)),
        )
        return _status(connection, path, {"Authorization": f"Bearer {self._token()}"})

    def _advice(self) -> str:
        return f"{super()._advice()} (etcd's log is {self.etcd.log})"

    def _write_kubeconfig(self, path: Path, user: str, token: str, namespace: str) -> None:
        authority = base64.b64encode(self._certificate.read_bytes()).decode()
        context = {"cluster": _CONTEXT, "user": user, "namespace": namespace}
        cluster = {"server": self.url, "certificate-authority-data": authority}
        config: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": _CONTEXT, "cluster": cluster}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": _CONTEXT, "context": context}],
            "current-context": _CONTEXT,
        }
        # JSON is YAML.
        _write_private(path, json.dumps(config, indent=2) + "\n")


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def _status(
    connection: http.client.HTTPConnection, path: str, headers: dict[str, str] | None = None
) -> int:
    """Return the status of a GET. Raises OSError, also if the answer is not HTTP."""
    try:
        connection.request("GET", path, headers=headers or {})
        return connection.getresponse().status
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()
