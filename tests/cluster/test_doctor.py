"""`flashsalectl doctor` beside a real kube-apiserver, as a pod and with kubectl."""

from pathlib import Path

import pytest

from dev.cluster.binaries import Binaries
from dev.cluster.control_plane import ControlPlane
from flashsale_operator.ctl import doctor


@pytest.fixture
def pod(
    plane: ControlPlane, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """The environment of a pod whose account has no rights."""
    plane.kubectl("create", "serviceaccount", "visitor", "-n", namespace, check=True)
    token = plane.kubectl("create", "token", "visitor", "-n", namespace, check=True)
    (tmp_path / "token").write_text(token.stdout.strip())
    (tmp_path / "ca.crt").write_bytes((plane.data / "pki/apiserver.crt").read_bytes())
    monkeypatch.setattr(doctor, "ACCOUNT", tmp_path)
    return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(plane.port)}


async def test_a_pod_asks_the_cluster_by_its_account(pod: dict[str, str]) -> None:
    served, clock = await doctor._within(doctor.KUBERNETES, doctor._kubernetes(pod))
    assert (served.verdict, clock.verdict) == ("ok", "ok")
    assert served.text.startswith("FlashSales are served")
    assert clock.text.startswith("its clock differs by")


async def test_a_laptop_asks_the_cluster_by_kubectl(
    plane: ControlPlane, kubernetes: Binaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(kubernetes.folder), prepend=":")
    environ = {"KUBECONFIG": str(plane.kubeconfig)}
    [served] = await doctor._within(doctor.KUBERNETES, doctor._kubernetes(environ))
    assert (served.verdict, served.text.partition(",")[0]) == ("ok", "FlashSales are served")


@pytest.mark.parametrize("by", ["account", "kubectl"])
async def test_a_cluster_without_the_crd_is_a_failure(
    plane: ControlPlane,
    pod: dict[str, str],
    kubernetes: Binaries,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
) -> None:
    monkeypatch.setattr(doctor, "_RESOURCE", "/apis/flashsale.example/v1alpha1")
    monkeypatch.setenv("PATH", str(kubernetes.folder), prepend=":")
    environ = pod if by == "account" else {"KUBECONFIG": str(plane.kubeconfig)}
    [failure] = await doctor._within(doctor.KUBERNETES, doctor._kubernetes(environ))
    assert failure.verdict == "failure"
    assert "install the chart's CRD" in failure.text


async def test_a_cluster_that_is_away_is_a_failure(pod: dict[str, str]) -> None:
    away = pod | {"KUBERNETES_SERVICE_PORT": "1"}
    [failure] = await doctor._within(doctor.KUBERNETES, doctor._kubernetes(away))
    assert failure.verdict == "failure"
