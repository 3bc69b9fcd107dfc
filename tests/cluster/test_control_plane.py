"""The control plane that the operator's tests rely on: real etcd and kube-apiserver."""

import base64
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.cluster.binaries import Binaries, kubernetes_version
from dev.cluster.control_plane import ControlPlane, EtcdServer
from dev.stack import lifeline
from dev.stack.errors import StackError
from tests.support.eventually import eventually
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow


CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.example.test}
spec:
  group: example.test
  names: {kind: Widget, plural: widgets}
  scope: Namespaced
  versions:
    - name: v1
      served: true
      storage: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec:
              type: object
              properties: {least: {type: integer}, most: {type: integer}}
              x-kubernetes-validations:
                - {rule: self.least <= self.most, message: least may not exceed most}
"""

WIDGET = """
apiVersion: example.test/v1
kind: Widget
metadata: {name: widget}
spec: {least: LEAST, most: 5}
"""

READER = """
apiVersion: v1
kind: ServiceAccount
metadata: {name: reader}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader}
rules: [{apiGroups: [""], resources: [configmaps], verbs: [get, list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: ServiceAccount, name: reader}]
"""


def processes(plane: ControlPlane) -> dict[int, str]:
    """Return the processes of API server and etcd with their identities."""
    pids = [plane.pid, plane.etcd.pid]
    found = {pid: lifeline.identity(pid) for pid in pids if pid is not None}
    return {pid: identity for pid, identity in found.items() if identity is not None}


def alive(those: dict[int, str]) -> list[int]:
    return [pid for pid, identity in those.items() if lifeline.identity(pid) == identity]


def another_process(data: Path, then: str, *, detached: bool = False) -> list[str]:
    """Return the command of a Python that starts a control plane and then runs `then`."""
    program = f"""
import sys
from pathlib import Path
from dev.cluster.control_plane import ControlPlane
plane = ControlPlane(Path({str(data)!r}), detached={detached!r})
plane.start()
print("started", flush=True)
{then}
"""
    return [sys.executable, "-c", program]


@pytest.fixture
def namespace(control_plane: ControlPlane) -> str:
    name = f"test-{uuid.uuid4().hex[:8]}"
    control_plane.kubectl("create", "namespace", name, check=True)
    return name


@pytest.fixture
def own_data(kubernetes: Binaries, tmp_path: Path) -> Iterator[Path]:  # noqa: ARG001 - built first
    """A folder for the test's own control plane, which is killed at the end of the test."""
    data = tmp_path / "kubernetes"
    yield data
    ControlPlane.attach(data).kill()


def test_it_serves_the_pinned_version(control_plane: ControlPlane) -> None:
    versions = json.loads(control_plane.kubectl("version", "-o", "json", check=True).stdout)
    assert versions["serverVersion"]["gitVersion"] == kubernetes_version()
    assert versions["clientVersion"]["gitVersion"] == kubernetes_version()
    assert control_plane.kubectl("get", "--raw", "/readyz", check=True).stdout == "ok"


def test_validation_rules_of_a_custom_resource_are_enforced(
    control_plane: ControlPlane, namespace: str
) -> None:
    control_plane.kubectl("apply", "-f", "-", stdin=CRD, check=True)
    established = ("wait", "--for=condition=Established", "crd/widgets.example.test")
    control_plane.kubectl(*established, check=True)
    apply = ("apply", "-n", namespace, "-f", "-")

    def refusal() -> str:
        return control_plane.kubectl(*apply, stdin=WIDGET.replace("LEAST", "6")).stderr

    # An established resource can still be unknown for a moment.
    eventually(lambda: "least may not exceed most" in refusal())
    accepted = control_plane.kubectl(*apply, stdin=WIDGET.replace("LEAST", "4"))
    assert accepted.stdout == "widget.example.test/widget created\n"


def test_a_service_account_has_the_rights_of_its_role_and_no_others(
    control_plane: ControlPlane, namespace: str
) -> None:
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", stdin=READER, check=True)
    reader = control_plane.kubeconfig_for_service_account(namespace, "reader")

    def as_reader(*arguments: str) -> subprocess.CompletedProcess[str]:
        return control_plane.kubectl(*arguments, kubeconfig=reader)

    who = as_reader("auth", "whoami", "-o", "jsonpath={.status.userInfo.username}").stdout
    assert who == f"system:serviceaccount:{namespace}:reader"
    # The authorizer watches roles, so it sees a new one a moment later.
    eventually(lambda: as_reader("get", "configmaps").returncode == 0)
    for refused in (
        ("create", "configmap", "one"),
        ("get", "secrets"),
        ("get", "configmaps", "-n", "default"),
        ("get", "namespaces"),
    ):
        done = as_reader(*refused)
        assert (done.returncode, "forbidden" in done.stderr) == (1, True), done


def test_a_missing_service_account_has_no_kubeconfig(
    control_plane: ControlPlane, namespace: str
) -> None:
    with pytest.raises(StackError, match='serviceaccounts "nobody" not found'):
        control_plane.kubeconfig_for_service_account(namespace, "nobody")


def test_a_wrong_token_is_refused(control_plane: ControlPlane) -> None:
    done = control_plane.kubectl("get", "namespaces", "--token", "wrong")
    assert done.returncode == 1
    assert "Unauthorized" in done.stderr


def test_only_the_owner_can_read_the_credentials(control_plane: ControlPlane) -> None:
    files = [control_plane.kubeconfig, control_plane.data / "tokens.csv"]
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600, 0o600]


