"""The manifests of k8s and loadtest are valid and match the chart's values.

A real kube-apiserver checks them. Real k6 and Redis check their scripts and configuration.
"""

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from dev.cluster.control_plane import ControlPlane
from dev.stack.errors import StackError
from dev.stack.redis import RedisServer, default_binary
from flashsale import redis_client, requirements
from flashsale.inventory import Applied, Inventory
from flashsale.outbox import Outbox
from flashsale.requirements import SLOTS, Checks
from flashsale.reservations import Request
from flashsale.sale import SaleSpec
from tests.support.chart import COMPONENTS, Helm, Manifest, Rendered, merged
from tests.support.eventually import eventually
from tests.support.manifests import documents, scripts, selects
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

K8S: Final = ROOT / "k8s"
VALUES: Final = K8S / "values"
LOADTEST: Final = ROOT / "loadtest"
# The names of the engine in k8s/values.
TOPIC: Final = "flashsale.reservations"
RECORDED: Final = "flashsale.recorded"
PASSWORD: Final = "Secret-of.the_test~1"
ENGINE: Final = "Secret-of.the_engine~2"
API: Final = "Secret-of.the_api~3"
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


class RedisOfManifest(RedisServer):
    """The real server, started by the script of a manifest's ConfigMap on another folder and port.

    No wheel has redis-cli, so a script replaces it. It names this node as the primary.
    """

    def __init__(
        self, data: Path, files: dict[str, str], password: str, engine_password: str = ENGINE
    ) -> None:
        super().__init__(data)
        self.files = files
        self.password = password
        self.engine_password = engine_password

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        programs = {"redis-cli": "echo node.redis-nodes", "hostname": "echo node"}
        programs["getent"] = "echo 127.0.0.1 $2"
        programs["redis-server"] = f'exec {default_binary()} "$@"'
        for name, line in programs.items():
            path = self.data / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\n{line}\n")
            path.chmod(0o755)
        own = f"dir {self.data}\nport {self.port}\ncluster-port {self.bus_port}\nbind 127.0.0.1\n"
        for name, text in self.files.items():
            moved = text.replace("/etc/redis", str(self.data)).replace("dir /data\n", own)
            (self.data / name).write_text(moved)

    def _command(self) -> list[str]:
        return ["sh", "redis.sh"]

    def _environment(self) -> dict[str, str]:
        path = f"{self.data / 'bin'}:{os.environ['PATH']}"
        passwords = {
            "REDISCLI_AUTH": self.password,
            "ENGINE_PASSWORD": self.engine_password,
            "API_PASSWORD": API,
        }
        return {**super()._environment(), "PATH": path, **passwords}

    def _ready(self) -> bool:
        try:
            with Redis.from_url(self.url) as redis:
                return bool(redis.ping())
        except RedisError as error:
            raise OSError(str(error)) from error


