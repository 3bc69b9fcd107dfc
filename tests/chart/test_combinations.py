"""Options and combinations of values render the expected objects and fields."""

from collections.abc import Callable
from typing import Any, Final

import pytest

from flashsale_consumer import topics
from tests.support.chart import (
    COMPONENTS,
    NAMESPACE,
    Helm,
    Rendered,
    at,
    merged,
)
from tests.support.chart_options import (
    API_SCALES,
    AUTHORITY,
    BY_CPU,
    BY_LAG,
    DASHBOARD,
    EVERYWHERE,
    INGRESS,
    MONITORS,
    POLICIES,
    ROUTE,
    RULES,
    TLS,
    TOPICS,
)
from tests.support.paths import CHART


def kinds(rendered: Rendered) -> dict[str, int]:
    found = [each["kind"] for each in rendered.manifests]
    return {kind: found.count(kind) for kind in sorted(set(found))}


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
        (INGRESS, {"Ingress": 1}),
        (ROUTE, {"HTTPRoute": 1}),
        (TOPICS, {"KafkaTopic": 2}),
        (POLICIES, {"NetworkPolicy": 3}),
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


def hpa(rendered: Rendered, component: str) -> Any:  # noqa: ANN401 - any manifest
    return rendered.one("HorizontalPodAutoscaler", component)["spec"]


def replicas(rendered: Rendered) -> list[int | None]:
    return [rendered.one("Deployment", each)["spec"].get("replicas") for each in COMPONENTS]


def env(name: str, component: str) -> Callable[[Rendered], Any]:
    return lambda rendered: rendered.environment(component)[name]


def namespaces(rendered: Rendered) -> list[str]:
    return [each["metadata"]["namespace"] for each in rendered.all("Role")]


