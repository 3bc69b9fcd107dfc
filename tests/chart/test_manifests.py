"""The manifests of k8s and loadtest are valid and match the chart's values.

A real kube-apiserver checks them, and a real k6 its scripts.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from dev.cluster.control_plane import ControlPlane
from tests.support.chart import COMPONENTS, Helm, Manifest, Rendered, merged
from tests.support.manifests import documents, selects
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

K8S: Final = ROOT / "k8s"
VALUES: Final = K8S / "values"
LOADTEST: Final = ROOT / "loadtest"
# The names of the engine in k8s/values.
TOPIC: Final = "flashsale.reservations"
RECORDED: Final = "flashsale.recorded"
GROUP: Final = "flashsale-ledger"
TOPOLOGIES: Final = {
    "one node": [VALUES / "one-node.yaml"],
    "kind": [VALUES / "one-node.yaml", VALUES / "kind.yaml"],
    "highly available": [VALUES / "highly-available.yaml"],
    "a Redis Cluster": [VALUES / "highly-available.yaml", VALUES / "redis-cluster.yaml"],
}
# tests/cluster checks the samples.
FILES: Final = sorted(
    path.relative_to(ROOT)
    for folder in (K8S, LOADTEST)
    for path in folder.rglob("*.yaml")
    if path.parent.name not in ("samples", "values")
)

each_file = pytest.mark.parametrize("file", FILES, ids=str)
each_gateway = pytest.mark.parametrize("gateway", ["envoy-gateway", "ingress-nginx", "istio"])
each_topology = pytest.mark.parametrize("files", TOPOLOGIES.values(), ids=TOPOLOGIES)


def all_of(kind: str, folder: str) -> dict[str, Manifest]:
    """Return a folder's manifests of one kind by name."""
    return {
        each["metadata"]["name"]: each
        for file in FILES
        if file.parts[:-1] == Path(folder).parts
        for each in documents(file)
        if each["kind"] == kind
    }


def refused(
    cluster: ControlPlane, namespace: str, manifests: list[Manifest], verb: str = "apply"
) -> str:
    """Return the API server's errors and warnings about the manifests, "" if there are none."""
    command = [verb, "--dry-run=server", "--validate=strict", "--warnings-as-errors"]
    if verb == "apply":
        command.append("--server-side")
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    done = cluster.kubectl(*command, "-n", namespace, "-f", "-", stdin=listed)
    assert done.returncode or done.stdout.count("(server dry run)") == len(manifests)
    return done.stderr


@each_file
def test_the_api_server_accepts_every_manifest_without_a_warning(
    cluster: ControlPlane, namespace: str, file: Path
) -> None:
    assert refused(cluster, namespace, documents(file)) == ""


def test_the_api_server_refuses_a_misspelled_field(cluster: ControlPlane, namespace: str) -> None:
    for file in FILES:
        manifest = documents(file)[-1]
        manifest.get("spec", manifest)["sepc"] = 1
        assert "sepc" in refused(cluster, namespace, [manifest]), file


@each_file
def test_pods_pass_the_restricted_standard(
    cluster: ControlPlane, namespace: str, file: Path
) -> None:
    """Create the pod of each template directly, because no controller runs here."""
    pods: list[Manifest] = []
    for each in documents(file):
        if each["kind"] not in ("Deployment", "StatefulSet", "Job"):
            continue
        template = each["spec"]["template"]
        claims = each["spec"].get("volumeClaimTemplates", [])
        names = [claim["metadata"]["name"] for claim in claims]
        spec = dict(template["spec"])
        spec["volumes"] = [
            *spec.get("volumes", []),
            *({"name": name, "persistentVolumeClaim": {"claimName": name}} for name in names),
        ]
        metadata = {**template["metadata"], "name": each["metadata"]["name"]}
        pods.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    if pods:
        assert refused(cluster, namespace, pods, "create") == ""