@pytest.fixture(params=sorted(path.stem for path in (K8S / "redis").iterdir()))
def redis_of_manifest(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[str, RedisOfManifest, Redis]]:
    """Each shipped Redis with its manifest's name and a client."""
    files = scripts(Path(f"k8s/redis/{request.param}.yaml"))
    with RedisOfManifest(tmp_path / "redis", files, PASSWORD) as server:
        redis = Redis.from_url(server.url, decode_responses=True)
        if request.param == "cluster":
            ask: Any = redis.execute_command
            ask("CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
            eventually(lambda: ask("CLUSTER INFO")["cluster_state"] == "ok")
        yield request.param, server, redis
        redis.close()


def test_redis_keeps_its_keys_its_data_and_its_replication_id(
    redis_of_manifest: tuple[str, RedisOfManifest, Redis],
) -> None:
    name, _, redis = redis_of_manifest
    wanted = {
        "maxmemory-policy": "noeviction",
        "appendonly": "yes",
        "repl-backlog-ttl": "0",
        "min-replicas-to-write": "1" if name == "highly-available" else "0",
    }
    assert redis.config_get(*wanted) == wanted


def test_redis_demands_its_password_and_has_it_in_no_argument(
    redis_of_manifest: tuple[str, RedisOfManifest, Redis],
) -> None:
    name, server, redis = redis_of_manifest
    assert server.pid is not None
    arguments = Path(f"/proc/{server.pid}/cmdline").read_bytes().decode()
    assert f"127.0.0.1:{server.port}" in arguments
    assert PASSWORD not in arguments
    assert ENGINE not in arguments
    assert API not in arguments
    # A replica sends this password to its primary.
    assert redis.config_get("masterauth")["masterauth"] == ("" if name == "one-node" else PASSWORD)
    with (
        Redis(port=server.port) as stranger,
        pytest.raises(AuthenticationError, match="authenticated"),
    ):
        stranger.ping()


@pytest.mark.parametrize("password", ["", "two words", 'quote"', "line\nbreak"])
@pytest.mark.parametrize("file", sorted(path.name for path in (K8S / "redis").iterdir()))
def test_redis_refuses_a_password_that_its_configuration_cannot_hold(
    tmp_path: Path, file: str, password: str
) -> None:
    files = scripts(Path("k8s/redis") / file)
    for number, passwords in enumerate([(password, ENGINE), (PASSWORD, password)]):
        server = RedisOfManifest(tmp_path / f"redis-{number}", files, *passwords)
        with pytest.raises(StackError, match="may have only letters, digits") as refusal:
            server.start()
        assert not password or password not in str(refusal.value)


async def test_the_engine_sells_as_users_who_may_not_change_the_server(
    redis_of_manifest: tuple[str, RedisOfManifest, Redis],
) -> None:
    _, server, admin = redis_of_manifest
    admin.config_set("min-replicas-to-write", 0)
    operator, api = [
        redis_client.connect(f"redis://{user}:{password}@127.0.0.1:{server.port}/0")
        for user, password in (("flashsale", ENGINE), ("flashsale-api", API))
    ]
    for client in (operator, api):
        Checks().require(requirements.REDIS, *await Inventory(client, "shop").facts())
    seeding = Inventory(operator, "shop")
    await seeding.claim("e-1")
    spec = SaleSpec("default/phone", "phone", 10)
    assert await seeding.apply(spec, 1, engine_id="e-1", seed_until_ms=2**53) is Applied.SEEDED
    inventory, outbox = Inventory(api, "shop"), Outbox(api, "shop")
    await inventory.load()
    await outbox.load()
    request = Request(str(uuid.uuid4()), "ann", 1)
    await inventory.reserve("phone", [request], timeout_seconds=5, engine_id="e-1")
    assert (await inventory.sales(await inventory.items()))["phone"].accepted == 1
    [entry] = await outbox.page("phone", after="-", until_ms=2**53, count=10)
    assert await outbox.take_lease("phone", "pod", 1_000)
    assert await outbox.settle("phone", [(entry.entry_id, entry.reservation_id, 1)]) == 1
    changing = "FLUSHALL", "KEYS *", "CONFIG SET maxmemory-policy allkeys-lru", "SHUTDOWN"
    for client, commands in (
        (operator, changing),
        (api, (*changing, "DEL shop:{phone}:sale", "RENAME shop:{phone}:sale x")),
    ):
        for command in commands:
            refused: Any = client.execute_command(*command.split())  # type: ignore[no-untyped-call]
            with pytest.raises(NoPermissionError):
                await refused
        await client.aclose()


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
    assert "GET /sales/other returned status 0" in done.stderr
    assert done.returncode != 0


def test_the_redis_service_leads_to_the_proxy_and_the_proxy_to_every_node() -> None:
    found = documents(Path("k8s/redis/highly-available.yaml"))
    by_kind = {
        kind: {each["metadata"]["name"]: each for each in found if each["kind"] == kind}
        for kind in ("ConfigMap", "Service", "StatefulSet", "Deployment")
    }
    nodes = by_kind["StatefulSet"]["redis"]["spec"]
    front = by_kind["Service"]["redis"]["spec"]
    proxy = by_kind["Deployment"]["redis-proxy"]["spec"]["template"]
    assert front["selector"].items() <= proxy["metadata"]["labels"].items()
    assert not front["selector"].items() <= nodes["template"]["metadata"]["labels"].items()
    headless = by_kind["Service"][nodes["serviceName"]]["spec"]
    assert headless["publishNotReadyAddresses"]
    proxied = by_kind["ConfigMap"]["redis"]["data"]["haproxy.cfg"]
    servers = re.findall(r'^ *server \S+ "([^.]+)\.([^.]+)\.', proxied, re.MULTILINE)
    assert servers == [(f"redis-{n}", nodes["serviceName"]) for n in range(nodes["replicas"])]
    watched = by_kind["ConfigMap"]["redis"]["data"]["sentinel.conf"]
    assert f"sentinel monitor flashsale redis-0.{nodes['serviceName']} 6379 2" in watched


def test_redis_accepts_no_write_without_a_replica(tmp_path: Path) -> None:
    files = scripts(Path("k8s/redis/highly-available.yaml"))
    with (
        RedisOfManifest(tmp_path / "redis", files, PASSWORD) as server,
        Redis.from_url(server.url) as redis,
        pytest.raises(ResponseError, match="Not enough good replicas"),
    ):
        redis.set("flashsale:items", "1")


def test_the_proxy_finds_the_clusters_domain(tmp_path: Path) -> None:
    """Run its script with other files and without HAProxy, which prints its environment instead."""
    script = scripts(Path("k8s/redis/highly-available.yaml"))["haproxy.sh"]
    found = tmp_path / "resolv.conf"
    moved = script.replace("/etc/resolv.conf", str(found))
    moved = moved.replace("exec haproxy", "printenv DOMAIN; : haproxy")
    for text, domain in (
        ("search shop.svc.example.org svc.example.org example.org\n", "shop.svc.example.org"),
        ("nameserver 10.96.0.10\nsearch shop.svc.other\noptions ndots:5\n", "shop.svc.other"),
        ("nameserver 10.96.0.10\n", ""),
    ):
        found.write_text(text)
        done = subprocess.run(["sh", "-c", moved], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == domain
        assert (done.returncode == 0) == bool(domain), done.stderr


def test_the_proxy_listens_on_ipv6_where_the_machine_has_it(tmp_path: Path) -> None:
    files = scripts(Path("k8s/redis/highly-available.yaml"))
    resolvers, ipv6 = tmp_path / "resolv.conf", tmp_path / "if_inet6"
    resolvers.write_text("search shop.svc.cluster.local\n")
    moved = files["haproxy.sh"].replace("/etc/resolv.conf", str(resolvers))
    moved = moved.replace("/proc/net/if_inet6", str(ipv6))
    moved = moved.replace("exec haproxy", "printenv ADDRESS; : haproxy")
    for address in ("", "::"):
        done = subprocess.run(["sh", "-c", moved], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == address, done.stderr
        ipv6.touch()
    binds = re.findall(r"^ *bind (.*)", files["haproxy.cfg"], re.MULTILINE)
    assert binds == ['"${ADDRESS}:6379" v4v6', '"${ADDRESS}:8404" v4v6']
