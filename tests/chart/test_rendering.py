"""Each value has its effect on the rendered manifests, and the manifests are as intended."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from flashsale_consumer import topics
from tests.support.chart import (
    ADDRESSES,
    COMPONENTS,
    NAMESPACE,
    RELEASE,
    Helm,
    Rendered,
    at,
    merged,
)
from tests.support.chart_values import values
from tests.support.paths import CHART

pytestmark = pytest.mark.slow

PEER: Final = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "there"}}}
POLICIES: Final = {"networkPolicies": {"enabled": True}}
TLS: Final = at("kafka.tls.enabled", True)
USERS: Final = at("kafka.users", {component: f"the-{component}" for component in COMPONENTS})
TOPICS: Final = {"kafka": {"topics": {"enabled": True, "cluster": "main"}}}
KUBERNETES_LABELS: Final = {
    f"app.kubernetes.io/{name}"
    for name in ("name", "instance", "component", "version", "part-of", "managed-by")
} | {"helm.sh/chart"}


def _component_changes(component: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    changes: dict[str, Any] = {
        "image.repository": "elsewhere/it",
        "image.tag": "2",
        "image.digest": f"sha256:{'0' * 64}",
        "image.pullPolicy": "Always",
        "resources.requests": {"cpu": "2"},
        "resources.limits": {"memory": "1Gi"},
        "extraEnv": [{"name": "A", "value": "b"}],
        "podAnnotations": {"a": "b"},
        "podLabels": {"a": "b"},
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "priorityClassName": "high",
    }
    if component != "operator":
        changes |= {
            "topologySpreadConstraints": [],
            "strategy.rollingUpdate.maxSurge": "50%",
            "strategy.rollingUpdate.maxUnavailable": 1,
        }
    return {f"{component}.{path}": (value, {}) for path, value in changes.items()}


def _server_changes(name: str, field: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    secret = {"existingSecret": {"name": "other"}}
    return {
        f"{name}.existingSecret.name": ("other", at(f"{name}.{field}", "")),
        f"{name}.existingSecret.key": ("other", {name: {field: "", **secret}}),
        f"networkPolicies.{name}.peers": ([PEER], POLICIES),
        f"networkPolicies.{name}.port": (1, {**at(name, {field: "", **secret}), **POLICIES}),
    }


API_SCALES: Final = at("api.autoscaling.enabled", True)
BY_LAG: Final = at("consumer.autoscaling.by", "lag")
BY_CPU: Final = at("consumer.autoscaling.by", "cpu")
INGRESS: Final = at("api.ingress", {"enabled": True, "host": "shop.example"})
ROUTE: Final = at("api.httpRoute", {"enabled": True, "parentRefs": [{"name": "public"}]})
BALANCED: Final = at("api.service.type", "LoadBalancer")
MONITORS: Final = at("podMonitors.enabled", True)
RULES: Final = at("prometheusRules.enabled", True)
DASHBOARD: Final = at("dashboard.enabled", True)
TRACING: Final = at("tracing.endpoint", "http://collector:4318")

AUTHORITY: Final = at("certificateAuthority.existingSecret.name", "ca")

CHANGES: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    "nameOverride": ("other", {}),
    "fullnameOverride": ("other", {}),
    "engine": ("other", {}),
    "commonLabels": ({"a": "b"}, {}),
    "commonAnnotations": ({"a": "b"}, {}),
    "imagePullSecrets": (["a"], {}),
    "image.registry": ("registry.example:5000/mirror", {}),
    "crds.enabled": (False, {}),
    "rbac.aggregateClusterRoles": (False, {}),
    "certificateAuthority.existingSecret.name": ("ca", {}),
    "certificateAuthority.existingSecret.key": ("pem", AUTHORITY),
    "redis.url": ("rediss://user@other/1", {}),
    "kafka.bootstrap": ("a:1,b:2", {}),
    "database.url": (
        "postgresql://u@h/d?sslmode=verify-full",
        at("database", {"url": "postgresql://u@other/d", "existingSecret": {"name": ""}}),
    ),
    **_server_changes("redis", "url"),
    **_server_changes("kafka", "bootstrap"),
    **_server_changes("database", "url"),
    "kafka.tls.enabled": (True, {}),
    "kafka.tls.existingSecret.name": ("other", TLS),
    "kafka.tls.existingSecret.key": ("pem", merged(TLS, at("kafka.tls.existingSecret.name", "ca"))),
    "kafka.tls.clientCertificate.existingSecret.name": ("client", TLS),
    "kafka.sasl.mechanism": ("PLAIN", USERS),
    "kafka.sasl.existingSecret.name": ("login", {}),
    **{f"kafka.users.{component}": ("other", USERS) for component in COMPONENTS},
    "kafka.partitions": (24, TOPICS),
    "kafka.topics.enabled": (True, at("kafka.topics.cluster", "main")),
    "kafka.topics.cluster": ("other", TOPICS),
    "kafka.topics.namespace": ("other", TOPICS),
    "kafka.topics.replicas": (5, TOPICS),
    "kafka.topics.minInSyncReplicas": (1, TOPICS),
    **_component_changes("api"),
    "api.replicas": (3, {}),
    "api.autoscaling.enabled": (True, {}),
    "api.autoscaling.minReplicas": (3, API_SCALES),
    "api.autoscaling.maxReplicas": (3, API_SCALES),
    "api.autoscaling.targetCPUUtilizationPercentage": (3, API_SCALES),
    "api.preStopSeconds": (3, {}),
    "api.service.type": ("LoadBalancer", {}),
    "api.service.port": (8080, {}),
    "api.service.nodePort": (30080, at("api.service.type", "NodePort")),
    "api.service.loadBalancerClass": ("example.com/internal", BALANCED),
    "api.service.loadBalancerSourceRanges": (["192.0.2.0/24"], BALANCED),
    "api.service.externalTrafficPolicy": ("Local", BALANCED),
    "api.service.annotations": ({"a": "b"}, {}),
    "api.ingress.enabled": (True, {}),
    "api.ingress.className": ("nginx", INGRESS),
    "api.ingress.annotations": ({"a": "b"}, INGRESS),
    "api.ingress.host": ("other.example", INGRESS),
    "api.ingress.tlsSecretName": ("tls", INGRESS),
    "api.httpRoute.enabled": (True, at("api.httpRoute.parentRefs", [{"name": "public"}])),
    "api.httpRoute.parentRefs": ([{"name": "other"}], ROUTE),
    "api.httpRoute.hostnames": (["shop.example"], ROUTE),
    **_component_changes("consumer"),
    "consumer.replicas": (3, {}),
    "consumer.autoscaling.by": ("cpu", {}),
    "consumer.autoscaling.minReplicas": (2, BY_LAG),
    "consumer.autoscaling.maxReplicas": (7, BY_LAG),
    "consumer.autoscaling.targetCPUUtilizationPercentage": (3, BY_CPU),
    "consumer.autoscaling.lagThreshold": (3, BY_LAG),
    **_component_changes("operator"),
    "operator.allNamespaces": (True, {}),
    "operator.namespaces": (["a"], {}),
    "operator.keepClosedSeconds": (3, {}),
    "networkPolicies.enabled": (True, {}),
    "networkPolicies.buyers": ([PEER], POLICIES),
    "networkPolicies.prometheus": ([PEER], POLICIES),
    "networkPolicies.dns.peers": ([PEER], POLICIES),
    "networkPolicies.dns.port": (5353, POLICIES),
    "networkPolicies.kubernetes.peers": ([{"ipBlock": {"cidr": "10.0.0.1/32"}}], POLICIES),
    "networkPolicies.kubernetes.port": (443, POLICIES),
    "logLevel": ("debug", {}),
    "tracing.endpoint": ("http://collector:4318", {}),
    "tracing.ratio": (0.5, TRACING),
    "networkPolicies.collector.peers": ([PEER], merged(POLICIES, TRACING)),
    "podMonitors.enabled": (True, {}),
    "podMonitors.labels": ({"a": "b"}, MONITORS),
    "podMonitors.interval": ("1m", MONITORS),
    "prometheusRules.enabled": (True, {}),
    "prometheusRules.labels": ({"a": "b"}, RULES),
    "prometheusRules.runbooks": ("https://wiki.example/flashsale", RULES),
    "dashboard.enabled": (True, {}),
    "dashboard.labels": ({"a": "b"}, DASHBOARD),
}


def test_the_table_changes_every_value() -> None:
    assert sorted(CHANGES) == sorted(value.path for value in values())


@pytest.mark.parametrize("path", CHANGES)
def test_every_value_changes_the_manifests(chart: Helm, path: str) -> None:
    value, context = CHANGES[path]
    if path in {f"{server}.existingSecret.name" for server in ("redis", "kafka", "database")}:
        name = path.partition(".")[0]
        rendered = chart.render(context, at(path, value))
        variable = {"redis": "REDIS_URL", "kafka": "KAFKA_BOOTSTRAP", "database": "DATABASE_URL"}
        found = rendered.environment("operator")[f"FLASHSALE_{variable[name]}"]
        assert found["secretKeyRef"]["name"] == value
    else:
        assert chart.render(context) != chart.render(context, at(path, value))


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
EVERYWHERE: Final = at("operator.allNamespaces", True)


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


def policy(rendered: Rendered, component: str) -> Any:  # noqa: ANN401 - any manifest
    return rendered.one("NetworkPolicy", component)["spec"]


def destinations(rendered: Rendered, component: str) -> list[int]:
    ports = [rule["ports"] for rule in policy(rendered, component)["egress"]]
    return sorted(each["port"] for rule in ports for each in rule)


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
    *(
        (
            f"policies follow the address {address}",
            merged(POLICIES, at(path, address), at("database.existingSecret.name", name)),
            lambda r, component=component: destinations(r, component),
            expected,
        )
        for path, address, name, component, expected in (
            ("redis.url", "rediss://u@r:6380/0", "x", "api", [53, 53, 6380, 9092]),
            ("redis.url", "redis://r", "x", "api", [53, 53, 6379, 9092]),
            ("kafka.bootstrap", "a:9094,b:9094,c:9095", "x", "api", [53, 53, 6379, 9094, 9095]),
            ("database.url", "postgresql://u@h:6432/x", "", "consumer", [53, 53, 6432, 9092]),
            ("database.url", "postgres://[::1]", "", "consumer", [53, 53, 5432, 9092]),
            ("database.url", "postgres://a:1,b/x?c=d:9", "", "consumer", [1, 53, 53, 5432, 9092]),
            ("tracing.endpoint", "https://c/v1", "x", "api", [53, 53, 443, 6379, 9092]),
            ("tracing.endpoint", "http://c", "x", "api", [53, 53, 80, 6379, 9092]),
        )
    ),
    (
        "policies follow the configured DNS",
        merged(POLICIES, at("networkPolicies.dns", {"port": 5353, "peers": [PEER]})),
        lambda r: [policy(r, each)["egress"][0] for each in COMPONENTS],
        [
            {
                "ports": [
                    {"protocol": "UDP", "port": 5353},
                    {"protocol": "TCP", "port": 5353},
                ],
                "to": [PEER],
            }
        ]
        * 3,
    ),
    (
        "the pod of helm test reaches only DNS, the API, PostgreSQL and Kubernetes",
        POLICIES,
        lambda r: [
            (
                each["metadata"]["annotations"]["helm.sh/hook-weight"],
                each["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"],
                each["spec"].get("ingress"),
                [rule["ports"][0]["port"] for rule in each["spec"]["egress"]],
            )
            for each in r.hooks
            if each["kind"] == "NetworkPolicy"
        ],
        [("-1", "test", None, [53, 8080, 5432, 6443])],
    ),
    (
        "the API reaches only Redis and Kafka",
        POLICIES,
        lambda r: destinations(r, "api"),
        [53, 53, 6379, 9092],
    ),
    (
        "the consumer reaches only Kafka and PostgreSQL",
        POLICIES,
        lambda r: destinations(r, "consumer"),
        [53, 53, 5432, 9092],
    ),
    (
        "the operator reaches Redis, Kafka, PostgreSQL and Kubernetes",
        POLICIES,
        lambda r: destinations(r, "operator"),
        [53, 53, 5432, 6379, 6443, 9092],
    ),
    (
        "buyers reach only the API",
        POLICIES,
        lambda r: [policy(r, each).get("ingress") for each in COMPONENTS],
        [[{"ports": [{"protocol": "TCP", "port": "http"}]}], None, None],
    ),
    (
        "helm test reaches the API even if buyers are restricted",
        {"networkPolicies": {"enabled": True, "buyers": [PEER]}},
        lambda r: [
            each.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component")
            for each in policy(r, "api")["ingress"][0]["from"]
        ],
        [None, "test"],
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
        "Prometheus reaches only the metrics ports",
        {"networkPolicies": {"enabled": True, "prometheus": [PEER]}},
        lambda r: [
            [(rule["ports"][0]["port"], rule.get("from")) for rule in policy(r, each)["ingress"]]
            for each in COMPONENTS
        ],
        [[("http", None), ("metrics", [PEER])], [("http", [PEER])], [("http", [PEER])]],
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
        "the API and the consumer send traces and may reach the collector",
        merged(POLICIES, TRACING),
        lambda r: [
            (
                r.environment(each).get("OTEL_EXPORTER_OTLP_ENDPOINT"),
                r.environment(each).get("OTEL_TRACES_SAMPLER_ARG"),
                4318 in destinations(r, each),
            )
            for each in COMPONENTS
        ],
        [
            ("http://collector:4318", "0.01", True),
            ("http://collector:4318", "0.01", True),
            (None, None, False),
        ],
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


def test_helm_lint_finds_no_problem(chart: Helm) -> None:
    for changes in ({}, ADDRESSES):
        chart.run("lint", "--strict", str(CHART), values=changes)


def test_every_object_has_the_recommended_labels_and_selectors_use_three_of_them(
    chart: Helm,
) -> None:
    rendered = chart.render(API_SCALES, BY_LAG, INGRESS, POLICIES, MONITORS, EVERYWHERE)
    for manifest in rendered.manifests:
        labels = set(manifest["metadata"]["labels"])
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        has_component = kind != "CustomResourceDefinition" and not name.endswith(("-view", "-edit"))
        wanted = KUBERNETES_LABELS - (set() if has_component else {"app.kubernetes.io/component"})
        assert wanted <= labels, manifest
    for component in COMPONENTS:
        spec = rendered.one("Deployment", component)["spec"]
        selector = spec["selector"]["matchLabels"]
        assert selector == {
            "app.kubernetes.io/name": "flashsale",
            "app.kubernetes.io/instance": "shop",
            "app.kubernetes.io/component": component,
        }
        assert selector.items() <= spec["template"]["metadata"]["labels"].items()
        assert policy(rendered, component)["podSelector"]["matchLabels"] == selector
        monitor = rendered.one("PodMonitor", component)
        assert monitor["spec"]["selector"]["matchLabels"] == selector
    assert (
        rendered.one("Service", "api")["spec"]["selector"]["app.kubernetes.io/component"] == "api"
    )


def test_common_labels_and_annotations_join_those_of_each_object(chart: Helm) -> None:
    labels = {"team": "sales", "release": "common"}
    annotations = {"a": "b", "c": "d"}
    rendered = chart.render(
        TOPICS,
        MONITORS,
        INGRESS,
        {"commonLabels": labels, "commonAnnotations": annotations},
        at("podMonitors.labels", {"release": "prometheus"}),
        at("api", {"podLabels": {"team": "shop"}, "ingress": {"annotations": {"c": "own"}}}),
    )
    for each in [*rendered.manifests, *rendered.hooks]:
        own_release = "prometheus" if each["kind"] == "PodMonitor" else "common"
        assert each["metadata"]["labels"].items() >= {**labels, "release": own_release}.items()
        own = {"c": "own"} if each["kind"] == "Ingress" else {}
        assert each["metadata"]["annotations"].items() >= {**annotations, **own}.items()
    for topic in rendered.all("KafkaTopic"):
        assert topic["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert rendered.pod("api")["metadata"]["labels"]["team"] == "shop"
    assert rendered.pod("consumer")["metadata"]["labels"]["team"] == "sales"


def test_a_new_version_of_the_chart_alone_changes_no_pod(chart: Helm, tmp_path: Path) -> None:
    copy = tmp_path / "flashsale"
    shutil.copytree(CHART, copy)
    about = copy / "Chart.yaml"
    about.write_text(about.read_text().replace("\nversion: 0.1.0\n", "\nversion: 0.2.0+a\n"))
    text = chart.run("template", RELEASE, str(copy), "-n", NAMESPACE, values=ADDRESSES)
    upgraded, before = Rendered.of(text), chart.render()
    for component in COMPONENTS:
        labels = upgraded.one("Deployment", component)["metadata"]["labels"]
        assert labels["helm.sh/chart"] == "flashsale-0.2.0_a"
        assert upgraded.pod(component) == before.pod(component)
        assert "app.kubernetes.io/version" not in before.pod(component)["metadata"]["labels"]


# YAML reads each of these as a number, a boolean or null unless it is quoted.
ODD_NAMES: Final = ("1e3", "007", "10", "1.5", "0x1f", "true", "no", "null", "1-1")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_that_looks_like_another_type_stays_a_name(chart: Helm, name: str) -> None:
    dashed = name.replace(".", "-")  # a namespace or a release has no dot
    values: dict[str, Any] = {
        "imagePullSecrets": [name],
        "fullnameOverride": "shop",
        "commonLabels": {"a": name},
        "certificateAuthority": {"existingSecret": {"name": name, "key": name}},
        "redis": {"url": "", "existingSecret": {"name": name, "key": name}},
        "kafka": {
            "tls": {"enabled": True, "existingSecret": {"name": name, "key": name}},
            "users": dict.fromkeys(COMPONENTS, name),
            "topics": {"enabled": True, "cluster": dashed, "namespace": dashed},
        },
        "api": {
            "priorityClassName": name,
            "image": {"tag": name},
            "ingress": {"enabled": True, "className": name, "host": name, "tlsSecretName": name},
        },
        "consumer": {"autoscaling": {"by": "lag"}},
        "operator": {"namespaces": [dashed]},
    }
    text = chart.run(
        "template", dashed, str(CHART), "-n", dashed, values=merged(ADDRESSES, MONITORS, values)
    )
    # Helm's YAML parser reads 1e3 as a number, but Python's does not.
    assert not re.search(r"[:-] 1e3\b", text)
    rendered = Rendered.of(text)
    pod = rendered.pod("api")["spec"]
    assert pod["priorityClassName"] == name
    assert pod["imagePullSecrets"] == [{"name": name}]
    assert {each["secret"]["secretName"] for each in pod["volumes"]} == {name}
    assert {each["secret"]["items"][0]["key"] for each in pod["volumes"]} == {name}
    given = rendered.environment("consumer")
    assert given["FLASHSALE_KAFKA_USER"] == name
    assert given["FLASHSALE_KAFKA_PASSWORD"]["secretKeyRef"]["name"] == name
    (tls,) = rendered.one("Ingress", "api")["spec"]["tls"]
    assert tls == {"hosts": [name], "secretName": name}
    for each in [*rendered.manifests, *rendered.hooks]:
        texts = [each["metadata"]["name"], each["metadata"].get("namespace", "")]
        texts += each["metadata"]["labels"].values()
        texts += each["metadata"].get("annotations", {}).values()
        assert all(isinstance(text, str) for text in texts), each


def test_pods_have_the_required_security_resources_and_spread(plain: Rendered) -> None:
    for component in COMPONENTS:
        spec, container = plain.pod(component)["spec"], plain.container(component)
        # The processes would read service links such as FLASHSALE_API_PORT as settings.
        assert spec["enableServiceLinks"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert "cpu" not in resources["limits"]
        assert spec["automountServiceAccountToken"] is (component == "operator")
        account = plain.one("ServiceAccount", component)
        assert account["automountServiceAccountToken"] is (component == "operator")
        assert account["metadata"]["name"] == spec["serviceAccountName"]
    for component in ("api", "consumer"):
        assert plain.container(component)["resources"]["requests"]["cpu"] == "1"
        spreads = plain.pod(component)["spec"]["topologySpreadConstraints"]
        assert {each["topologyKey"] for each in spreads} == {
            "topology.kubernetes.io/zone",
            "kubernetes.io/hostname",
        }
        assert plain.one("PodDisruptionBudget", component)["spec"]["maxUnavailable"] == 1
    operator = plain.one("Deployment", "operator")["spec"]
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert (operator["replicas"], operator["strategy"]) == (1, rolling)


def test_the_objects_of_helm_test_are_deleted_unless_it_fails(plain: Rendered) -> None:
    assert sorted(each["kind"] for each in plain.hooks) == [
        "Pod",
        "Role",
        "RoleBinding",
        "ServiceAccount",
    ]
    for each in plain.hooks:
        assert each["metadata"]["annotations"]["helm.sh/hook"] == "test"
        policies = each["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
        assert policies == "before-hook-creation,hook-succeeded"


def test_an_address_in_a_secret_appears_in_no_manifest(chart: Helm) -> None:
    secrets = {
        name: {key: "", "existingSecret": {"name": f"{name}-secret", "key": "address"}}
        for name, key in (("redis", "url"), ("kafka", "bootstrap"), ("database", "url"))
    }
    rendered = chart.render(secrets)
    assert rendered.all("Secret") == []
    for component in COMPONENTS:
        addresses = [
            value
            for name, value in rendered.environment(component).items()
            if name.endswith(("_URL", "_BOOTSTRAP"))
        ]
        assert addresses
        assert all("secretKeyRef" in value for value in addresses)


def test_long_names_are_cut_to_63_characters(chart: Helm) -> None:
    rendered = chart.render({"fullnameOverride": "a" * 63})
    names = [each["metadata"]["name"] for each in rendered.all("Deployment")]
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 63


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_has_its_own_kafka_user_and_trusts_kafkas_certificates(
    chart: Helm, component: str
) -> None:
    rendered = chart.render(TLS, USERS, at("kafka.tls.existingSecret.name", "main-ca"))
    given = rendered.environment(component)
    assert given["FLASHSALE_KAFKA_TLS"] == "true"
    assert given["FLASHSALE_KAFKA_USER"] == f"the-{component}"
    password = {"secretKeyRef": {"name": f"the-{component}", "key": "password"}}
    assert given["FLASHSALE_KAFKA_PASSWORD"] == password
    spec = rendered.pod(component)["spec"]
    (volume,) = spec["volumes"]
    (mount,) = spec["containers"][0]["volumeMounts"]
    assert volume["secret"]["secretName"] == "main-ca"
    assert mount["name"] == volume["name"]
    assert given["FLASHSALE_KAFKA_CA_FILE"] == f"{mount['mountPath']}/ca.crt"


@pytest.mark.parametrize(
    ("changes", "sasl", "secrets"),
    [
        (TLS, None, []),
        (USERS, "scram_sha512", []),
        (merged(USERS, at("kafka.sasl.mechanism", "SCRAM-SHA-256")), "scram_sha256", []),
        (
            at("kafka.sasl", {"mechanism": "PLAIN", "existingSecret": {"name": "a"}}),
            "plaintext",
            [],
        ),
        (merged(TLS, AUTHORITY), None, [("ca", "ca", "ca.crt")]),
        (
            merged(TLS, AUTHORITY, at("kafka.tls.existingSecret", {"name": "m", "key": "pem"})),
            None,
            [("ca", "m", "pem")],
        ),
        (
            merged(TLS, at("kafka.tls.clientCertificate.existingSecret.name", "client")),
            None,
            [("cert", "client", "tls.crt"), ("key", "client", "tls.key")],
        ),
    ],
)
def test_keda_connects_to_kafka_with_the_consumers_credentials(
    chart: Helm, changes: dict[str, Any], sasl: str | None, secrets: list[tuple[str, str, str]]
) -> None:
    rendered = chart.render(BY_LAG, changes)
    (scaled,) = rendered.all("ScaledObject")
    (trigger,) = scaled["spec"]["triggers"]
    (authentication,) = rendered.all("TriggerAuthentication")
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    has_tls = merged(TLS, changes) == changes
    assert trigger["metadata"].get("tls") == ("enable" if has_tls else None)
    assert trigger["metadata"].get("sasl") == sasl
    given = authentication["spec"] or {}
    parameters = [each["parameter"] for each in given.get("env", [])]
    assert parameters == (["username", "password"] if sasl else [])
    known = rendered.environment("consumer")
    assert all(each["name"] in known for each in given.get("env", []))
    found = given.get("secretTargetRef", [])
    assert [(each["parameter"], each["name"], each["key"]) for each in found] == secrets


def test_keda_has_no_authentication_if_kafka_needs_none(chart: Helm) -> None:
    rendered = chart.render(BY_LAG)
    assert not rendered.all("TriggerAuthentication")
    assert "authenticationRef" not in rendered.all("ScaledObject")[0]["spec"]["triggers"][0]