EXPECTATIONS: Final[list[tuple[str, dict[str, Any], Callable[[Rendered], Any], Any]]] = [
    ("Deployments set replicas", {}, replicas, [2, 2, 1]),
    ("a scaled API sets no replicas", API_SCALES, replicas, [None, 2, 1]),
    ("a consumer scaled by CPU sets no replicas", BY_CPU, replicas, [2, None, 1]),
    ("a consumer scaled by lag sets no replicas", BY_LAG, replicas, [2, None, 1]),
    ("zero replicas are possible", at("consumer.replicas", 0), replicas, [2, 0, 1]),
    (
        "the API scales by CPU",
        API_SCALES,
        lambda r: (
            hpa(r, "api")["scaleTargetRef"]["name"],
            hpa(r, "api")["minReplicas"],
            hpa(r, "api")["maxReplicas"],
            hpa(r, "api")["metrics"][0]["resource"]["target"]["averageUtilization"],
        ),
        ("shop-flashsale-api", 2, 10, 60),
    ),
    (
        "the consumer scales by lag",
        BY_LAG,
        lambda r: (
            r.one("ScaledObject", "consumer")["spec"]["scaleTargetRef"]["name"],
            r.one("ScaledObject", "consumer")["spec"]["triggers"][0]["metadata"],
        ),
        (
            "shop-flashsale-consumer",
            {
                "bootstrapServersFromEnv": "FLASHSALE_KAFKA_BOOTSTRAP",
                "consumerGroup": "shop-flashsale-ledger",
                "topic": "shop-flashsale.reservations",
                "lagThreshold": "5000",
                "offsetResetPolicy": "earliest",
            },
        ),
    ),
    (
        "KEDA reads the brokers from the container's environment",
        BY_LAG,
        lambda r: (
            r.one("ScaledObject", "consumer")["spec"]["scaleTargetRef"]["envSourceContainerName"],
            "FLASHSALE_KAFKA_BOOTSTRAP" in r.environment("consumer"),
        ),
        ("consumer", True),
    ),
    (
        "an engine's name is the prefix of its topics and its consumer group",
        merged(TOPICS, BY_LAG, at("engine", "flashsale")),
        lambda r: (
            sorted(each["metadata"]["name"] for each in r.all("KafkaTopic")),
            r.one("ScaledObject", "consumer")["spec"]["triggers"][0]["metadata"]["topic"],
            r.one("ScaledObject", "consumer")["spec"]["triggers"][0]["metadata"]["consumerGroup"],
        ),
        (
            ["flashsale.reservations", "flashsale.reservations.dlq"],
            "flashsale.reservations",
            "flashsale-ledger",
        ),
    ),
    (
        "every process knows its engine's name, by default the release's full name",
        {},
        lambda r: [r.environment(each)["FLASHSALE_ENGINE"] for each in COMPONENTS],
        ["shop-flashsale"] * 3,
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
                topics.PARTITIONS,
                {"retention.ms": topics.EVENT_RETENTION_MS, "min.insync.replicas": 2},
            ),
            "shop-flashsale.reservations.dlq": (
                topics.PARTITIONS,
                {
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
    (
        "the operator serves the release's namespace",
        {},
        env("FLASHSALE_NAMESPACES", "operator"),
        NAMESPACE,
    ),
    (
        "the operator serves all namespaces",
        EVERYWHERE,
        env("FLASHSALE_NAMESPACES", "operator"),
        "",
    ),
    (
        "the operator serves the listed namespaces",
        at("operator.namespaces", ["a", "b"]),
        env("FLASHSALE_NAMESPACES", "operator"),
        "a,b",
    ),
    ("a Role in the release's namespace", {}, namespaces, [NAMESPACE]),
    (
        "a Role in each listed namespace",
        at("operator.namespaces", ["a", "b"]),
        namespaces,
        ["a", "b"],
    ),
    (
        "closed sales keep their keys",
        {},
        env("FLASHSALE_KEEP_CLOSED_SECONDS", "operator"),
        "3600",
    ),
    (
        "a large number of seconds is no float",
        at("operator.keepClosedSeconds", 10_000_000),
        env("FLASHSALE_KEEP_CLOSED_SECONDS", "operator"),
        "10000000",
    ),
    ("an address as a value", {}, env("FLASHSALE_REDIS_URL", "api"), "redis://redis:6379/0"),
    (
        "an address from a Secret",
        {},
        env("FLASHSALE_DATABASE_URL", "consumer"),
        {"secretKeyRef": {"name": "ledger", "key": "url"}},
    ),
    (
        "the default tag is the version",
        {},
        lambda r: r.container("api")["image"],
        "flashsale/api:0.1.0",
    ),
    (
        "a digest takes precedence over a tag",
        at("api.image", {"tag": "2", "digest": f"sha256:{'0' * 64}"}),
        lambda r: r.container("api")["image"],
        f"flashsale/api@sha256:{'0' * 64}",
    ),
    (
        "one registry for all images",
        at("image.registry", "registry.example:5000/mirror"),
        lambda r: [r.container(each)["image"] for each in COMPONENTS],
        [f"registry.example:5000/mirror/flashsale/{each}:0.1.0" for each in COMPONENTS],
    ),
    (
        "both forms of pull secrets",
        at("imagePullSecrets", ["a", {"name": "b"}]),
        lambda r: r.pod("api")["spec"]["imagePullSecrets"],
        [{"name": "a"}, {"name": "b"}],
    ),
    (
        "resources with every name, as texts and numbers",
        at("api.resources.limits", {"cpu": 2, "ephemeral-storage": 1_000_000, "a.example/gpu": 1}),
        lambda r: r.container("api")["resources"]["limits"],
        {"memory": "512Mi", "cpu": 2, "ephemeral-storage": 1_000_000, "a.example/gpu": 1},
    ),
    (
        "an additional variable from a Secret follows those of the chart",
        at(
            "consumer.extraEnv",
            [
                {
                    "name": "OTEL_EXPORTER_OTLP_HEADERS",
                    "valueFrom": {"secretKeyRef": {"name": "collector", "key": "headers"}},
                }
            ],
        ),
        lambda r: r.container("consumer")["env"][-2:],
        [
            {"name": "FLASHSALE_LOG_LEVEL", "value": "info"},
            {
                "name": "OTEL_EXPORTER_OTLP_HEADERS",
                "valueFrom": {"secretKeyRef": {"name": "collector", "key": "headers"}},
            },
        ],
    ),
    (
        "a spread has the selector of the component's own pods of the same revision",
        at(
            "api.topologySpreadConstraints",
            [{"topologyKey": "rack", "maxSkew": 2, "whenUnsatisfiable": "DoNotSchedule"}],
        ),
        lambda r: r.pod("api")["spec"]["topologySpreadConstraints"],
        [
            {
                "topologyKey": "rack",
                "maxSkew": 2,
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {
                    "matchLabels": {
                        "app.kubernetes.io/name": "flashsale",
                        "app.kubernetes.io/instance": "shop",
                        "app.kubernetes.io/component": "api",
                    }
                },
                "matchLabelKeys": ["pod-template-hash"],
            }
        ],
    ),
    (
        "a rollout within a full quota",
        at("api.strategy.rollingUpdate", {"maxSurge": 0, "maxUnavailable": 1}),
        lambda r: r.one("Deployment", "api")["spec"]["strategy"],
        {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
    ),
    (
        "the HTTPRoute exposes only the buyers' paths",
        merged(ROUTE, at("api.httpRoute.hostnames", ["shop.example"])),
        lambda r: r.one("HTTPRoute", "api")["spec"],
        {
            "parentRefs": [{"name": "public"}],
            "hostnames": ["shop.example"],
            "rules": [
                {
                    "matches": [
                        {"path": {"type": "Exact", "value": "/reserve"}},
                        {"path": {"type": "PathPrefix", "value": "/sales"}},
                    ],
                    "backendRefs": [{"name": "shop-flashsale-api", "port": 80}],
                }
            ],
        },
    ),
    (
        "one Kafka user that all components share",
        at("kafka.sasl", {"mechanism": "PLAIN", "existingSecret": {"name": "login"}}),
        lambda r: [
            (
                r.environment(each)["FLASHSALE_KAFKA_SASL_MECHANISM"],
                r.environment(each)["FLASHSALE_KAFKA_USER"]["secretKeyRef"],
                r.environment(each)["FLASHSALE_KAFKA_PASSWORD"]["secretKeyRef"],
            )
            for each in COMPONENTS
        ],
        [("PLAIN", {"name": "login", "key": "username"}, {"name": "login", "key": "password"})] * 3,
    ),
    (
        "a client certificate for Kafka",
        merged(TLS, at("kafka.tls.clientCertificate.existingSecret.name", "client")),
        lambda r: [
            (
                r.environment(each)["FLASHSALE_KAFKA_CERT_FILE"],
                r.environment(each)["FLASHSALE_KAFKA_KEY_FILE"],
                r.container(each)["volumeMounts"][0]["mountPath"],
                r.pod(each)["spec"]["volumes"][0]["secret"]["secretName"],
                [
                    item["path"]
                    for item in r.pod(each)["spec"]["volumes"][0]["secret"]["items"]
                    if item["path"] == item["key"]
                ],
            )
            for each in COMPONENTS
        ],
        [
            (
                "/etc/flashsale-kafka-client/tls.crt",
                "/etc/flashsale-kafka-client/tls.key",
                "/etc/flashsale-kafka-client",
                "client",
                ["tls.crt", "tls.key"],
            )
        ]
        * 3,
    ),
    (
        "Redis and PostgreSQL clients trust the certificate authority",
        AUTHORITY,
        lambda r: [
            (
                r.environment(each)["SSL_CERT_FILE"],
                r.environment(each)["PGSSLROOTCERT"],
                r.container(each)["volumeMounts"][0]["mountPath"],
                r.pod(each)["spec"]["volumes"][0]["secret"],
            )
            for each in COMPONENTS
        ],
        [
            (
                "/etc/flashsale/ca.crt",
                "/etc/flashsale/ca.crt",
                "/etc/flashsale",
                {"secretName": "ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]},
            )
        ]
        * 3,
    ),
    (
        "the Ingress exposes only the buyers' paths",
        INGRESS,
        lambda r: {
            each["path"]: each["pathType"]
            for each in r.one("Ingress", "api")["spec"]["rules"][0]["http"]["paths"]
        },
        {"/reserve": "Exact", "/sales": "Prefix"},
    ),
    (
        "PodMonitors read each component's metrics port",
        MONITORS,
        lambda r: [
            r.one("PodMonitor", each)["spec"]["podMetricsEndpoints"][0]["port"]
            for each in COMPONENTS
        ],
        ["metrics", "http", "http"],
    ),
    (
        "the dashboard is the file",
        DASHBOARD,
        lambda r: r.all("ConfigMap")[0]["data"]["flashsale.json"],
        (CHART / "files" / "dashboard.json").read_text(),
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


@pytest.mark.parametrize(
    ("changes", "actual", "expected"),
    [each[1:] for each in EXPECTATIONS],
    ids=[each[0] for each in EXPECTATIONS],
)
def test_a_combination_of_values_renders_as_expected(
    chart: Helm, changes: dict[str, Any], actual: Callable[[Rendered], Any], expected: object
) -> None:
    assert actual(chart.render(changes)) == expected
