"""A real kube-apiserver accepts the rendered chart, and Helm installs and upgrades it there."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final

import pytest

from dev.cluster.control_plane import ControlPlane
from tests.support.chart import (
    ADDRESSES,
    COMPONENTS,
    CRD_RESOURCE,
    Helm,
    Manifest,
    Refused,
    Rendered,
    at,
    merged,
)
from tests.support.chart_options import BY_CPU, BY_LAG, TLS
from tests.support.manifests import flash_sale
from tests.support.paths import CHART, CRD

pytestmark = pytest.mark.slow

EVERYTHING: Final[Manifest] = {
    "commonLabels": {"team": "sales"},
    "commonAnnotations": {"owner": "sales"},
    "imagePullSecrets": ["pull", {"name": "1e3"}],
    "image": {"registry": "registry.example:5000/mirror"},
    "certificateAuthority": {"existingSecret": {"name": "ca"}},
    "kafka": {
        "topics": {"enabled": True, "cluster": "main"},
        "tls": {
            "enabled": True,
            "existingSecret": {"name": "main-cluster-ca-cert"},
            "clientCertificate": {"existingSecret": {"name": "1e3"}},
        },
        "users": {component: f"flashsale-{component}" for component in COMPONENTS},
    },
    "api": {
        "autoscaling": {"enabled": True},
        "service": {
            "type": "LoadBalancer",
            "loadBalancerClass": "example.com/internal",
            "loadBalancerSourceRanges": ["192.0.2.0/24"],
            "externalTrafficPolicy": "Local",
        },
        "httpRoute": {
            "enabled": True,
            "parentRefs": [{"name": "public", "namespace": "gateways", "sectionName": "https"}],
            "hostnames": ["*.shop.example"],
        },
        "resources": {
            "requests": {"cpu": 2, "ephemeral-storage": "1Ti", "example.com/gpu": 1},
            "limits": {"cpu": 2.5, "ephemeral-storage": "1Ti", "example.com/gpu": 1},
        },
        "strategy": {"rollingUpdate": {"maxSurge": "50%", "maxUnavailable": 1}},
        "extraEnv": [
            {
                "name": "OTEL_EXPORTER_OTLP_HEADERS",
                "valueFrom": {"secretKeyRef": {"name": "1e3", "key": "007"}},
            },
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 1,
                        "podAffinityTerm": {
                            "topologyKey": "kubernetes.io/hostname",
                            "labelSelector": {"matchLabels": {"a": "b"}},
                        },
                    }
                ]
            }
        },
        "topologySpreadConstraints": [
            {"topologyKey": "rack", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}
        ],
        "ingress": {"enabled": True, "host": "shop.example", "tlsSecretName": "shop-tls"},
        "podLabels": {"a": "b"},
        "podAnnotations": {"a": "b"},
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoSchedule"}],
    },
    "consumer": {"autoscaling": {"by": "lag"}},
    "operator": {"allNamespaces": True},
    "networkPolicies": {
        "enabled": True,
        "dns": {"port": 5353, "peers": [{"podSelector": {"matchLabels": {"a": "b"}}}]},
        "buyers": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}],
        "prometheus": [{"podSelector": {"matchLabels": {"a": "b"}}}],
        "kubernetes": {"peers": [{"ipBlock": {"cidr": "10.0.0.1/32"}}]},
    },
    "podMonitors": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRules": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboard": {"enabled": True},
    "tracing": {"endpoint": "http://collector:4318", "ratio": 0.5, "trustTraceparent": True},
}
VARIANTS: Final = {
    "addresses only": {},
    "everything": EVERYTHING,
    "consumer scaled by cpu": BY_CPU,
    "consumer scaled by lag over TLS without credentials": merged(BY_LAG, TLS),
}

each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def rendered_for(chart: Helm, namespace: str, changes: Manifest) -> Rendered:
    values = merged(ADDRESSES, changes)
    return Rendered.of(chart.run("template", "shop", str(CHART), "-n", namespace, values=values))


def listed(manifests: list[Manifest]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})


@each_variant
def test_the_api_server_accepts_every_manifest_without_a_warning(
    chart: Helm, cluster: ControlPlane, namespace: str, changes: Manifest
) -> None:
    rendered = rendered_for(chart, namespace, changes)
    manifests = [*rendered.manifests, *rendered.hooks]
    strict = ("--validate=strict", "--warnings-as-errors")
    apply = ("apply", "--server-side", "--dry-run=server", *strict, "-f", "-")
    done = cluster.kubectl(*apply, stdin=listed(manifests))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("(server dry run)") == len(manifests)


@each_variant
def test_helm_installs_the_chart_in_a_dry_run(
    chart: Helm, cluster: ControlPlane, namespace: str, changes: Manifest
) -> None:
    install = ("install", "shop", str(CHART), "-n", namespace, "--dry-run=server")
    output = chart.run(*install, values=merged(ADDRESSES, changes), kubeconfig=cluster.kubeconfig)
    assert "kubectl get flashsales" in output
    assert "kubectl delete flashsales --all" in output
    assert ("Autoscaling is on." in output) == (changes != {})


@pytest.mark.parametrize("component", [*COMPONENTS, "test"])
def test_a_pod_passes_the_restricted_standard(
    chart: Helm, cluster: ControlPlane, namespace: str, component: str
) -> None:
    """Create the pod of each template directly, because no controller runs here."""
    rendered = rendered_for(chart, namespace, EVERYTHING)
    (found,) = (
        [rendered.pod(component)]
        if component in COMPONENTS
        else [each for each in rendered.hooks if each["kind"] == "Pod"]
    )
    pod = {**found, "apiVersion": "v1", "kind": "Pod"}
    pod["metadata"] = {**pod["metadata"], "name": component, "namespace": namespace}
    create = ("create", "--dry-run=server", "--validate=strict", "-f", "-")
    done = cluster.kubectl(*create, stdin=json.dumps(pod))
    assert (done.returncode, done.stderr) == (0, "")

    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    done = cluster.kubectl(*create, stdin=json.dumps(pod))
    assert 'violates PodSecurity "restricted' in done.stderr


def names(cluster: ControlPlane, namespace: str, instance: str) -> set[str]:
    """Return the names of a release's objects, except those that Kubernetes derives from them."""
    kinds = (
        "deployments,services,serviceaccounts,roles,rolebindings,poddisruptionbudgets,"
        "horizontalpodautoscalers,networkpolicies,ingresses,kafkatopics,scaledobjects,"
        "triggerauthentications,podmonitors,prometheusrules,secrets,configmaps"
    )
    names = ("-l", f"app.kubernetes.io/instance={instance}", "-o", "name")
    namespaced = cluster.kubectl("get", kinds, "-n", namespace, *names, check=True)
    everywhere = "clusterroles,clusterrolebindings,crds"
    cluster_wide = cluster.kubectl("get", everywhere, *names, check=True)
    return set((namespaced.stdout + cluster_wide.stdout).split())


