"""The NetworkPolicies allow the connections that the pods need, and no others."""

from collections.abc import Callable
from typing import Any, Final

import pytest

from tests.support.chart import (
    COMPONENTS,
    Helm,
    Rendered,
    at,
    merged,
)
from tests.support.chart_options import (
    PEER,
    POLICIES,
    TRACING,
)


def policy(rendered: Rendered, component: str) -> Any:  # noqa: ANN401 - any manifest
    return rendered.one("NetworkPolicy", component)["spec"]


def destinations(rendered: Rendered, component: str) -> list[int]:
    ports = [rule["ports"] for rule in policy(rendered, component)["egress"]]
    return sorted(each["port"] for rule in ports for each in rule)


EXPECTATIONS: Final[list[tuple[str, dict[str, Any], Callable[[Rendered], Any], Any]]] = [
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
        "Prometheus reaches only the metrics ports",
        {"networkPolicies": {"enabled": True, "prometheus": [PEER]}},
        lambda r: [
            [(rule["ports"][0]["port"], rule.get("from")) for rule in policy(r, each)["ingress"]]
            for each in COMPONENTS
        ],
        [[("http", None), ("metrics", [PEER])], [("http", [PEER])], [("http", [PEER])]],
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
]


@pytest.mark.parametrize(
    ("changes", "actual", "expected"),
    [each[1:] for each in EXPECTATIONS],
    ids=[each[0] for each in EXPECTATIONS],
)
def test_a_policy_allows_exactly_the_expected_connections(
    chart: Helm, changes: dict[str, Any], actual: Callable[[Rendered], Any], expected: object
) -> None:
    assert actual(chart.render(changes)) == expected
