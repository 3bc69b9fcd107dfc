"""Each value of the chart changes the rendered manifests."""

from typing import Any, Final

import pytest

from tests.support.chart import (
    COMPONENTS,
    Helm,
    at,
    merged,
)
from tests.support.chart_options import (
    API_SCALES,
    AUTHORITY,
    BALANCED,
    BY_CPU,
    BY_LAG,
    DASHBOARD,
    IDENTITY,
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
    USERS,
)
from tests.support.chart_values import values


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
        "strategy.rollingUpdate.maxSurge": "50%",
        "strategy.rollingUpdate.maxUnavailable": 1,
    }
    if component != "operator":
        changes["topologySpreadConstraints"] = []
    return {f"{component}.{path}": (value, {}) for path, value in changes.items()}


def _server_changes(name: str, field: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    secret = {"existingSecret": {"name": "other"}}
    return {
        f"{name}.existingSecret.name": ("other", at(f"{name}.{field}", "")),
        f"{name}.existingSecret.key": ("other", {name: {field: "", **secret}}),
        f"networkPolicies.{name}.peers": ([PEER], POLICIES),
        f"networkPolicies.{name}.port": (1, {**at(name, {field: "", **secret}), **POLICIES}),
    }


CHANGES: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
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
    "redis.existingSecret.apiKey": (
        "other",
        {"redis": {"url": "", "existingSecret": {"name": "redis"}}},
    ),
    "kafka.tls.existingSecret.name": ("other", TLS),
    "kafka.tls.existingSecret.key": ("pem", merged(TLS, at("kafka.tls.existingSecret.name", "ca"))),
    "kafka.tls.clientCertificate.existingSecret.name": ("client", TLS),
    "kafka.sasl.mechanism": ("PLAIN", USERS),
    "kafka.sasl.existingSecret.name": ("login", {}),
    **{f"kafka.users.{component}": ("other", USERS) for component in COMPONENTS},
    "kafka.partitions": (24, {}),
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
    "api.ingress.page": (True, INGRESS),
    "api.ingress.className": ("nginx", INGRESS),
    "api.ingress.annotations": ({"a": "b"}, INGRESS),
    "api.ingress.host": ("other.example", INGRESS),
    "api.ingress.tlsSecretName": ("tls", INGRESS),
    "api.httpRoute.enabled": (True, at("api.httpRoute.parentRefs", [{"name": "public"}])),
    "api.httpRoute.page": (True, ROUTE),
    "api.httpRoute.parentRefs": ([{"name": "other"}], ROUTE),
    "api.httpRoute.hostnames": (["shop.example"], ROUTE),
    "orders.existingSecret.name": ("other", {}),
    "orders.existingSecret.key": ("other", ORDERS),
    "orders.service.port": (8083, ORDERS),
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
    "operator.items": ({"shop": "shop-"}, {}),
    "operator.keepClosedSeconds": (3, {}),
    "networkPolicies.enabled": (True, {}),
    "networkPolicies.buyers": ([PEER], POLICIES),
    "identity.userHeader": ("x-user-id", {}),
    "identity.jwksUrl": ("http://keys/b", IDENTITY),
    "identity.issuer": ("other", IDENTITY),
    "identity.audience": ("other", IDENTITY),
    "networkPolicies.issuer.peers": ([PEER], merged(POLICIES, IDENTITY)),
    "networkPolicies.orders": ([PEER], merged(POLICIES, ORDERS)),
    "networkPolicies.prometheus": ([PEER], POLICIES),
    "networkPolicies.dns.peers": ([PEER], POLICIES),
    "networkPolicies.dns.port": (5353, POLICIES),
    "networkPolicies.kubernetes.peers": ([{"ipBlock": {"cidr": "10.0.0.1/32"}}], POLICIES),
    "networkPolicies.kubernetes.port": (443, POLICIES),
    "logLevel": ("debug", {}),
    "tracing.endpoint": ("http://collector:4318", {}),
    "tracing.ratio": (0.5, TRACING),
    "tracing.trustTraceparent": (True, TRACING),
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