def may(cluster: ControlPlane, account: str, verb: str, resource: str, namespace: str) -> bool:
    kind, _, subresource = resource.partition("/")
    question = ("auth", "can-i", verb, kind, "--subresource", subresource)
    answer = cluster.kubectl(*question, "-n", namespace, "--as", account)
    return answer.stdout.strip() == "yes"


def test_install_upgrade_and_uninstall_keep_the_sales_and_the_topics(
    chart: Helm, cluster: ControlPlane, namespace: str
) -> None:
    def helm(*arguments: str, values: Manifest) -> str:
        return chart.run(*arguments, "-n", namespace, values=values, kubeconfig=cluster.kubeconfig)

    def uninstall(name: str = "shop") -> None:
        chart.run_plain("uninstall", name, "-n", namespace, kubeconfig=cluster.kubeconfig)

    small = merged(ADDRESSES, at("operator.namespaces", [namespace]))
    helm("install", "shop", str(CHART), values=small)
    sale = flash_sale("iphone-15", "iphone_15", namespace=namespace, stock=100)
    cluster.kubectl("wait", "--for=condition=Established", CRD_RESOURCE, check=True)
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(sale), check=True)
    account = f"system:serviceaccount:{namespace}:shop-flashsale-operator"
    assert may(cluster, account, "patch", "flashsales.flashsale.dev/status", namespace)
    for verb, resource, where in (
        ("patch", "flashsales.flashsale.dev", namespace),
        ("get", "secrets", namespace),
        ("list", "flashsales.flashsale.dev", "default"),
        ("list", "namespaces", ""),
    ):
        assert not may(cluster, account, verb, resource, where), (verb, resource, where)
    for component in ("api", "consumer"):
        account = f"system:serviceaccount:{namespace}:shop-flashsale-{component}"
        assert not may(cluster, account, "list", "flashsales.flashsale.dev", namespace)

    # Turn every option on, then off again.
    helm("upgrade", "shop", str(CHART), values=merged(ADDRESSES, EVERYTHING))
    account = f"system:serviceaccount:{namespace}:shop-flashsale-operator"
    assert may(cluster, account, "list", "flashsales.flashsale.dev", "default")
    assert not may(cluster, account, "list", "secrets", "default")
    scaled = cluster.kubectl("get", "-n", namespace, "scaledobjects,hpa", "-o", "name", check=True)
    assert len(scaled.stdout.split()) == 2
    two = merged(ADDRESSES, at("operator.namespaces", [namespace, "default"]))
    helm("upgrade", "shop", str(CHART), values=two)
    assert may(cluster, account, "list", "flashsales.flashsale.dev", "default")
    helm("upgrade", "shop", str(CHART), values=small)
    assert not may(cluster, account, "list", "flashsales.flashsale.dev", "default")

    topics = {
        f"kafkatopic.kafka.strimzi.io/shop-flashsale.{name}"
        for name in ("reservations", "reservations.dlq", "recorded")
    }
    uninstall()
    assert names(cluster, namespace, "shop") == {CRD_RESOURCE, *topics}
    assert cluster.kubectl("get", "fs", "iphone-15", "-n", namespace).returncode == 0

    # A release of the same name takes over the objects that were left.
    helm("install", "shop", str(CHART), values=merged(ADDRESSES, EVERYTHING))
    assert cluster.kubectl("get", "fs", "iphone-15", "-n", namespace).returncode == 0
    uninstall()

    # A release of another name must leave them alone, or take them over with an option of Helm.
    other = merged(ADDRESSES, EVERYTHING, at("engine", "shop-flashsale"))
    alone = merged(at("crds.enabled", False), at("kafka.topics.enabled", False))
    with pytest.raises(Refused, match=r"KafkaTopic .* cannot be imported"):
        helm("install", "other", str(CHART), values=merged(other, at("crds.enabled", False)))
    for values, options in ((merged(other, alone), []), (other, ["--take-ownership"])):
        helm("install", "other", str(CHART), *options, values=values)
        uninstall("other")
    assert names(cluster, namespace, "other") == {CRD_RESOURCE, *topics}
    cluster.kubectl("delete", CRD_RESOURCE, "--timeout=30s", check=True)


