"""The six pods of k8s/redis/cluster.yaml in three zones, whose nodes exist only in the API."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.shop import Object, Shop
from tests.support.manifests import documents

ZONE: Final = "topology.kubernetes.io/zone"
ZONES: Final = ("zone-a", "zone-b", "zone-c")


def zone_objects() -> Iterator[Object]:
    """Yield two nodes and two volumes for each zone. The nodes exist only in the API."""
    for zone in ZONES:
        for number in (0, 1):
            name = f"{zone}-{number}"
            labels = {ZONE: zone, "kubernetes.io/hostname": name}
            capacity = {"cpu": "4", "memory": "16Gi", "pods": "10"}
            yield {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name, "labels": labels},
                "spec": {"taints": [{"key": ZONE, "effect": "NoSchedule"}]},
                "status": {
                    "allocatable": capacity,
                    "capacity": capacity,
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            }
            term = {"matchExpressions": [{"key": ZONE, "operator": "In", "values": [zone]}]}
            yield {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": name},
                "spec": {
                    "capacity": {"storage": "10Gi"},
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": "node-folders",
                    "hostPath": {"path": f"/var/lib/{name}"},
                    "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}},
                },
            }


@pytest.fixture
def zones(shop: Shop) -> Iterator[Shop]:
    """A namespace, and three zones whose nodes take no other pods."""
    own = Shop(shop.cluster, "zones")
    own.kubectl("create", "namespace", own.namespace)
    objects = list(zone_objects())
    own.apply({"apiVersion": "v1", "kind": "List", "items": objects})
    yield own
    own.kubectl("delete", "statefulset", "redis")
    own.kubectl("delete", "pods", "--all", "--force", "--grace-period=0")
    own.kubectl("delete", "namespace", own.namespace, "--wait=false")
    names = sorted({each["metadata"]["name"] for each in objects})
    for kind in ("nodes", "persistentvolumes"):
        own.kubectl("delete", kind, *names, "--wait=false")


def test_the_six_nodes_are_scheduled_over_three_zones(zones: Shop) -> None:
    [redis] = [
        each for each in documents(Path("k8s/redis/cluster.yaml")) if each["kind"] == "StatefulSet"
    ]
    redis["spec"]["template"]["spec"]["tolerations"] = [{"key": ZONE}]
    zones.apply(redis)

    def places() -> list[str]:
        pods = zones.get("pods")["items"]
        return [each["spec"]["nodeName"] for each in pods if "nodeName" in each["spec"]]

    zones.until(lambda: len(places()) == redis["spec"]["replicas"], "all pods have a node")
    assert Counter(places()) == {f"{zone}-{number}": 1 for zone in ZONES for number in (0, 1)}
