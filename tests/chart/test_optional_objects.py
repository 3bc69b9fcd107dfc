"""Options add only their own objects: topics, Roles, the dashboard and the alerts."""

import json
from collections.abc import Callable
from typing import Any, Final

import pytest

from flashsale import requirements
from flashsale_consumer import topics
from tests.support.chart import ADDRESSES, NAMESPACE, Helm, Rendered, at, each_combination, merged
from tests.support.chart_options import (
    API_SCALES,
    BY_CPU,
    BY_LAG,
    DASHBOARD,
    EVERYWHERE,
    INGRESS,
    MONITORS,
    ORDERS,
    PEER,
    POLICIES,
    ROUTE,
    RULES,
    TOPICS,
)
from tests.support.paths import CHART

TOPIC: Final = {
    "message.timestamp.type": requirements.TIMESTAMP_TYPE,
    "retention.bytes": requirements.PARTITION_BYTES,
    "segment.bytes": requirements.SEGMENT_BYTES,
}


def kinds(rendered: Rendered) -> dict[str, int]:
    found = [each["kind"] for each in rendered.manifests]
    return {kind: found.count(kind) for kind in sorted(set(found))}


FILE: Final[dict[str, Any]] = json.loads((CHART / "files" / "dashboard.json").read_text())


def dashboard(rendered: Rendered) -> dict[str, Any]:
    (text,) = rendered.all("ConfigMap")[0]["data"].values()
    found: dict[str, Any] = json.loads(text)
    return found


PLAIN: Final = {
    "ClusterRole": 2,
    "CustomResourceDefinition": 1,
    "Deployment": 3,
    "PodDisruptionBudget": 2,
    "Role": 1,
    "RoleBinding": 1,
    "Service": 1,
    "ServiceAccount": 3,
}


@pytest.mark.parametrize(
    ("switch", "change"),
    [
        ({}, {}),
        (at("crds.enabled", False), {"CustomResourceDefinition": 0}),
        (at("rbac.aggregateClusterRoles", False), {"ClusterRole": 0}),
        (API_SCALES, {"HorizontalPodAutoscaler": 1}),
        (BY_CPU, {"HorizontalPodAutoscaler": 1}),
        (BY_LAG, {"ScaledObject": 1}),
        (ORDERS, {"Service": 2}),
        (INGRESS, {"Ingress": 1}),
        (ROUTE, {"HTTPRoute": 1}),
        (TOPICS, {"KafkaTopic": 3}),
        (POLICIES, {"NetworkPolicy": 3}),
        (at("networkPolicies.redis.peers", [PEER]), {"NetworkPolicy": 3}),
        (at("networkPolicies.database.peers", [PEER]), {"NetworkPolicy": 3}),
        (MONITORS, {"PodMonitor": 3}),
        (RULES, {"PrometheusRule": 1}),
        (DASHBOARD, {"ConfigMap": 1}),
        (at("operator.namespaces", ["a", "b"]), {"Role": 2, "RoleBinding": 2}),
        (EVERYWHERE, {"Role": 0, "RoleBinding": 0, "ClusterRole": 3, "ClusterRoleBinding": 1}),
    ],
    ids=str,
)
def test_an_option_adds_only_its_own_kinds(
    chart: Helm, switch: dict[str, Any], change: dict[str, int]
) -> None:
    expected = {kind: number for kind, number in {**PLAIN, **change}.items() if number}
    assert kinds(chart.render(switch)) == expected


def namespaces(rendered: Rendered) -> list[str]:
    return [each["metadata"]["namespace"] for each in rendered.all("Role")]


EXPECTATIONS: Final[list[tuple[str, dict[str, Any], Callable[[Rendered], Any], Any]]] = [
    (
        "an engine's name is the prefix of its topics and its consumer group",
        merged(TOPICS, BY_LAG, at("engine", "flashsale")),
        lambda r: (
            sorted(each["metadata"]["name"] for each in r.all("KafkaTopic")),
            r.one("ScaledObject", "consumer")["spec"]["triggers"][0]["metadata"]["topic"],
            r.one("ScaledObject", "consumer")["spec"]["triggers"][0]["metadata"]["consumerGroup"],
        ),
        (
            ["flashsale.recorded", "flashsale.reservations", "flashsale.reservations.dlq"],
            "flashsale.reservations",
            "flashsale-ledger",
        ),
    ),
    (
        "topics are declared as the consumer creates them",
        TOPICS,
        lambda r: {
            each["metadata"]["name"]: (each["spec"]["partitions"], each["spec"]["config"])
            for each in r.all("KafkaTopic")
        },
        {
            "shop-flashsale.reservations": (
                requirements.PARTITIONS,
                TOPIC | {"retention.ms": requirements.EVENT_RETENTION_MS, "min.insync.replicas": 2},
            ),
            "shop-flashsale.recorded": (
                requirements.PARTITIONS,
                TOPIC | {"retention.ms": requirements.EVENT_RETENTION_MS, "min.insync.replicas": 2},
            ),
            "shop-flashsale.reservations.dlq": (
                requirements.PARTITIONS,
                TOPIC
                | {
                    "retention.ms": topics.DEAD_LETTER_RETENTION_MS,
                    "min.insync.replicas": 2,
                    "max.message.bytes": topics.DEAD_LETTER_BYTES,
                },
            ),
        },
    ),
    (
        "topics survive an uninstall",
        TOPICS,
        lambda r: {
            each["metadata"]["annotations"]["helm.sh/resource-policy"]
            for each in r.all("KafkaTopic")
        },
        {"keep"},
    ),
    (
        "the CRD survives an uninstall",
        {},
        lambda r: r.all("CustomResourceDefinition")[0]["metadata"]["annotations"],
        {"helm.sh/resource-policy": "keep"},
    ),
    ("a Role in the release's namespace", {}, namespaces, [NAMESPACE]),
    (
        "a Role in each listed namespace",
        at("operator.namespaces", ["a", "b"]),
        namespaces,
        ["a", "b"],
    ),
    (
        "the dashboard is the file, with the release in its title",
        DASHBOARD,
        lambda r: {**dashboard(r), "uid": "flashsale"},
        {**FILE, "title": f"{FILE['title']}: {NAMESPACE}.shop-flashsale"},
    ),
    (
        "the alerts link to the configured runbooks",
        merged(RULES, at("prometheusRules.runbooks", "https://wiki.example/flashsale")),
        lambda r: {
            rule["annotations"]["runbook_url"].partition("#")[0]
            for rule in r.all("PrometheusRule")[0]["spec"]["groups"][0]["rules"]
        },
        {"https://wiki.example/flashsale"},
    ),
]


@each_combination(EXPECTATIONS)
def test_a_combination_of_values_renders_as_expected(
    chart: Helm, changes: dict[str, Any], actual: Callable[[Rendered], Any], expected: object
) -> None:
    assert actual(chart.render(changes)) == expected


def test_grafana_can_store_the_dashboards_of_several_releases(chart: Helm) -> None:
    """Grafana stores no dashboard of a folder in which two have the same uid or title."""
    values = merged(ADDRESSES, DASHBOARD)
    releases = (("a", "shop"), ("b", "shop"), ("b", "outlet"))
    found = [
        Rendered.of(chart.run("template", name, str(CHART), "-n", namespace, values=values))
        for namespace, name in releases
    ]
    for key in ("uid", "title"):
        assert len({dashboard(each)[key] for each in found}) == len(releases)
    assert len({file for each in found for file in each.all("ConfigMap")[0]["data"]}) == 3
    # Grafana refuses a longer uid.
    assert all(len(dashboard(each)["uid"]) <= 40 for each in found)
