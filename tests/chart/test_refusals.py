"""Helm refuses wrong values and names each of them."""

from typing import Any

import pytest

from flashsale.tracing import Sampling
from tests.support.chart import ADDRESSES, Helm, Refused, at, merged
from tests.support.chart_options import API_SCALES, BY_CPU, TRACING
from tests.support.paths import CHART


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (at("api.replica", 2), "'/api': additional properties 'replica' not allowed"),
        (at("apis", {}), "additional properties 'apis' not allowed"),
        (at("kafka.username", "me"), "'/kafka': additional properties 'username' not allowed"),
        (at("api.replicas", "2"), "'/api/replicas'"),
        (at("api.replicas", -1), "'/api/replicas'"),
        (at("api.resources.limits", {"gpu": "1"}), "'/api/resources/limits'"),
        (at("api.resources.limits.cpu", -1), "'/api/resources/limits/cpu'"),
        (at("api.topologySpreadConstraints", [{"topologyKey": "a"}]), "'maxSkew'"),
        (
            at(
                "consumer.topologySpreadConstraints",
                [
                    {"topologyKey": "rack", "maxSkew": 1, "whenUnsatisfiable": when}
                    for when in ("DoNotSchedule", "ScheduleAnyway")
                ],
            ),
            "consumer.topologySpreadConstraints: the topologyKey rack is repeated",
        ),
        (at("api.affinity.podAffinities", {}), "'/api/affinity'"),
        (at("api.extraEnv", [{"name": "A"}]), "'/api/extraEnv/0'"),
        (at("api.extraEnv", [{"name": "A=B", "value": ""}]), "'/api/extraEnv/0/name'"),
        (
            at("api.extraEnv", [{"name": "FLASHSALE_REDIS_URL", "value": "redis://other"}]),
            "api.extraEnv: the variable FLASHSALE_REDIS_URL is set already",
        ),
        (
            at("consumer.extraEnv", [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]),
            "consumer.extraEnv: the variable A is set already",
        ),
        (at("consumer.strategy.rollingUpdate.maxSurge", "200%"), "rollingUpdate/maxSurge'"),
        (
            at("api.strategy.rollingUpdate.maxSurge", "0%"),
            "api.strategy.rollingUpdate: maxSurge and maxUnavailable are both 0",
        ),
        (at("imagePullSecrets", [{"names": "a"}]), "'/imagePullSecrets/0'"),
        (at("image.registry", "https://registry.example"), "'/image/registry'"),
        (at("kafka.sasl.mechanism", "GSSAPI"), "'/kafka/sasl/mechanism'"),
        (
            at("kafka.sasl.mechanism", "PLAIN"),
            "kafka.sasl.mechanism requires kafka.users or kafka.sasl.existingSecret.name",
        ),
        (
            at("kafka.tls.clientCertificate.existingSecret.name", "a"),
            "kafka.tls.clientCertificate.existingSecret.name requires kafka.tls.enabled",
        ),
        (
            at(
                "kafka",
                {
                    "users": {"api": "a", "consumer": "b", "operator": "c"},
                    "sasl": {"existingSecret": {"name": "d"}},
                },
            ),
            "kafka.users and kafka.sasl.existingSecret.name are both set",
        ),
        *(
            (at(f"api.service.{key}", value), f"api.service.{key} requires api.service.type ")
            for key, value in (
                ("loadBalancerClass", "a"),
                ("loadBalancerSourceRanges", ["192.0.2.0/24"]),
                ("externalTrafficPolicy", "Local"),
            )
        ),
        (at("api.httpRoute.enabled", True), "api.httpRoute.enabled requires api.httpRoute.parent"),
        (at("networkPolicies.collector.port", 1), "additional properties 'port' not allowed"),
        (
            at("networkPolicies.redis.port", 6380),
            "networkPolicies.redis.port is 6380, but the address has port 6379: remove the value",
        ),
        (
            {
                "kafka": {"bootstrap": "a:9092,b:9094"},
                "networkPolicies": {"kafka": {"port": 9092}},
            },
            "networkPolicies.kafka.port is 9092, but the address has port 9092,9094",
        ),
        (at("api.resources.requests.memory", "lots"), "'/api/resources/requests/memory'"),
        (at("api.image.digest", "sha256:1"), "'/api/image/digest'"),
        (at("api.service.type", "ExternalName"), "'/api/service/type'"),
        (at("api.preStopSeconds", 0), "'/api/preStopSeconds'"),
        (at("api.podLabels", {"a b": "c"}), "'/api/podLabels'"),
        (at("consumer.autoscaling.by", "both"), "'/consumer/autoscaling/by'"),
        (at("operator.replicas", 2), "'/operator': additional properties 'replicas' not allowed"),
        (at("operator.namespaces", "all"), "'/operator/namespaces'"),
        (at("nameOverride", "a"), "additional properties 'nameOverride' not allowed"),
        (at("operator.items", ["shop-"]), "'/operator/items'"),
        (at("operator.items", {"Shop": "shop-"}), "'/operator/items'"),
        (at("operator.items", {"shop": "a,b"}), "'/operator/items/shop'"),
        (at("operator.items", {"shop": ""}), "'/operator/items/shop'"),
        (
            at("operator.strategy.rollingUpdate.maxSurge", 0),
            "operator.strategy.rollingUpdate: maxSurge and maxUnavailable are both 0",
        ),
        (at("redis.url", "http://redis"), "redis.url must have the form "),
        (at("kafka.bootstrap", "kafka"), "kafka.bootstrap must have the form "),
        (at("database.url", "mysql://x"), "database.url must have the form "),
        (at("kafka.users", None), "at '/kafka': missing property 'users'"),
        (at("redis", None), "at '': missing property 'redis'"),
        (at("api.resources", None), "at '/api': missing property 'resources'"),
        (at("tracing.ratio", None), "at '/tracing': missing property 'ratio'"),
        (at("global.imageRegistry", "a"), "'/global': additional properties 'imageRegistry' not"),
        *(
            (at(path, {label: "x"}), f"{path}: the chart sets the label {label}")
            for path, label in (
                ("commonLabels", "app.kubernetes.io/name"),
                ("commonLabels", "helm.sh/chart"),
                ("api.podLabels", "app.kubernetes.io/component"),
                ("operator.podLabels", "app.kubernetes.io/instance"),
                ("podMonitors.labels", "app.kubernetes.io/version"),
            )
        ),
        (
            at("commonAnnotations", {"helm.sh/hook": "pre-install"}),
            "commonAnnotations: the chart sets the annotation helm.sh/hook",
        ),
        *(
            (at("engine", name), "'/engine'")
            for name in ("1", "-a", "a-", "Shop", "a.b", "a" * 64, 1)
        ),
        (
            at("fullnameOverride", "7"),
            "fullnameOverride is required: the release's full name 7 cannot name a Service",
        ),
        *(
            (
                merged(switch, at(f"{component}.resources.requests.cpu", None)),
                f"requires {component}.resources.requests.cpu, because",
            )
            for component, switch in (("api", API_SCALES), ("consumer", BY_CPU))
        ),
        (
            at("redis.existingSecret.apiKey", "api-url"),
            "redis.existingSecret.apiKey requires redis.existingSecret.name",
        ),
        *(
            (at("consumer.image.repository", name), "'/consumer/image/repository'")
            for name in ("shop/api:v1", "registry.example:5000/api:v1", "api:80", "api@sha256:0")
        ),
        *((at("tracing.ratio", ratio), "'/tracing/ratio'") for ratio in ("1.5", "half", "")),
        *(
            (at(path, address), f"{path} must have the form ")
            for path, address in (
                ("redis.url", "redis://u:s3cr/et@h:6379/0"),
                ("redis.url", "redis://u:s3cr#et@h:6379/0"),
                ("kafka.bootstrap", "u:s3cret@h:9092"),
                ("tracing.endpoint", "https://u:s3cr/et@h:4318"),
                ("identity.jwksUrl", "https://u:s3cr et@h"),
            )
        ),
        (
            at("database.url", "postgresql:///d?user=u&password=s3cret"),
            "database.url contains a password",
        ),
        (
            merged(at("redis.url", "redis://u:5/t@h:1"), at("networkPolicies.redis.port", 6379)),
            "redis.url must have the form ",
        ),
        (at("redis.url", "redis://redis:65536"), "redis.url must have the form "),
        (at("kafka.bootstrap", "kafka:0"), "kafka.bootstrap must have the form "),
        (at("tracing.endpoint", "http://collector:port"), "tracing.endpoint must have the form "),
        (at("api.ingress.host", "a..b"), "'/api/ingress/host'"),
        (at("prometheusRules.runbooks", "{{x}}"), "'/prometheusRules/runbooks'"),
        (at("redis.existingSecret.key", ".."), "'/redis/existingSecret/key'"),
        (at("podMonitors.interval", "often"), "'/podMonitors/interval'"),
        (at("networkPolicies.buyers", [{}]), "'/networkPolicies/buyers/0'"),
        (
            at("consumer.replicas", 13),
            "consumer.replicas is 13, but kafka.partitions is 12",
        ),
        (
            at("consumer.autoscaling", {"by": "lag", "maxReplicas": 13}),
            "consumer.autoscaling.maxReplicas is 13, but kafka.partitions is 12",
        ),
        (
            at("consumer.autoscaling", {"by": "cpu", "minReplicas": 7}),
            "consumer.autoscaling.minReplicas is greater than consumer.autoscaling.maxReplicas",
        ),
        (
            at("api.autoscaling", {"enabled": True, "minReplicas": 11}),
            "api.autoscaling.minReplicas is greater than api.autoscaling.maxReplicas",
        ),
        (
            at("identity.userHeader", "Idempotency-Key"),
            "identity.userHeader is Idempotency-Key, which clients or proxies send for another",
        ),
        (
            at("redis.url", "redis://:secret@redis:6379"),
            "redis.url contains a password: put the address into a Secret",
        ),
        (
            at(
                "database", {"url": "postgresql://u@h/d?password=x", "existingSecret": {"name": ""}}
            ),
            "database.url contains a password",
        ),
        (
            at(
                "database",
                {"url": "postgresql://u@h/d?sslpassword=x", "existingSecret": {"name": ""}},
            ),
            "database.url contains a password",
        ),
        *(
            (
                at("operator.extraEnv", [{"name": name, "value": value}]),
                f"operator.extraEnv: the value of {name} is a secret",
            )
            for name, value in (
                ("PGPASSWORD", "x"),
                ("FLASHSALE_KAFKA_PASSWORD", "x"),
                ("FLASHSALE_ORDER_TOKENS", "x"),
                ("OTEL_EXPORTER_OTLP_HEADERS", "x"),
                ("VAULT_TOKEN", "x"),
                ("CLIENT_SECRET", "x"),
                ("HTTPS_PROXY", "http://u:x@proxy:3128"),
            )
        ),
        (
            at("tracing.endpoint", "http://u:x@collector:4318"),
            "tracing.endpoint must have the form ",
        ),
        (at("identity.jwksUrl", "https://u:x@keys/a"), "identity.jwksUrl must have the form "),
        *(
            (
                at("database.url", f"postgresql://{address}"),
                f"database.url: asyncpg ignores the option {option} here",
            )
            for address, option in (
                ("u@h/d?port=6432", "port"),
                ("h:5432?sslmode=require&host=a", "host"),
                ("u@h/d?user=v", "user"),
                ("u@h/?dbname=e", "dbname"),
                ("u@h/d?sslmode=require&database=e", "database"),
            )
        ),
        (at("redis.url", ""), "redis.url or redis.existingSecret.name is required"),
        (
            at("redis.existingSecret.name", "redis"),
            "redis.url and redis.existingSecret.name are both set: set only one of them",
        ),
        (
            at("api.service.nodePort", 30080),
            "api.service.nodePort requires api.service.type NodePort or LoadBalancer",
        ),
        (at("kafka.users.api", "me"), "kafka.users: set all of api, consumer and operator, or"),
        (
            at("kafka.tls.existingSecret.name", "ca"),
            "kafka.tls.existingSecret.name requires kafka.tls.enabled",
        ),
        (at("kafka.topics.enabled", True), "kafka.topics.enabled requires kafka.topics.cluster"),
        (
            at("kafka.topics", {"enabled": True, "cluster": "a", "replicas": 1}),
            "kafka.topics.minInSyncReplicas is greater than kafka.topics.replicas",
        ),
        (
            at("operator", {"allNamespaces": True, "namespaces": ["a"]}),
            "operator.allNamespaces and operator.namespaces are both set: set only one of them",
        ),
        (
            at("api.ingress.tlsSecretName", "a"),
            "api.ingress.tlsSecretName requires api.ingress.host",
        ),
        (
            merged(
                at("image.registry", "registry.example"),
                at("consumer.image.repository", "localhost:5000/consumer"),
            ),
            "consumer.image.repository names the registry localhost:5000, and image.registry is",
        ),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(chart: Helm, values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused) as refused:
        chart.render(values)
    assert message in str(refused.value)
    for part in ("secret@", "s3cr", "port 5"):
        assert part not in str(refused.value)
    assert "nil pointer" not in str(refused.value)