def pod(name: str, context: object, containers: dict[str, object]) -> Manifest:
    """Return a pod with these security contexts: its own, and those of its containers by name."""
    spec = {
        "securityContext": context,
        "containers": [
            {"name": each.lower(), "image": "any", "securityContext": of}
            for each, of in containers.items()
        ],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def made_by_strimzi(file: Path) -> list[Manifest]:
    """Return pods with the security contexts that Strimzi takes from a file.

    By default it adds none (STRIMZI_POD_SECURITY_PROVIDER_CLASS).
    """
    listed = documents(file)
    (kafka,) = (each["spec"] for each in listed if each["kind"] == "Kafka")
    operators = [f"{each}Container" for each in kafka["entityOperator"] if each != "template"]
    nodes = ["kafkaContainer", *(["initContainer"] if "rack" in kafka["kafka"] else [])]
    templates = {
        each["metadata"]["name"]: (each["spec"].get("template", {}), nodes)
        for each in listed
        if each["kind"] == "KafkaNodePool"
    }
    templates["entity-operator"] = (kafka["entityOperator"].get("template", {}), operators)
    return [
        pod(
            name,
            template.get("pod", {}).get("securityContext"),
            {each: template.get(each, {}).get("securityContext") for each in containers},
        )
        for name, (template, containers) in templates.items()
    ]


@pytest.mark.parametrize("file", ["k8s/kafka/one-node.yaml", "k8s/kafka/three-brokers.yaml"])
def test_strimzis_pods_pass_the_restricted_standard(
    cluster: ControlPlane, namespace: str, file: str
) -> None:
    assert refused(cluster, namespace, made_by_strimzi(Path(file)), "create") == ""


def test_the_pod_of_prometheus_passes_the_restricted_standard(
    cluster: ControlPlane, namespace: str
) -> None:
    """The Prometheus operator sets only the security contexts of the containers."""
    (prometheus,) = all_of("Prometheus", "k8s/observability").values()
    container = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    made = pod("prometheus", prometheus["spec"].get("securityContext"), {"prometheus": container})
    assert refused(cluster, namespace, [made], "create") == ""


def rendered(chart: Helm, files: list[Path]) -> Rendered:
    return chart.render_only(merged(*(yaml.safe_load(file.read_text()) for file in files)))


@each_topology
def test_the_chart_renders_valid_manifests_for_each_topology(
    chart: Helm, cluster: ControlPlane, namespace: str, files: list[Path]
) -> None:
    manifests = [each for each in rendered(chart, files).manifests if each["kind"] != "FlashSale"]
    for each in manifests:
        if "namespace" in each["metadata"]:
            each["metadata"]["namespace"] = namespace
    assert refused(cluster, namespace, manifests) == ""


@each_gateway
def test_a_gateway_names_the_user_in_the_header_that_the_api_trusts(
    chart: Helm, cluster: ControlPlane, namespace: str, gateway: str
) -> None:
    made = rendered(chart, [VALUES / "one-node.yaml", VALUES / f"{gateway}.yaml"])
    routes = [*made.all("HTTPRoute"), *made.all("Ingress")]
    for each in routes:
        each["metadata"]["namespace"] = namespace
    assert refused(cluster, namespace, routes) == ""
    header = made.environment("api")["FLASHSALE_USER_HEADER"]
    policies = {each["kind"]: each["spec"] for each in gateway_policies(gateway)}
    if gateway == "ingress-nginx":
        annotations = made.one("Ingress", "api")["metadata"]["annotations"]
        set_by_gateway = annotations["nginx.ingress.kubernetes.io/auth-response-headers"]
    else:
        route = made.one("HTTPRoute", "api")
        gateways = {"Gateway": {each["name"] for each in route["spec"]["parentRefs"]}}
        targets = gateways | {"HTTPRoute": {route["metadata"]["name"]}}
        for spec in policies.values():
            (target,) = spec["targetRefs"]
            assert target["name"] in targets[target["kind"]]
        if gateway == "istio":
            (rule,) = policies["RequestAuthentication"]["jwtRules"]
            (claim,) = rule["outputClaimToHeaders"]
            (denied,) = policies["AuthorizationPolicy"]["rules"][0]["to"]
            assert set(route["spec"]["hostnames"]) < set(denied["operation"]["hosts"])
        else:
            (provider,) = policies["SecurityPolicy"]["jwt"]["providers"]
            (claim,) = provider["claimToHeaders"]
            early = policies["ClientTrafficPolicy"]["headers"]["earlyRequestHeaders"]
            assert early == {"remove": [header]}
        assert claim["claim"] == "sub"
        set_by_gateway = claim["header"]
    assert set_by_gateway == header


@each_gateway
def test_only_the_gateway_reaches_an_api_that_trusts_its_header(chart: Helm, gateway: str) -> None:
    made = rendered(chart, [VALUES / "one-node.yaml", VALUES / f"{gateway}.yaml"])
    (rule,) = made.one("NetworkPolicy", "api")["spec"]["ingress"]
    allowed, test = rule["from"]  # the chart adds the pod of `helm test`
    assert allowed["podSelector"]["matchLabels"]
    assert test["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"


def gateway_policies(gateway: str) -> list[Manifest]:
    file = K8S / "gateways" / f"{gateway}.yaml"
    return documents(file.relative_to(ROOT)) if file.exists() else []


def secret_keys(rendered: Rendered) -> set[tuple[str, str]]:
    """Return the name and key of every Secret that a pod reads."""
    found = set()
    for component in COMPONENTS:
        given = rendered.environment(component).values()
        references = [each["secretKeyRef"] for each in given if isinstance(each, dict)]
        found |= {(each["name"], each["key"]) for each in references}
        for volume in rendered.pod(component)["spec"].get("volumes", []):
            secret = volume["secret"]
            found |= {(secret["secretName"], item["key"]) for item in secret["items"]}
    return found


def test_the_one_node_values_match_the_one_node_manifests(chart: Helm) -> None:
    release = rendered(chart, TOPOLOGIES["one node"])
    secrets = {
        (each["metadata"]["name"], key): value
        for each in documents(Path("k8s/development-secrets.yaml"))
        for key, value in each["stringData"].items()
    }
    assert secret_keys(release) <= secrets.keys()
    assert {name for name, _ in secret_keys(release)} == {name for name, _ in secrets}
    for name, port in (("redis", 6379), ("postgres", 5432)):
        users = {"url": "engine-password", "api-url": "api-password"}
        for url, key in users.items() if name == "redis" else [("url", "password")]:
            assert re.search(rf":{secrets[name, key]}@{name}:{port}/", secrets[name, url])
        services = documents(Path(f"k8s/{name}/one-node.yaml"))
        (service,) = (each for each in services if each["kind"] == "Service")
        assert service["metadata"]["name"] == name
        assert service["spec"]["ports"][0]["port"] == port
    kafka = documents(Path("k8s/kafka/one-node.yaml"))[0]
    (listener,) = kafka["spec"]["kafka"]["listeners"]
    bootstrap = f"{kafka['metadata']['name']}-kafka-bootstrap:{listener['port']}"
    assert release.environment("api")["FLASHSALE_KAFKA_BOOTSTRAP"] == bootstrap
    assert not listener["tls"]
    assert "FLASHSALE_KAFKA_TLS" not in release.environment("api")


def test_the_highly_available_values_match_the_highly_available_manifests(chart: Helm) -> None:
    release = rendered(chart, TOPOLOGIES["highly available"])
    users = {
        each["metadata"]["name"]
        for each in documents(Path("k8s/kafka/three-brokers.yaml"))
        if each["kind"] == "KafkaUser"
    }
    kafka = documents(Path("k8s/kafka/three-brokers.yaml"))[0]
    (listener,) = kafka["spec"]["kafka"]["listeners"]
    assert listener["tls"]
    assert listener["authentication"]["type"] == "scram-sha-512"
    for component in COMPONENTS:
        given = release.environment(component)
        name = kafka["metadata"]["name"]
        assert given["FLASHSALE_KAFKA_BOOTSTRAP"] == f"{name}-kafka-bootstrap:{listener['port']}"
        assert given["FLASHSALE_KAFKA_USER"] == f"flashsale-{component}"
    assert {name for name, key in secret_keys(release) if key == "password"} == users
    ledger = documents(Path("k8s/postgres/highly-available.yaml"))[0]
    assert (f"{ledger['metadata']['name']}-ca", "ca.crt") in secret_keys(release)
    assert (f"{name}-cluster-ca-cert", "ca.crt") in secret_keys(release)


def test_the_topics_fit_on_the_disks_of_the_brokers(chart: Helm) -> None:
    (pool,) = (
        each
        for each in documents(Path("k8s/kafka/three-brokers.yaml"))
        if each["kind"] == "KafkaNodePool" and "broker" in each["spec"]["roles"]
    )
    (volume,) = pool["spec"]["storage"]["volumes"]
    disk = int(volume["size"].removesuffix("Gi")) * 1024**3
    topics = rendered(chart, TOPOLOGIES["highly available"]).all("KafkaTopic")
    most = sum(
        each["spec"]["partitions"]
        * (each["spec"]["config"]["retention.bytes"] + each["spec"]["config"]["segment.bytes"])
        for each in topics
    )
    assert most < 0.8 * disk


@each_topology
def test_topics_have_one_copy_per_broker(chart: Helm, files: list[Path]) -> None:
    file = "three-brokers" if "highly" in files[0].name else "one-node"
    kafka = documents(Path(f"k8s/kafka/{file}.yaml"))
    (brokers,) = (
        each["spec"]["replicas"]
        for each in kafka
        if each["kind"] == "KafkaNodePool" and "broker" in each["spec"]["roles"]
    )
    topics = rendered(chart, files).all("KafkaTopic")
    assert {each["metadata"]["name"] for each in topics} == {
        TOPIC,
        f"{TOPIC}.dlq",
        RECORDED,
    }
    config = kafka[0]["spec"]["kafka"]["config"]
    for topic in topics:
        assert topic["metadata"]["labels"]["strimzi.io/cluster"] == kafka[0]["metadata"]["name"]
        assert topic["spec"]["replicas"] == brokers == config["default.replication.factor"]
        least = topic["spec"]["config"]["min.insync.replicas"]
        assert least == config["min.insync.replicas"] == (2 if brokers == 3 else 1)
        assert topic["spec"]["config"]["retention.ms"] >= 7 * 24 * 60 * 60 * 1000


def test_kafka_users_may_only_use_the_engines_topics_and_group() -> None:
    for user in all_of("KafkaUser", "k8s/kafka").values():
        for acl in user["spec"]["authorization"]["acls"]:
            resource = acl["resource"]
            assert resource.get("patternType", "literal") == "literal"
            assert resource["name"] in (TOPIC, f"{TOPIC}.dlq", RECORDED, GROUP)
            assert (resource["type"] == "group") == (resource["name"] == GROUP)
            assert not {"All", "Create", "Alter", "Delete"} & set(acl["operations"])


def containers(file: Path) -> list[Manifest]:
    templates = (each["spec"].get("template", {}) for each in documents(file) if "spec" in each)
    return [
        container
        for template in templates
        for container in template.get("spec", {}).get("containers", [])
    ]


@pytest.mark.parametrize(
    ("file", "port", "users"),
    [
        ("k8s/redis/one-node.yaml", {6379, "redis"}, {"api", "operator", "test"}),
        ("k8s/redis/highly-available.yaml", {6379}, {"api", "operator", "test"}),
        ("k8s/redis/cluster.yaml", {6379}, {"api", "operator", "test"}),
        ("k8s/postgres/one-node.yaml", {5432, "postgres"}, {"consumer", "operator", "test"}),
        ("k8s/postgres/highly-available.yaml", {5432}, {"consumer", "operator", "test"}),
        ("k8s/kafka/one-node.yaml", {9092}, {*COMPONENTS, "test"}),
        ("k8s/kafka/three-brokers.yaml", {9093}, {*COMPONENTS, "test"}),
    ],
)
def test_only_the_pods_that_use_a_server_may_connect_to_it(
    chart: Helm, file: str, port: set[object], users: set[str]
) -> None:
    release = rendered(chart, TOPOLOGIES["one node"])
    labels = {name: release.pod(name)["metadata"]["labels"] for name in COMPONENTS}
    (test,) = (each for each in release.hooks if each["kind"] == "Pod")
    labels |= {"test": test["metadata"]["labels"], "stranger": {"app": "shell"}}
    # These have the label part-of: flashsale, too.
    [labels["load test"]] = pods_labels("loadtest/job.yaml")
    [labels["PostgreSQL"]] = pods_labels("k8s/postgres/one-node.yaml")
    if "kafka" in file:
        (listener,) = documents(Path(file))[0]["spec"]["kafka"]["listeners"]
        rules = [{"ports": [{"port": listener["port"]}], "from": listener["networkPolicyPeers"]}]
    else:
        (policy,) = (each for each in documents(Path(file)) if each["kind"] == "NetworkPolicy")
        assert "Ingress" in policy["spec"]["policyTypes"]
        rules = policy["spec"]["ingress"]
        for server in pods_labels(file):
            assert selects(policy["spec"]["podSelector"], server)
    allowed = {
        name
        for name, own in labels.items()
        for rule in rules
        for peer in rule["from"]
        if port & {each["port"] for each in rule["ports"]}
        and "podSelector" in peer
        and selects(peer["podSelector"], own)
    }
    assert allowed == users


def pods_labels(file: str) -> list[dict[str, str]]:
    """Return the labels of a file's pods."""
    specs = (each["spec"] for each in documents(Path(file)) if "spec" in each)
    return [spec["template"]["metadata"]["labels"] for spec in specs if "template" in spec]


@each_file
def test_no_secret_is_an_argument_of_a_process(file: Path) -> None:
    for container in containers(file):
        secrets = [
            each["name"]
            for each in container.get("env", [])
            if "secretKeyRef" in each.get("valueFrom", {})
        ]
        lines = [*container.get("command", []), *container.get("args", [])]
        for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
            lines += container.get(probe, {}).get("exec", {}).get("command", [])
        for name in secrets:
            assert not [line for line in lines if name in line], f"{container['name']}: {name}"


@each_file
def test_no_manifest_assumes_the_clusters_domain(file: Path) -> None:
    assert "cluster.local" not in (ROOT / file).read_text()


def test_volumes_keep_the_permissions_that_the_servers_gave_them() -> None:
    sets = [
        each
        for file in [*FILES, Path("tests/e2e/kafka.yaml")]
        for each in documents(file)
        if each["kind"] == "StatefulSet"
    ]
    assert {each["metadata"]["name"] for each in sets} == {"redis", "postgres", "kafka"}
    for each in sets:
        context = each["spec"]["template"]["spec"]["securityContext"]
        assert context["fsGroupChangePolicy"] == "OnRootMismatch", each["metadata"]["name"]


def test_the_job_mounts_every_script_at_the_path_of_its_import() -> None:
    (job,) = documents(Path("loadtest/job.yaml"))
    spec: dict[str, Any] = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    top, lib = spec["volumes"][0]["projected"]["sources"]
    assert "items" not in top["configMap"]
    paths = {item["path"]: item["key"] for item in lib["configMap"]["items"]}
    assert paths == {f"lib/{path.name}": path.name for path in (LOADTEST / "lib").iterdir()}
    assert (LOADTEST / container["args"][-1]).exists()


@pytest.mark.parametrize("file", ["job.yaml", "testrun.yaml"])
def test_k6_gets_only_known_settings_and_buys_the_sample_sale(file: str) -> None:
    (manifest,) = documents(Path("loadtest") / file)
    spec = manifest["spec"]
    env = (spec["template"]["spec"]["containers"][0] if file == "job.yaml" else spec["runner"])[
        "env"
    ]
    given = {each["name"]: each.get("value") for each in env}
    sale = documents(Path("k8s/samples/iphone-15.yaml"))[0]["spec"]
    assert given["ITEM_ID"] == sale["itemId"]
    assert given["STOCK"] == str(sale["stock"])
    read = "".join(path.read_text() for path in LOADTEST.rglob("*.js"))
    assert all(re.search(rf"\b{name}\b", read) for name in given)


def test_the_archive_for_the_k6_operator_is_complete_and_reads_the_pods_settings(
    tmp_path: Path,
) -> None:
    """Pack and run it with the commands in testrun.yaml, against an address without a server."""
    k6 = str(Path(sys.executable).with_name("k6"))
    archive = tmp_path / "stampede.tar"
    for arguments, environment in (
        (["archive", "-e", "ITEM_ID=x", "-O", str(archive), str(LOADTEST / "stampede.js")], {}),
        (["run", str(archive)], {"ITEM_ID": "other", "API_URL": "http://127.0.0.1:1"}),
    ):
        done = subprocess.run(
            [k6, *arguments],
            env={**os.environ, "K6_NO_USAGE_REPORT": "true", **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert "GET /sales/other had no answer: set API_URL, which is http://127.0.0.1:1" in done.stderr
    assert done.returncode != 0


def test_the_comment_of_the_k6_operators_test_names_the_settings_that_an_archive_fixes(
    tmp_path: Path,
) -> None:
    """k6 takes the options of an archive from the time of its packing."""
    k6 = str(Path(sys.executable).with_name("k6"))
    archive = str(tmp_path / "stampede.tar")

    def options(*arguments: str) -> str:
        done = subprocess.run([k6, *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    script = str(LOADTEST / "stampede.js")
    options("archive", "-e", "ITEM_ID=x", "-O", archive, script)
    values = {"DURATION": "7s", "API_URL": "http://x", "RUN": "x", "TOKEN_URL": "http://x"}
    read = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*\b", _head(script)))
    known = {"STOCK", "RATE", "DURATION", "VUS", "MAX_VUS", "P95_MS", "API_URL", "RUN", "TOKEN_URL"}
    assert known <= read
    fixed = set()
    for name in known:
        change = ("-e", f"{name}={values.get(name, '150')}")
        assert options("inspect", *change, archive) == options("inspect", archive)
        plain = options("inspect", "-e", "ITEM_ID=x", script)
        if options("inspect", "-e", "ITEM_ID=x", *change, script) != plain:
            fixed.add(name)
    comment = (LOADTEST / "testrun.yaml").read_text().partition("\napiVersion")[0]
    (sentence,) = re.findall(r"So give (.*?) to `k6 archive`", comment.replace("\n#", ""))
    assert set(re.split(r", | and ", sentence)) == fixed


def _head(script: str) -> str:
    """Return the comment at the top of a script."""
    return Path(script).read_text().partition("\nimport")[0]


def test_the_k6_operator_keeps_the_result_of_a_run() -> None:
    """With cleanup it deletes the runner's pod, and its log, as soon as the run has ended."""
    (manifest,) = documents(Path("loadtest/testrun.yaml"))
    assert "cleanup" not in manifest["spec"]
