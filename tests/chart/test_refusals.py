"""Wrong values are refused, by name."""

from typing import Any

import pytest

from tests.chart.chart import ADDRESSES, Helm, Refused, at
from tests.chart.values_table import CHART

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (at("api.replica", 2), "'/api': additional properties 'replica' not allowed"),
        (at("apis", {}), "additional properties 'apis' not allowed"),
        (at("kafka.username", "me"), "'/kafka': additional properties 'username' not allowed"),
        (at("api.replicas", "2"), "'/api/replicas'"),
        (at("api.replicas", -1), "'/api/replicas'"),
        (at("api.resources.limits", {"gpu": "1"}), "'/api/resources/limits'"),
        (at("api.resources.requests.memory", "lots"), "'/api/resources/requests/memory'"),
        (at("api.image.digest", "sha256:1"), "'/api/image/digest'"),
        (at("api.service.type", "ExternalName"), "'/api/service/type'"),
        (at("api.preStopSeconds", 0), "'/api/preStopSeconds'"),
        (at("api.podLabels", {"a b": "c"}), "'/api/podLabels'"),
        (at("consumer.autoscaling.by", "both"), "'/consumer/autoscaling/by'"),
        (at("operator.replicas", 2), "'/operator': additional properties 'replicas' not allowed"),
        (at("operator.namespaces", "all"), "'/operator/namespaces'"),
        (at("redis.url", "http://redis"), "'/redis/url'"),
        (at("kafka.bootstrap", "kafka"), "'/kafka/bootstrap'"),
        (at("database.url", "mysql://x"), "'/database/url'"),
        (at("podMonitors.interval", "often"), "'/podMonitors/interval'"),
        (at("networkPolicies.buyers", [{}]), "'/networkPolicies/buyers/0'"),
        (
            at("consumer.replicas", 13),
            "consumer.replicas: 13 consumers of 12 partitions (kafka.partitions)",
        ),
        (
            at("consumer.autoscaling", {"by": "lag", "maxReplicas": 13}),
            "consumer.autoscaling.maxReplicas: 13 consumers of 12 partitions",
        ),
        (
            at("consumer.autoscaling", {"by": "cpu", "minReplicas": 7}),
            "consumer.autoscaling.minReplicas is more than consumer.autoscaling.maxReplicas",
        ),
        (
            at("api.autoscaling", {"enabled": True, "minReplicas": 11}),
            "api.autoscaling.minReplicas is more than api.autoscaling.maxReplicas",
        ),
        (
            at("redis.url", "redis://:secret@redis:6379"),
            "redis.url holds a password: put the address into a Secret",
        ),
        (
            at(
                "database", {"url": "postgresql://u@h/d?password=x", "existingSecret": {"name": ""}}
            ),
            "database.url holds a password",
        ),
        (at("redis.url", ""), "redis.url or redis.existingSecret.name must be set"),
        (
            at("redis.existingSecret.name", "redis"),
            "redis.url and redis.existingSecret.name: set one of them, not both",
        ),
        (at("api.service.nodePort", 30080), "api.service.type must be NodePort or LoadBalancer"),
        (at("kafka.users.api", "me"), "kafka.users: set all three (api, consumer, operator) or"),
        (at("kafka.tls.existingSecret.name", "ca"), "kafka.tls.enabled must be true"),
        (at("kafka.topics.enabled", True), "kafka.topics.cluster must be set"),
        (
            at("kafka.topics", {"enabled": True, "cluster": "a", "replicas": 1}),
            "kafka.topics.minInSyncReplicas is more than kafka.topics.replicas",
        ),
        (
            at("operator", {"allNamespaces": True, "namespaces": ["a"]}),
            "operator.allNamespaces and operator.namespaces: set one of them, not both",
        ),
        (at("api.ingress.tlsSecretName", "a"), "api.ingress.host must be set"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(chart: Helm, values: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused) as refused:
        chart.render(values)
    assert words in str(refused.value)
    assert "secret@" not in str(refused.value)


def test_all_that_is_wrong_is_said_at_once(chart: Helm) -> None:
    with pytest.raises(Refused) as refused:
        chart.render_only({"consumer": {"replicas": 100}})
    for words in ("redis.url", "kafka.bootstrap", "database.url", "consumer.replicas"):
        assert f"- {words}" in str(refused.value)


def test_as_many_consumers_as_partitions_are_fine(chart: Helm) -> None:
    assert chart.render(at("consumer.replicas", 12))
    assert chart.render(at("consumer.replicas", 24), at("kafka.partitions", 24))
    # What does not scale need not fit.
    assert chart.render(at("consumer.autoscaling.maxReplicas", 100))


def test_kubernetes_before_1_30_is_refused(chart: Helm) -> None:
    with pytest.raises(Refused, match=r"incompatible with Kubernetes v1[.]29"):
        chart.run("template", "x", str(CHART), "--kube-version", "1.29.9", values=ADDRESSES)
    chart.run("template", "x", str(CHART), "--kube-version", "1.30.1-gke.100", values=ADDRESSES)