def test_a_strict_tls_client_trusts_its_certificate(
    control_plane: ControlPlane,
) -> None:
    cluster = json.loads(control_plane.kubeconfig.read_text())["clusters"][0]["cluster"]
    authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    context = ssl.create_default_context(cadata=authority)
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    with (
        socket.create_connection(("127.0.0.1", control_plane.port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as encrypted,
    ):
        assert encrypted.version() == "TLSv1.3"


def test_kubectl_does_not_touch_the_files_of_the_user(
    control_plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    control_plane.kubectl("get", "namespaces", check=True)
    assert not list(tmp_path.iterdir())


def test_data_port_and_credentials_survive_a_kill_and_a_restart(own_data: Path) -> None:
    with ControlPlane(own_data) as plane:
        plane.kubectl("apply", "-f", "-", stdin=READER, check=True)
        reader = plane.kubeconfig_for_service_account("default", "reader")
        port, admin = plane.port, plane.kubeconfig.read_text()
        for name, end in (("killed", plane.kill), ("stopped", plane.stop)):
            plane.kubectl("create", "configmap", name, check=True)
            left = processes(plane)
            end()
            assert not alive(left)
            assert plane.pid is None
            assert "refused" in plane.kubectl("get", "configmaps").stderr
            plane.start()
            assert (plane.port, plane.kubeconfig.read_text()) == (port, admin)
            found = plane.kubectl("get", "configmap", name, kubeconfig=reader)
            assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_both_processes_end_when_their_parent_is_killed(
    own_data: Path, fatal: signal.Signals
) -> None:
    with subprocess.Popen(
        another_process(own_data, "sys.stdin.read()"),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        left = processes(ControlPlane.attach(own_data))
        assert len(left) == 2
        parent.send_signal(fatal)
    eventually(lambda: not alive(left))


def test_another_process_can_find_repair_and_stop_a_detached_control_plane(own_data: Path) -> None:
    starter = another_process(own_data, "", detached=True)
    subprocess.run(starter, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    plane = ControlPlane.attach(own_data)
    plane.kubectl("create", "configmap", "kept", check=True)
    assert plane.pid is not None
    etcd = plane.etcd.pid
    os.kill(plane.pid, signal.SIGKILL)
    eventually(lambda: plane.pid is None)
    again = ControlPlane(own_data, detached=True)
    again.start()
    assert again.etcd.pid == etcd
    again.kubectl("get", "configmap", "kept", check=True)
    left = processes(again)
    ControlPlane.attach(own_data).stop()
    assert not alive(left)
    assert EtcdServer.attach(own_data / "etcd").pid is None