def test_all_wrong_values_are_reported_together(chart: Helm) -> None:
    with pytest.raises(Refused) as refused:
        chart.render_only({"consumer": {"replicas": 100}})
    for value in ("redis.url", "kafka.bootstrap", "database.url", "consumer.replicas"):
        assert f"- {value}" in str(refused.value)


def test_one_consumer_per_partition_is_allowed(chart: Helm) -> None:
    assert chart.render(at("consumer.replicas", 12))
    assert chart.render(at("consumer.replicas", 24), at("kafka.partitions", 24))
    # The limits of autoscaling do not matter while it is off.
    assert chart.render(at("consumer.autoscaling.maxReplicas", 100))


def test_a_limit_of_the_cpu_is_also_its_request(chart: Helm) -> None:
    resources = {"requests": {"cpu": None}, "limits": {"cpu": 1}}
    assert chart.render(API_SCALES, at("api.resources", resources))


@pytest.mark.parametrize("name", ["a", "shop/api", "localhost:5000/api", "r.example:443/a_b/c.d"])
def test_a_registry_of_an_image_may_have_a_port(chart: Helm, name: str) -> None:
    rendered = chart.render(at("api.image", {"repository": name, "tag": "v1"}))
    assert rendered.container("api")["image"] == f"{name}:v1"


@pytest.mark.parametrize("ratio", ["0", "0.5", ".5", "1.0"])
def test_a_ratio_may_be_text_because_helm_set_gives_text(chart: Helm, ratio: str) -> None:
    rendered = chart.render(TRACING, at("tracing.ratio", ratio))
    given = rendered.environment("api")["OTEL_TRACES_SAMPLER_ARG"]
    assert Sampling.of({"OTEL_TRACES_SAMPLER_ARG": given}).ratio == float(ratio)


def test_an_option_of_the_database_that_nothing_hides_is_allowed(chart: Helm) -> None:
    url = "postgresql://db.example:6432?user=u&dbname=d&application_name=port"
    assert chart.render(at("database", {"url": url, "existingSecret": {"name": ""}}))


def test_a_kubernetes_older_than_1_30_is_refused(chart: Helm) -> None:
    with pytest.raises(Refused, match=r"incompatible with Kubernetes v1[.]29"):
        chart.run("template", "x", str(CHART), "--kube-version", "1.29.9", values=ADDRESSES)
    chart.run("template", "x", str(CHART), "--kube-version", "1.30.1-gke.100", values=ADDRESSES)
