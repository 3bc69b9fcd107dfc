"""A Kubernetes API on loopback: real etcd and kube-apiserver, and nothing that would run a pod.

Custom resources, validation, RBAC, watches and Events are the real thing. No controller runs:
nothing makes a namespace's default service account, nothing removes what a deleted owner owned, and
a deleted namespace stays Terminating.
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
    """One etcd, which flushes nothing to disk: a kill loses nothing even so, a power cut may."""

    name: ClassVar[str] = "etcd"

    @property
    def url(self) -> str:
        """Where the API server finds it."""
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        """An empty folder will do."""

    def _command(self) -> list[str]:
        peer = f"http://127.0.0.1:{self._port('peer')}"
        return [
            str(binaries().etcd),
            *("--name", "only", "--initial-cluster", f"only={peer}"),
            *("--data-dir", str(self.data / "store")),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            "--unsafe-no-fsync",
            *("--log-level", "warn"),
        ]

    def _environment(self) -> dict[str, str]:
        """The caller's, without the ETCD_ settings that would change this one's."""
        return {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        return _status(connection, "/readyz") == 200


class ControlPlane(Server):
    """A kube-apiserver with its etcd, started and ended together; RBAC decides what is allowed.

    Of the two, `pid`, `log`, `pause` and `resume` mean the API server. The administrator is known
    by a token and the server by a certificate that it signed itself, both made at the first start:
    that takes neither openssl nor a library.
    """

    name: ClassVar[str] = "kubernetes"

    def __init__(self, data: Path, port: int | None = None, *, detached: bool = False) -> None:
        super().__init__(data, port, detached=detached)
        self.etcd = EtcdServer(self.data / "etcd", detached=detached)

    @classmethod
    def attach(cls, data: Path) -> Self:
        """What another process started on this folder, as `Server.attach`."""
        found = super().attach(data)
        found.etcd = EtcdServer.attach(found.etcd.data)
        return found

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """How the administrator reaches it; there is none before the first start."""
        return self.data / "kubeconfig"

    def start(self) -> None:
        """Starts both, as `Server.start`, and returns once the API serves."""
        super().start()
        self._write_kubeconfig(self.kubeconfig, "admin", self._token(), "default")

    def stop(self) -> None:
        """Ends both gracefully."""
        super().stop()
        self.etcd.stop()

    def kill(self) -> None:
        """Kills both without warning."""
        super().kill()
        self.etcd.kill()

    def kubectl(
        self,
        *arguments: str,
        stdin: str | None = None,
        kubeconfig: Path | None = None,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl to its end, as the administrator unless a kubeconfig is given.

        It reads and writes nothing of the user's own kubectl. With `check`, raises StackError,
        which has its words, if it fails.
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
        """How a service account, which must exist, reaches it: a token for 24 hours.

        Its client may do what RBAC lets it do, no more. Raises StackError if there is no such
        account.
        """
        asked = self.kubectl(
            *("create", "token", name, "--namespace", namespace),
            *("--duration", f"{_TOKEN_HOURS}h"),
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
            # A first start that was interrupted may have left a certificate without its key.
            shutil.rmtree(self._pki, ignore_errors=True)
            self._pki.mkdir(mode=0o700)
            _write_private(
                self._tokens, f"{secrets.token_urlsafe(32)},admin,admin,system:masters\n"
            )
        if self.detached and (left := EtcdServer.attach(self.etcd.data)).pid is not None:
            # It has outlived its API server.
            self.etcd = left
        self.etcd.start()

    def _command(self) -> list[str]:
        key = str(self._pki / "apiserver.key")
        return [
            str(binaries().kube_apiserver),
            *("--etcd-servers", self.etcd.url),
            *("--bind-address", "127.0.0.1", "--secure-port", str(self.port)),
            *("--advertise-address", "127.0.0.1"),
            # It signs its own certificate into this folder, once, before it reads the key for
            # service accounts: one key will do for both.
            *("--cert-dir", str(self._pki)),
            *("--service-account-key-file", key, "--service-account-signing-key-file", key),
            *("--service-account-issuer", "https://kubernetes.default.svc.cluster.local"),
            *("--token-auth-file", str(self._tokens)),
            *("--authorization-mode", "RBAC"),
            # No controller runs that would make the service account that this would wait for.
            *("--disable-admission-plugins", "ServiceAccount"),
            # It refuses an address on loopback, and no pod will ask for the endpoint.
            *("--endpoint-reconciler-type", "none"),
            *("--service-cluster-ip-range", "10.96.0.0/16"),
            "--profiling=false",
        ]

    def _ready(self) -> bool:
        # /readyz does not wait for the namespace that a client without one uses.
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
        _write_private(path, json.dumps(config, indent=2) + "\n")  # JSON is YAML


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def _status(
    connection: http.client.HTTPConnection, path: str, headers: dict[str, str] | None = None
) -> int:
    """The status of a GET. Raises OSError, also for what is no HTTP yet."""
    try:
        connection.request("GET", path, headers=headers or {})
        return connection.getresponse().status
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()
