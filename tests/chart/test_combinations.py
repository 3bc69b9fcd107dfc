"""Options and combinations of values render the expected objects and fields."""

from collections.abc import Callable
from typing import Any, Final

import pytest

from flashsale import requirements
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
    ORDERS,
    PEER,
    POLICIES,
    ROUTE,
    RULES,
    TLS,
    TOPICS,
    TRACING,
)
from tests.support.paths import CHART

TOPIC_SIZE: Final = {
    "retention.bytes": requirements.PARTITION_BYTES,
    "segment.bytes": requirements.SEGMENT_BYTES,
}


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
                "bootstrapServers": "kafka.sales.svc:9092",
                "consumerGroup": "shop-flashsale-ledger",
                "topic": "shop-flashsale.reservations",
                "lagThreshold": "5000",
                "offsetResetPolicy": "earliest",
            },
        ),
    ),
    (
        "KEDA is in another namespace, so it gets names of Services with their namespace",
        merged(
            BY_LAG, at("kafka.bootstrap", "kafka:9092,kafka.x:9092,[fd00::1]:9092,10.0.0.1:9092")
        ),
        lambda r: r.one("ScaledObject", "consumer")["spec"]["triggers"][0]["metadata"][
            "bootstrapServers"
        ],
        "kafka.sales.svc:9092,kafka.x:9092,[fd00::1]:9092,10.0.0.1:9092",
    ),
    (
        "KEDA reads the brokers of a Secret from the container's environment",
        merged(BY_LAG, at("kafka.existingSecret.name", "brokers"), at("kafka.bootstrap", "")),
        lambda r: (
            r.one("ScaledObject", "consumer")["spec"]["scaleTargetRef"]["envSourceContainerName"],
            r.one("ScaledObject", "consumer")["spec"]["triggers"][0]["metadata"][
                "bootstrapServersFromEnv"
            ],
            "FLASHSALE_KAFKA_BOOTSTRAP" in r.environment("consumer"),
        ),
        ("consumer", "FLASHSALE_KAFKA_BOOTSTRAP", True),
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
            ["flashsale.recorded", "flashsale.reservations", "flashsale.reservations.dlq"],
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
                requirements.PARTITIONS,
                TOPIC_SIZE
                | {"retention.ms": requirements.EVENT_RETENTION_MS, "min.insync.replicas": 2},
            ),
            "shop-flashsale.recorded": (
                requirements.PARTITIONS,
                TOPIC_SIZE
                | {"retention.ms": requirements.EVENT_RETENTION_MS, "min.insync.replicas": 2},
            ),
            "shop-flashsale.reservations.dlq": (
                requirements.PARTITIONS,
                TOPIC_SIZE
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
        "the operator knows which namespace may sell which items",
        at("operator.items", {"shop": "shop-", "brand": "b.", "1": "2"}),
        lambda r: r.environment("operator")["FLASHSALE_ITEMS"],
        "1=2,brand=b.,shop=shop-",
    ),
    (
        "an operator's rollout within a full quota",
        at("operator.strategy.rollingUpdate", {"maxSurge": 0, "maxUnavailable": 1}),
        lambda r: r.one("Deployment", "operator")["spec"]["strategy"],
        {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
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
        "the pod of helm test reaches only DNS, the API, the servers and Kubernetes",
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
        [("-1", "test", None, [53, 8080, 6379, 9092, 5432, 6443])],
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
        "the order port needs a Secret with tokens",
        {},
        lambda r: [
            [each for each in r.manifests if each["metadata"]["name"].endswith("-orders")],
            [each["name"] for each in r.container("api")["ports"]],
            "FLASHSALE_ORDER_TOKENS" in r.environment("api"),
        ],
        [[], ["http", "metrics"], False],
    ),
    (
        "the order port has a Service of its own",
        ORDERS,
        lambda r: [
            [
                each["spec"]["ports"][0]["targetPort"]
                for each in r.manifests
                if each["kind"] == "Service"
            ],
            [each["name"] for each in r.container("api")["ports"]],
            r.environment("api")["FLASHSALE_ORDER_TOKENS"],
            [each for each in COMPONENTS if "FLASHSALE_ORDER_TOKENS" in r.environment(each)],
        ],
        [
            ["orders", "http"],
            ["http", "metrics", "orders"],
            {"secretKeyRef": {"name": "order-service", "key": "tokens"}},
            ["api"],
        ],
    ),
    (
        "only the order service reaches the order port",
        merged(ORDERS, {"networkPolicies": {"enabled": True, "orders": [PEER]}}),
        lambda r: [
            (rule["ports"][0]["port"], rule.get("from")) for rule in policy(r, "api")["ingress"]
        ],
        [("http", None), ("orders", [PEER])],
    ),
    (
        "nothing reaches the order port without peers",
        merged(ORDERS, {"networkPolicies": {"enabled": True}}),
        lambda r: [rule["ports"][0]["port"] for rule in policy(r, "api")["ingress"]],
        ["http"],
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
        "the Ingress exposes the page, and none of the other paths",
        merged(INGRESS, at("api.ingress.page", True)),
        lambda r: {
            each["path"]: each["pathType"]
            for each in r.one("Ingress", "api")["spec"]["rules"][0]["http"]["paths"]
        },
        {"/": "Exact", "/reserve": "Exact", "/sales": "Prefix"},
    ),
    (
        "the HTTPRoute exposes the page, and none of the other paths",
        merged(ROUTE, at("api.httpRoute.page", True)),
        lambda r: [
            (each["path"]["type"], each["path"]["value"])
            for each in r.one("HTTPRoute", "api")["spec"]["rules"][0]["matches"]
        ],
        [("Exact", "/reserve"), ("PathPrefix", "/sales"), ("Exact", "/")],
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