@pytest.fixture
def release(chart: Helm, cluster: ControlPlane, namespace: str) -> Iterator[str]:
    """The namespace of an installed release."""
    command = ("install", "shop", str(CHART), "-n", namespace)
    chart.run(*command, values=ADDRESSES, kubeconfig=cluster.kubeconfig)
    cluster.kubectl("wait", "--for=condition=Established", CRD_RESOURCE, check=True)
    yield namespace
    chart.run_plain("uninstall", "shop", "-n", namespace, kubeconfig=cluster.kubeconfig)
    cluster.kubectl("delete", CRD_RESOURCE, "--timeout=30s", check=True)


def aggregate(cluster: ControlPlane, role: str) -> None:
    """Copy rules into a built-in ClusterRole, as the controller does that does not run here."""

    def get(*arguments: str) -> Any:  # noqa: ANN401 - any object
        done = cluster.kubectl("get", "clusterroles", *arguments, "-o", "json", check=True)
        return json.loads(done.stdout)

    rules = []
    for selector in get(role)["aggregationRule"]["clusterRoleSelectors"]:
        labels = ",".join(f"{key}={value}" for key, value in selector["matchLabels"].items())
        rules += [rule for each in get("-l", labels)["items"] for rule in each["rules"] or ()]
    assert any("flashsales" in rule.get("resources", ()) for rule in rules)
    patch = json.dumps({"rules": rules})
    cluster.kubectl("patch", "clusterrole", role, "--type=merge", "-p", patch, check=True)


