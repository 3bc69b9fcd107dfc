"""A real kube-apiserver with the CRD. Each test gets its own namespace, Redis and ledger."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dev.cluster.control_plane import ControlPlane
from dev.services import Addresses, OperatorServer
from dev.stack.servers import RedisServer
from tests.support.cluster import World, rules
from tests.support.paths import CRD

ACCOUNT = "flashsale-operator"


@pytest.fixture(scope="session")
def plane(control_plane: ControlPlane) -> ControlPlane:
    """The control plane with the FlashSale CRD installed."""
    control_plane.kubectl("apply", "-f", str(CRD), check=True)
    control_plane.kubectl(
        "wait", "--for=condition=Established", "crd/flashsales.flashsale.dev", check=True
    )
    return control_plane


@pytest.fixture
def namespace(plane: ControlPlane) -> str:
    name = f"shop-{uuid.uuid4().hex[:8]}"
    plane.kubectl("create", "namespace", name, check=True)
    return name


@pytest.fixture
def service_account(plane: ControlPlane, namespace: str) -> Path:
    """The kubeconfig of an account that has the chart's rules for one namespace."""
    made = [
        {"kind": "ServiceAccount", "apiVersion": "v1"},
        _rbac("Role", rules=rules()["namespaced"]),
        _rbac("RoleBinding", **_binding("Role", namespace)),
    ]
    for each in made:
        each["metadata"] = {"name": ACCOUNT, "namespace": namespace}
    _apply(plane, made)
    return plane.kubeconfig_for_service_account(namespace, ACCOUNT)


@pytest.fixture
def cluster_account(plane: ControlPlane, namespace: str) -> Iterator[Path]:
    """The kubeconfig of an account that has the chart's rules for all namespaces."""
    made = [
        {"kind": "ServiceAccount", "apiVersion": "v1"},
        _rbac("ClusterRole", rules=[*rules()["namespaced"], *rules()["cluster"]]),
        _rbac("ClusterRoleBinding", **_binding("ClusterRole", namespace)),
    ]
    for each in made:
        each["metadata"] = {"name": f"{ACCOUNT}-everywhere", "namespace": namespace}
    made[2]["subjects"][0]["name"] += "-everywhere"
    made[2]["roleRef"]["name"] += "-everywhere"
    _apply(plane, made)
    yield plane.kubeconfig_for_service_account(namespace, f"{ACCOUNT}-everywhere")
    for kind in ("clusterrole", "clusterrolebinding"):
        plane.kubectl("delete", kind, f"{ACCOUNT}-everywhere")


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def world(
    request: pytest.FixtureRequest,
    plane: ControlPlane,
    namespace: str,
    service_account: Path,
    own_redis: RedisServer,
    database_url: str,
    tmp_path: Path,
) -> Iterator[World]:
    """A namespace with its servers. Kafka is there only if the test uses `kafka_server`."""
    bootstrap = "127.0.0.1:1"
    if "kafka_server" in request.fixturenames:
        bootstrap = request.getfixturevalue("kafka_server").bootstrap
    world = World(
        plane=plane,
        namespace=namespace,
        redis=own_redis,
        # The tests share Kafka, so each engine has a name of its own.
        addresses=Addresses(own_redis.url, bootstrap, database_url, engine=namespace),
        folder=tmp_path / "processes",
        kubeconfig=service_account,
    )
    yield world
    world.end()


@pytest.fixture
def operator(world: World) -> OperatorServer:
    return world.operator()


def _rbac(kind: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any manifest
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, **fields}


def _binding(kind: str, namespace: str) -> dict[str, Any]:
    return {
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": ACCOUNT},
        "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": namespace}],
    }


def _apply(plane: ControlPlane, made: list[dict[str, Any]]) -> None:
    listed = {"apiVersion": "v1", "kind": "List", "items": made}
    plane.kubectl("apply", "-f", "-", stdin=json.dumps(listed), check=True)
