"""The chart, the Dockerfiles and the code agree with each other."""

import inspect
import re
import tomllib
from typing import Any, Final

import msgspec
import pytest
import yaml

import flashsale
import flashsale_api.app as api_app
import flashsale_api.servers as api_servers
import flashsale_consumer.app as consumer_app
import flashsale_operator.app as operator_app
from dev.images.building import DEPLOYABLES
from flashsale import events, kafka_clients, tracing
from flashsale.errors import SettingsError
from flashsale.settings import PREFIX, host_and_port, load
from flashsale_api.settings import OTHER_HEADERS
from flashsale_api.settings import Settings as ApiSettings
from flashsale_consumer.settings import Settings as ConsumerSettings
from flashsale_operator.settings import Settings as OperatorSettings
from tests.support.chart import COMPONENTS, Helm, Rendered
from tests.support.paths import CHART, CRD, ROOT

SETTINGS: Final[dict[str, type[msgspec.Struct]]] = {
    "api": ApiSettings,
    "consumer": ConsumerSettings,
    "operator": OperatorSettings,
}
APPS: Final = {"api": api_app, "consumer": consumer_app, "operator": operator_app}
MARGIN_SECONDS: Final = 5

each_component = pytest.mark.parametrize("component", COMPONENTS)


def default_ports(component: str) -> set[int]:
    """Return the ports on which a component listens by default."""
    return {
        host_and_port(str(field.default))[1]
        for field in msgspec.structs.fields(SETTINGS[component])
        if field.name.endswith("listen")
    }


def dockerfile(component: str) -> str:
    return (ROOT / DEPLOYABLES[component] / "Dockerfile").read_text()


@each_component
def test_a_pod_gets_all_required_settings_and_no_unknown_ones(
    plain: Rendered, component: str
) -> None:
    fields = msgspec.structs.fields(SETTINGS[component])
    known = {PREFIX + field.name.upper() for field in fields}
    required = {PREFIX + field.name.upper() for field in fields if field.required}
    given = set(plain.environment(component))
    assert required <= given <= known


def test_the_images_have_one_base_and_name_its_content() -> None:
    bases = set()
    for component in COMPONENTS:
        found = re.findall(
            r"^(?:ARG PYTHON_IMAGE=|FROM )(\S+)", dockerfile(component), re.MULTILINE
        )
        base, *stages = found
        assert set(stages) == {"${PYTHON_IMAGE}"}
        assert re.fullmatch(r"python:3\.\d+-slim@sha256:[0-9a-f]{64}", base)
        bases.add(base)
    assert len(bases) == 1


def test_the_chart_and_the_api_refuse_the_same_headers_as_a_users() -> None:
    rules = (CHART / "templates/_validate.tpl").read_text()
    names = re.search(r'\$others := splitList " " "(.*)"', rules)
    assert names is not None
    assert names[1] == OTHER_HEADERS
    environ = {"FLASHSALE_REDIS_URL": "redis://h", "FLASHSALE_KAFKA_BOOTSTRAP": "a:1"}
    for name in OTHER_HEADERS.split():
        with pytest.raises(SettingsError, match="FLASHSALE_USER_HEADER is a header that"):
            load(ApiSettings, environ | {"FLASHSALE_USER_HEADER": name.title()})


def test_an_engines_name_gives_the_names_of_its_topics_and_group(chart: Helm) -> None:
    changes = {
        "engine": "other",
        "kafka": {"topics": {"enabled": True, "cluster": "main"}},
        "consumer": {"autoscaling": {"by": "lag"}},
    }
    rendered = chart.render(changes)
    names = {each["metadata"]["name"] for each in rendered.all("KafkaTopic")}
    assert names == {
        events.topic("other"),
        events.dead_letter_topic("other"),
        events.recorded_topic("other"),
    }
    trigger = rendered.one("ScaledObject", "consumer")["spec"]["triggers"][0]["metadata"]
    assert trigger["topic"] == events.topic("other")
    assert trigger["consumerGroup"] == events.consumer_group("other")


