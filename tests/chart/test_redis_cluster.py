"""The manifest and the values of a Redis Cluster. test_manifests.py checks them with all others."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import yaml

from flashsale_operator.ctl.redis_cluster import BUS_OFFSET, PRIMARIES
from tests.support.chart import COMPONENTS, Helm, Manifest, merged
from tests.support.manifests import documents, scripts, selects
from tests.support.paths import ROOT

MANIFEST: Final = Path("k8s/redis/cluster.yaml")
VALUES: Final = ROOT / "k8s" / "values"
PORT: Final = 6379


def specs(kind: str) -> dict[str, Any]:
    """Return the specifications of a kind in the manifest by name."""
    return {
        each["metadata"]["name"]: each["spec"]
        for each in documents(MANIFEST)
        if each["kind"] == kind
    }


def test_each_node_of_a_redis_cluster_has_a_service_of_its_own_and_joins() -> None:
    services, [nodes], [job] = (
        specs("Service"),
        specs("StatefulSet").values(),
        specs("Job").values(),
    )
    [forming] = job["template"]["spec"]["containers"]
    assert forming["args"] == [f"redis-node-{number}" for number in range(nodes["replicas"])]
    for number, name in enumerate(forming["args"]):
        service = services[name]
        assert service["selector"] == {"statefulset.kubernetes.io/pod-name": f"redis-{number}"}
        assert service["publishNotReadyAddresses"]
        assert {port["port"] for port in service["ports"]} == {6379, 6379 + BUS_OFFSET}
    labels = nodes["template"]["metadata"]["labels"]
    assert services["redis"]["selector"].items() <= labels.items()
    assert (
        not services["redis"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
    )


def test_a_primary_hands_over_before_its_pod_ends(tmp_path: Path) -> None:
    """Run the script with a redis-cli that notes its arguments and then reports a replica."""
    script = scripts(MANIFEST)["hand-over.sh"]
    asked, role = tmp_path / "asked", tmp_path / "role"
    cli = tmp_path / "redis-cli"
    cli.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {asked}\n'
        f'case "$*" in *failover) echo slave > {role} ;; esac\n'
        f'printf "role:%s\\r\\n" "$(cat {role})"\n'
        'printf "slave0:ip=10.0.0.7,port=6379,state=online,offset=1,lag=0\\r\\n"\n'
    )
    cli.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for own, handed_over in (("master", True), ("slave", False)):
        role.write_text(f"{own}\n")
        asked.write_text("")
        subprocess.run(["sh", "-c", script], env=environ, check=True, timeout=30)
        assert ("-h 10.0.0.7 -p 6379 cluster failover" in asked.read_text()) == handed_over


def test_the_nodes_survive_the_loss_of_a_zone() -> None:
    nodes = specs("StatefulSet")["redis"]
    assert nodes["replicas"] == 2 * PRIMARIES
    template = nodes["template"]
    labels = template["metadata"]["labels"]
    [apart] = template["spec"]["affinity"]["podAntiAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    [spread] = template["spec"]["topologySpreadConstraints"]
    assert (apart["topologyKey"], spread["topologyKey"]) == (
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    )
    assert (spread["maxSkew"], spread["whenUnsatisfiable"]) == (1, "DoNotSchedule")
    budget = specs("PodDisruptionBudget")["redis"]
    assert budget["maxUnavailable"] == 1
    [job] = specs("Job").values()
    for rule in (apart["labelSelector"], spread["labelSelector"], budget["selector"]):
        assert selects(rule, labels)
        assert not selects(rule, job["template"]["metadata"]["labels"])
    [claim] = nodes["volumeClaimTemplates"]
    [container] = template["spec"]["containers"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    folder = re.search(r"^dir (.*)$", scripts(MANIFEST)["redis.conf"], re.MULTILINE)
    assert folder
    assert mounts[claim["metadata"]["name"]] == folder[1]


def test_the_first_step_for_zones_creates_everything_but_the_job() -> None:
    """The comment of the manifest has its selector."""
    [unequal] = re.findall(r"-l (\S+)!=(\S+)", (ROOT / MANIFEST).read_text())
    key, value = unequal
    left_out = [
        each["kind"] for each in documents(MANIFEST) if each["metadata"]["labels"].get(key) == value
    ]
    assert left_out == ["Job"]


def reached(rules: list[Manifest], direction: str, labels: dict[str, str]) -> set[int]:
    """Return the ports on which rules of a policy admit a pod."""
    return {
        port["port"]
        for rule in rules
        for port in rule["ports"]
        for peer in rule.get(direction, [])
        if selects(peer["podSelector"], labels)
    }


def test_policies_admit_nodes_the_job_and_the_engine_on_their_ports(chart: Helm) -> None:
    files = [VALUES / "one-node.yaml", VALUES / "redis-cluster.yaml"]
    release = chart.render_only(merged(*(yaml.safe_load(file.read_text()) for file in files)))
    [policy] = specs("NetworkPolicy").values()
    node = specs("StatefulSet")["redis"]["template"]["metadata"]["labels"]
    [job] = [each["template"]["metadata"]["labels"] for each in specs("Job").values()]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    for own in (node, job):
        assert selects(policy["podSelector"], own)
        assert reached(policy["egress"], "to", own) == (
            {PORT, PORT + BUS_OFFSET} if own is node else set()
        )
    [dns] = [rule for rule in policy["egress"] if "to" not in rule]
    assert {(each["protocol"], each["port"]) for each in dns["ports"]} == {("UDP", 53), ("TCP", 53)}
    assert reached(policy["ingress"], "from", node) == {PORT, PORT + BUS_OFFSET}
    assert reached(policy["ingress"], "from", job) == {PORT}
    for component in COMPONENTS:
        uses = {PORT} if component != "consumer" else set()
        pod = release.pod(component)["metadata"]["labels"]
        assert reached(policy["ingress"], "from", pod) == uses
        outgoing = release.one("NetworkPolicy", component)["spec"]["egress"]
        assert reached(outgoing, "to", node) == uses
        assert not reached(outgoing, "to", job)


def test_the_values_read_the_secret_that_the_manifest_describes(chart: Helm) -> None:
    files = [VALUES / "highly-available.yaml", VALUES / "redis-cluster.yaml"]
    release = chart.render_only(merged(*(yaml.safe_load(file.read_text()) for file in files)))
    made = set(re.findall(r"--from-literal=([a-z-]+)=", (ROOT / MANIFEST).read_text()))
    [nodes], [job] = specs("StatefulSet").values(), specs("Job").values()
    given = [release.environment(component) for component in ("api", "operator")]
    given += [
        {each["name"]: each["valueFrom"] for each in container["env"]}
        for each in (nodes, job)
        for container in each["template"]["spec"]["containers"]
    ]
    read = {
        reference["secretKeyRef"]["key"]
        for environment in given
        for reference in environment.values()
        if isinstance(reference, dict) and reference["secretKeyRef"]["name"] == "redis"
    }
    assert read == made
    assert given[0]["FLASHSALE_REDIS_URL"] != given[1]["FLASHSALE_REDIS_URL"]