def test_people_with_edit_may_sell_and_people_with_view_may_read(
    cluster: ControlPlane, release: str
) -> None:
    for role in ("view", "edit", "admin"):
        aggregate(cluster, role)
        bind = ("create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}er")
        cluster.kubectl(*bind, "-n", release, check=True)
    sale = flash_sale("iphone-15", "iphone_15", stock=100)
    patch = ("patch", "fs", "iphone-15", "--type=merge", "-p")
    status = (*patch, '{"status":{"accepted":1}}', "--subresource=status")

    def run(user: str, *arguments: str, where: str = release) -> str:
        """Return "" if the user may do this, else the API server's refusal."""
        done = cluster.kubectl(*arguments, "--as", user, "-n", where, stdin=json.dumps(sale))
        return done.stderr if done.returncode else ""

    assert "forbidden" in run("viewer", "create", "-f", "-")
    for user in ("editer", "adminer"):
        assert run(user, "create", "-f", "-") == ""
        assert run(user, *patch, '{"spec":{"paused":true}}') == ""
        assert "forbidden" in run(user, *status)
        assert "forbidden" in run(user, "create", "-f", "-", where="default")
        assert "forbidden" in run("viewer", *patch, '{"spec":{"paused":false}}')
        assert "forbidden" in run("viewer", "delete", "fs", "iphone-15")
        assert "forbidden" in run("stranger", "get", "fs")
        for reader in ("viewer", user):
            assert run(reader, "get", "fs", "iphone-15") == ""
        assert run(user, "delete", "fs", "iphone-15", "--wait=false") == ""

    added = [
        rule
        for role in ("view", "edit")
        for rule in json.loads(
            cluster.kubectl(
                "get",
                "clusterrole",
                f"{release}:shop-flashsale-{role}",
                "-o",
                "json",
                check=True,
            ).stdout
        )["rules"]
    ]
    assert [(rule["apiGroups"], rule["resources"]) for rule in added] == [
        (["flashsale.dev"], ["flashsales"])
    ] * 2


def test_kubectl_get_shows_whether_a_sale_is_ready_and_why_not(cluster: ControlPlane) -> None:
    """Write a status as the operator does, and read the table."""
    cluster.kubectl("apply", "-f", str(CRD), check=True)
    cluster.kubectl("wait", "--for=condition=Established", CRD_RESOURCE, check=True)
    sale: dict[str, Any] = {
        "apiVersion": "flashsale.dev/v1alpha1",
        "kind": "FlashSale",
        "metadata": {"name": "columns", "namespace": "default"},
        "spec": {"itemId": "columns", "stock": 100},
    }
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(sale), check=True)
    condition = {"observedGeneration": 1, "lastTransitionTime": "2026-11-27T09:00:00Z"}
    ready = {"type": "Ready", "status": "False", "reason": "OtherEngine", "message": "of another"}
    selling = {"type": "Open", "status": "True", "reason": "Selling", "message": "open"}
    status = {
        "observedGeneration": 1,
        "engine": "0b6d6a0e-53a4-4a26-bd01-3a0d5ba1f4f0",
        "accepted": 7,
        "available": 93,
        "conditions": [{**condition, **ready}, {**condition, **selling}],
    }
    patch = ("patch", "fs", "columns", "--subresource=status", "--type=merge", "-p")
    cluster.kubectl(*patch, json.dumps({"status": status}), check=True)
    stored = cluster.kubectl("get", "fs", "columns", "-o", "json", check=True).stdout
    assert json.loads(stored)["status"] == status

    def columns(*arguments: str) -> dict[str, str]:
        table = cluster.kubectl("get", "fs", "columns", *arguments, check=True).stdout
        names, values = table.splitlines()
        starts = [each.start() for each in re.finditer(r"\S+", names)]
        cells = [values[a:b].strip() for a, b in pairwise([*starts, len(values)])]
        return dict(zip(names.split(), cells, strict=True))

    plain, wide = columns(), columns("-o", "wide")
    assert plain.items() >= {"STATE": "Selling", "READY": "False", "AVAILABLE": "93"}.items()
    assert wide.items() >= {"ACCEPTED": "7", "MESSAGE": "of another"}.items()
    assert wide.keys() - plain.keys() == {"ACCEPTED", "MESSAGE"}
    cluster.kubectl("delete", CRD_RESOURCE, "--timeout=30s", check=True)