@pytest.mark.parametrize(
    ("section", "key", "kind", "accepted", "refused"),
    [
        (
            "redis",
            "url",
            OperatorSettings,
            [
                "redis://h",
                "redis://h/",
                "rediss://u@h:6380/3",
                "redis://[::1]:1/0",
                "redis://h?db=1",
            ],
            [
                "redis://",
                "redis://h:0",
                "redis://h#x",
                "redis://u@v@h",
                "redis://h/x",
                "redis://h?x",
            ],
        ),
        (
            "kafka",
            "bootstrap",
            ConsumerSettings,
            ["a:1", "a:1,b.c:65535", "[::1]:9092", "[fe80::1]:1,a:2"],
            ["a", "a:0", "a:1, b:2", "::1:9092", "[::1]", "http://a:1", "a:1#x", "a:65536"],
        ),
        (
            "database",
            "url",
            ConsumerSettings,
            ["postgres://u@h/d", "postgresql://u@a:1,[::1]:2/d?sslmode=require", "postgres://u@h"],
            ["mysql://h/d", "postgres://u@h:x/d", "postgres://u@h/d#x", "postgres://u@v@h/d"],
        ),
        (
            "identity",
            "jwksUrl",
            ApiSettings,
            ["https://h", "http://h:65535/", "https://[::1]:1/keys?a=b@c#d"],
            ["h", "ftp://h", "https://h:0", "https://h:65536/", "https://u:p@h/", "https://h/a b"],
        ),
    ],
)
def test_the_chart_accepts_the_addresses_that_a_process_accepts(
    section: str, key: str, kind: type[msgspec.Struct], accepted: list[str], refused: list[str]
) -> None:
    forms = yaml.safe_load((CHART / "files/addresses.yaml").read_text())
    pattern = forms[f"{section}.{key}"]["pattern"]
    environ = {
        "FLASHSALE_REDIS_URL": "redis://h",
        "FLASHSALE_KAFKA_BOOTSTRAP": "a:1",
        "FLASHSALE_DATABASE_URL": "postgres://u@h/d",
        "FLASHSALE_JWT_ISSUER": "a",
        "FLASHSALE_JWT_AUDIENCE": "b",
        "FLASHSALE_JWKS_URL": "https://h",
    }
    named = f"{section.upper()}_{key.upper()}"
    variable = f"FLASHSALE_{'JWKS_URL' if key == 'jwksUrl' else named}"
    for address in accepted:
        assert re.search(pattern, address), address
        load(kind, environ | {variable: address})
    for address in refused:
        assert not re.search(pattern, address), address
        with pytest.raises(SettingsError):
            load(kind, environ | {variable: address})


@each_component
def test_a_container_exposes_the_ports_of_its_process(chart: Helm, component: str) -> None:
    rendered = chart.render({"orders": {"existingSecret": {"name": "tokens"}}})
    ports = {each["containerPort"] for each in rendered.container(component)["ports"]}
    assert ports == default_ports(component)


@each_component
def test_probes_use_paths_that_the_process_serves(plain: Rendered, component: str) -> None:
    container = plain.container(component)
    probes = [container[f"{name}Probe"] for name in ("startup", "liveness")]
    ready = container["readinessProbe"]
    live = ("/metrics", "metrics") if component == "api" else ("/healthz", "http")
    assert {(each["httpGet"]["path"], each["httpGet"]["port"]) for each in probes} == {live}
    assert ready["httpGet"]["path"] == "/readyz"
    names = {each["name"] for each in container["ports"]}
    assert {each["httpGet"]["port"] for each in [*probes, ready]} <= names
    for path in ("/healthz", "/readyz"):
        assert f'"{path}"' in inspect.getsource(APPS[component])


