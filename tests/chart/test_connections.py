"""Values render the expected connections: addresses, credentials, ports, paths and policies."""

from collections.abc import Callable
from typing import Any, Final

from tests.support.chart import COMPONENTS, Helm, Rendered, at, each_combination, merged
from tests.support.chart_options import (
    AUTHORITY,
    INGRESS,
    MONITORS,
    ORDERS,
    PEER,
    POLICIES,
    ROUTE,
    TLS,
    TRACING,
)


def policy(rendered: Rendered, component: str) -> Any:  # noqa: ANN401 - any manifest
    return rendered.one("NetworkPolicy", component)["spec"]


def destinations(rendered: Rendered, component: str) -> list[int]:
    ports = [rule["ports"] for rule in policy(rendered, component)["egress"]]
    return sorted(each["port"] for rule in ports for each in rule)


EXPECTATIONS: Final[list[tuple[str, dict[str, Any], Callable[[Rendered], Any], Any]]] = [
    (
        "an address as a value",
        {},
        lambda r: r.environment("api")["FLASHSALE_REDIS_URL"],
        "redis://redis:6379/0",
    ),
    (
        "an address from a Secret",
        {},
        lambda r: r.environment("consumer")["FLASHSALE_DATABASE_URL"],
        {"secretKeyRef": {"name": "ledger", "key": "url"}},
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
]


@each_combination(EXPECTATIONS)
def test_a_combination_of_values_renders_as_expected(
    chart: Helm, changes: dict[str, Any], actual: Callable[[Rendered], Any], expected: object
) -> None:
    assert actual(chart.render(changes)) == expected
