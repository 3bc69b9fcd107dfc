"""The rendered objects follow the conventions for labels, names, pods and Secrets."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

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
from tests.support.chart_options import (
    API_SCALES,
    AUTHORITY,
    BY_CPU,
    BY_LAG,
    EVERYWHERE,
    INGRESS,
    MONITORS,
    POLICIES,
    TLS,
    TOPICS,
    USERS,
)
from tests.support.paths import CHART

KUBERNETES_LABELS: Final = {
    f"app.kubernetes.io/{name}"
    for name in ("name", "instance", "component", "version", "part-of", "managed-by")
} | {"helm.sh/chart"}


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
        assert (
            rendered.one("NetworkPolicy", component)["spec"]["podSelector"]["matchLabels"]
            == selector
        )
        monitor = rendered.one("PodMonitor", component)
        assert monitor["spec"]["selector"]["matchLabels"] == selector
    assert (
        rendered.one("Service", "api")["spec"]["selector"]["app.kubernetes.io/component"] == "api"
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [(("a", "shop"), ("b", "shop")), (("shop", "eu"), ("shop-eu", "flashsale"))],
)
@pytest.mark.parametrize(
    "operator", [{"namespaces": ["there"]}, {"allNamespaces": True}], ids=["one", "all"]
)
def test_two_releases_have_only_the_crd_in_common(
    chart: Helm, first: tuple[str, str], second: tuple[str, str], operator: dict[str, Any]
) -> None:
    def objects(namespace: str, release: str) -> set[tuple[str, str, str]]:
        values = merged(ADDRESSES, {"operator": operator})
        text = chart.run("template", release, str(CHART), "-n", namespace, values=values)
        rendered = Rendered.of(text)
        return {
            (each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"])
            for each in [*rendered.manifests, *rendered.hooks]
        }

    crd = ("CustomResourceDefinition", "", "flashsales.flashsale.dev")
    assert objects(*first) & objects(*second) == {crd}


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


@pytest.fixture
def notes(chart: Helm, tmp_path: Path) -> Callable[..., str]:
    """Return the text that `helm install` prints, rendered as an object of a copy of the chart."""
    copy = tmp_path / "flashsale"
    shutil.copytree(CHART, copy)
    text = (copy / "templates" / "NOTES.txt").read_text()
    (copy / "templates" / "_notes.tpl").write_text(f'{{{{ define "notes" }}}}{text}{{{{ end }}}}')
    (copy / "templates" / "notes.yaml").write_text('notes: {{ include "notes" . | toJson }}')
    command = ("template", RELEASE, str(copy), "-n", NAMESPACE, "--show-only=templates/notes.yaml")

    def rendered(*changes: dict[str, Any]) -> str:
        found = yaml.safe_load(chart.run(*command, values=merged(ADDRESSES, *changes)))
        return str(found["notes"])

    return rendered


def test_the_notes_name_an_item_that_the_namespace_may_sell(notes: Callable[..., str]) -> None:
    assert "spec: {itemId: iphone_15, stock: 100}" in notes()
    tenant = at("operator", {"namespaces": ["brand"], "items": {"brand": "brand-"}})
    assert "kubectl apply -n brand " in notes(tenant)
    assert "spec: {itemId: brand-iphone_15, stock: 100}" in notes(tenant)
    assert '"itemId":"brand-iphone_15"' in notes(tenant)


@pytest.mark.parametrize(
    "scaled", [at("api.autoscaling.enabled", True), at("consumer.autoscaling.by", "cpu")]
)
def test_the_notes_warn_of_autoscaling_and_of_uninstalling(
    notes: Callable[..., str], scaled: dict[str, Any]
) -> None:
    assert "Autoscaling is on" not in notes()
    assert "Never switch it on while a sale is open" in notes(scaled)
    assert f"kubectl delete flashsales --all -n {NAMESPACE}" in notes()


@pytest.mark.parametrize(
    ("opened", "peers"),
    [
        (at("orders.existingSecret.name", "tokens"), "networkPolicies.orders"),
        (at("podMonitors.enabled", True), "networkPolicies.prometheus"),
    ],
)
def test_the_notes_warn_of_a_port_that_no_pod_may_use(
    notes: Callable[..., str], opened: dict[str, Any], peers: str
) -> None:
    warning = f"because network policies are on and {peers} is empty"
    policies, known = at("networkPolicies.enabled", True), at(peers, [{"podSelector": {}}])
    assert warning in notes(opened, policies)
    for silent in ((opened,), (policies,), (opened, policies, known)):
        assert "network policies are on" not in notes(*silent)


def test_the_notes_warn_if_every_pod_may_name_a_user(notes: Callable[..., str]) -> None:
    warning = "Any pod may name any user in the header x-user"
    header = at("identity.userHeader", "x-user")
    policies = at("networkPolicies.enabled", True)
    gateway = at("networkPolicies.buyers", [{"podSelector": {}}])
    for open_to_all in ((header,), (header, policies), (header, gateway)):
        assert warning in notes(*open_to_all)
    for closed in ((), (policies,), (header, policies, gateway)):
        assert "may name any user" not in notes(*closed)


def test_the_notes_delete_the_flashsales_of_every_served_namespace(
    notes: Callable[..., str],
) -> None:
    def commands(operator: dict[str, Any]) -> list[str]:
        lines = notes({"operator": operator}).splitlines()
        return [line.strip() for line in lines if "kubectl delete" in line]

    delete = "kubectl delete flashsales --all"
    assert commands({}) == [f"{delete} -n {NAMESPACE}"]
    assert commands({"namespaces": ["a", "b"]}) == [f"{delete} -n a", f"{delete} -n b"]
    assert commands({"allNamespaces": True}) == [f"{delete} --all-namespaces"]


TOKENS: Final = {"jwksUrl": "https://login.example/keys", "issuer": "a", "audience": "b"}


@pytest.mark.parametrize(
    ("identity", "header", "body"),
    [
        ({}, "", '"userId":"user1",'),
        ({"userHeader": "x-user"}, " -H 'x-user: user1'", '"userId":"user1",'),
        (TOKENS, " -H 'Authorization: Bearer TOKEN'", ""),
    ],
)
def test_the_notes_name_the_buyer_as_the_api_expects_it(
    notes: Callable[..., str], identity: dict[str, str], header: str, body: str
) -> None:
    data = f'{{{body}"itemId":"iphone_15","quantity":1}}'
    expected = f"'Content-Type: application/json'{header} -d '{data}'"
    assert expected in notes({"identity": identity})


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


def test_helm_test_reaches_the_ledger_with_the_operators_own_variables(chart: Helm) -> None:
    password = {"secretKeyRef": {"name": "ledger", "key": "password"}}
    own = [{"name": "PGPASSWORD", "valueFrom": password}, {"name": "API", "value": "other"}]
    rendered = chart.render(at("operator.extraEnv", own))
    (pod,) = (each for each in rendered.hooks if each["kind"] == "Pod")
    for container in (*pod["spec"]["initContainers"], *pod["spec"]["containers"]):
        names = [each["name"] for each in container["env"]]
        assert len(set(names)) == len(names)
        assert own[0] in container["env"]
    assert own[1] not in pod["spec"]["containers"][0]["env"]


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
    rendered = chart.render({"fullnameOverride": "a" * 63}, BY_LAG)
    names = [each["metadata"]["name"] for each in rendered.all("Deployment")]
    assert len(set(names)) == 3
    (scaled,) = rendered.all("ScaledObject")
    names.append(scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["name"])
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
        (USERS, "scram_sha512", []),
        (merged(TLS, USERS), "scram_sha512", []),
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
    given = authentication["spec"]
    parameters = [each["parameter"] for each in given.get("env", [])]
    assert parameters == (["username", "password"] if sasl else [])
    known = rendered.environment("consumer")
    assert all(each["name"] in known for each in given.get("env", []))
    found = given.get("secretTargetRef", [])
    assert [(each["parameter"], each["name"], each["key"]) for each in found] == secrets


def test_the_consumer_can_change_between_keda_and_a_plain_autoscaler(chart: Helm) -> None:
    (plain,) = chart.render(BY_CPU).all("HorizontalPodAutoscaler")
    (scaled,) = chart.render(BY_LAG).all("ScaledObject")
    # Helm creates the new object before it deletes the old one. KEDA refuses a ScaledObject of a
    # Deployment with another autoscaler unless that one has this annotation.
    assert plain["metadata"]["annotations"] == {"validations.keda.sh/hpa-ownership": "false"}
    made = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["name"]
    assert made != plain["metadata"]["name"]


@pytest.mark.parametrize(("changes", "tls"), [({}, None), (TLS, "enable"), (AUTHORITY, None)])
def test_keda_has_no_authentication_if_kafka_needs_no_credentials(
    chart: Helm, changes: dict[str, Any], tls: str | None
) -> None:
    rendered = chart.render(BY_LAG, changes)
    assert not rendered.all("TriggerAuthentication")
    (trigger,) = rendered.all("ScaledObject")[0]["spec"]["triggers"]
    assert "authenticationRef" not in trigger
    assert trigger["metadata"].get("tls") == tls