def test_the_grace_period_covers_a_complete_shutdown(plain: Rendered) -> None:
    found = re.search(r"timeout_graceful_shutdown=(\d+)", inspect.getsource(api_servers))
    assert found is not None
    spec = plain.pod("api")["spec"]
    sleep = plain.container("api")["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = sleep + int(found[1]) + api_app.FLUSH_SECONDS + MARGIN_SECONDS
    assert spec["terminationGracePeriodSeconds"] == needed

    # A client that is starting. Then the announcer's clients, the group membership, the group's
    # client, the dead-letter producer and the ledger's pool.
    waits = 1 + 5
    needed = waits * kafka_clients.CLOSE_SECONDS + tracing.CLOSE_SECONDS + MARGIN_SECONDS
    assert plain.pod("consumer")["spec"]["terminationGracePeriodSeconds"] == needed


def test_the_operators_role_has_the_rules_of_its_file(plain: Rendered) -> None:
    rules = yaml.safe_load((CHART / "files/operator-rules.yaml").read_text())
    assert plain.one("Role", "operator")["rules"] == rules["namespaced"]


def test_the_installed_crd_is_the_file(plain: Rendered) -> None:
    (rendered,) = plain.all("CustomResourceDefinition")
    file = yaml.safe_load(CRD.read_text())
    assert rendered["spec"] == file["spec"]
    assert rendered["metadata"]["name"] == file["metadata"]["name"]


def test_all_times_in_the_crd_have_the_same_format() -> None:
    formats = re.findall(r"matches\('(\^\(2[^']*)'\)", CRD.read_text())
    assert len(formats) == 3
    assert len(set(formats)) == 1


@each_component
def test_the_chart_uses_the_image_name_of_the_dockerfile(component: str) -> None:
    values: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values[component]["image"]["repository"] == f"flashsale/{component}"
    assert f"-t flashsale/{component} ." in dockerfile(component).splitlines()[0]


@each_component
def test_an_image_runs_only_its_own_package_as_an_unprivileged_user(component: str) -> None:
    text = dockerfile(component)
    assert f'ENTRYPOINT ["python3", "-m", "flashsale_{component}"]' in text
    assert re.findall(r"^USER (.*)", text, re.MULTILINE) == ["65532:65532"]
    exposed = re.findall(r"^EXPOSE (.*)", text, re.MULTILINE)
    assert {int(port) for port in exposed[0].split()} == default_ports(component)
    copied = re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE)
    own = str(DEPLOYABLES[component])
    assert copied == [
        f"{own}/requirements.txt",
        "src/flashsale",
        f"{own}/flashsale_{component}",
    ]


def test_all_images_have_the_same_base_named_by_its_digest() -> None:
    found = [
        re.findall(r"^ARG PYTHON_IMAGE=(.+)$", dockerfile(each), re.MULTILINE)
        for each in COMPONENTS
    ]
    assert [len(each) for each in found] == [1] * len(COMPONENTS)
    bases = {base for (base,) in found}
    assert len(bases) == 1
    assert re.fullmatch(r"python:[\d.]+-slim@sha256:[0-9a-f]{64}", bases.pop())


def test_the_servers_of_the_manifests_are_images_named_by_their_digest() -> None:
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "k8s").rglob("*.yaml")):
        for name, tag in re.findall(r"^ *image: ([^:\s]+):(\S+)$", file.read_text(), re.MULTILINE):
            found.setdefault(name, set()).add(tag)
    assert found.pop("flashsale/operator")
    assert sorted(found) == ["haproxy", "postgres", "redis"]
    for name, tags in found.items():
        (tag,) = tags
        assert re.fullmatch(r"[\w.-]+@sha256:[0-9a-f]{64}", tag), name


def test_the_project_the_chart_and_the_images_have_the_same_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == project == flashsale.__version__
    for component in COMPONENTS:
        assert f"ARG VERSION={project}\n" in dockerfile(component)


def test_the_charts_entry_in_a_catalogue_describes_the_license_and_the_crd() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    crd = yaml.safe_load(CRD.read_text())
    entry = yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"]
    assert entry["artifacthub.io/license"] == project["license"]
    (listed,) = yaml.safe_load(entry["artifacthub.io/crds"])
    (version,) = crd["spec"]["versions"]
    assert (listed["kind"], listed["name"]) == (
        crd["spec"]["names"]["kind"],
        crd["metadata"]["name"],
    )
    assert listed["version"] == version["name"]
