"""Values render the expected workloads: replicas, scaling, images, variables and rollouts."""

from collections.abc import Callable
from typing import Any, Final

from tests.support.chart import COMPONENTS, NAMESPACE, Helm, Rendered, at, each_combination, merged
from tests.support.chart_options import API_SCALES, BY_CPU, BY_LAG, EVERYWHERE


def hpa(rendered: Rendered, component: str) -> Any:  # noqa: ANN401 - any manifest
    return rendered.one("HorizontalPodAutoscaler", component)["spec"]


def replicas(rendered: Rendered) -> list[int | None]:
    return [rendered.one("Deployment", each)["spec"].get("replicas") for each in COMPONENTS]


def env(name: str, component: str) -> Callable[[Rendered], Any]:
    return lambda rendered: rendered.environment(component)[name]


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
        "every process knows its engine's name, by default the release's full name",
        {},
        lambda r: [r.environment(each)["FLASHSALE_ENGINE"] for each in COMPONENTS],
        ["shop-flashsale"] * 3,
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
    (
        "the consumer creates its topics with the partitions that limit its pods",
        merged(at("kafka.partitions", 24), at("consumer.replicas", 20)),
        env("FLASHSALE_KAFKA_PARTITIONS", "consumer"),
        "24",
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
        "additional variables from a Secret follow those of the chart",
        at(
            "consumer.extraEnv",
            [
                {
                    "name": "COLLECTOR_TOKEN",
                    "valueFrom": {"secretKeyRef": {"name": "collector", "key": "token"}},
                },
                {"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": "x-token=$(COLLECTOR_TOKEN)"},
            ],
        ),
        lambda r: r.container("consumer")["env"][-3:],
        [
            {"name": "FLASHSALE_LOG_LEVEL", "value": "info"},
            {
                "name": "COLLECTOR_TOKEN",
                "valueFrom": {"secretKeyRef": {"name": "collector", "key": "token"}},
            },
            {"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": "x-token=$(COLLECTOR_TOKEN)"},
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
]


@each_combination(EXPECTATIONS)
def test_a_combination_of_values_renders_as_expected(
    chart: Helm, changes: dict[str, Any], actual: Callable[[Rendered], Any], expected: object
) -> None:
    assert actual(chart.render(changes)) == expected
