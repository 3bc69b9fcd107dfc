"""The Redis of k8s really runs, and its proxy finds it."""

import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from dev.stack.errors import StackError
from dev.stack.ports import free_port
from dev.stack.redis import RedisServer, default_binary
from flashsale import heartbeat, redis_client, redis_facts, requirements
from flashsale.inventory import Applied, Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Outbox
from flashsale.requirements import SLOTS, Checks
from flashsale.reservations import Request
from flashsale.sale import SaleSpec
from tests.support import redis_users
from tests.support.eventually import eventually
from tests.support.manifests import documents, scripts
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

K8S: Final = ROOT / "k8s"
PASSWORD: Final = "Secret-of.the_test~1"
ENGINE: Final = "Secret-of.the_engine~2"
API: Final = "Secret-of.the_api~3"
OF_THE_API_NEVER: Final = (
    "CONFIG GET requirepass",
    "CONFIG GET masterauth",
    "DEL shop:{phone}:sale",
    "HDEL shop:{phone}:buyers ann",
    "RENAME shop:{phone}:sale x",
    "SET shop:{phone}:sale x",
    "EXPIRE shop:{phone}:sale 0",
    "PEXPIRE shop:{phone}:sale 0",
    "SREM shop:items phone",
)
"""Commands that would give a pod, which buyers can reach, the server or the sales."""


class RedisOfManifest(RedisServer):
    """The real server, started by the script of a manifest's ConfigMap on another folder and port.

    No wheel has redis-cli, so a script replaces it. It names `primary`, by default this node.
    """

    def __init__(
        self,
        data: Path,
        files: dict[str, str],
        password: str,
        engine_password: str = ENGINE,
        primary: str = "node.redis-nodes",
    ) -> None:
        super().__init__(data)
        self.primary = primary
        self.files = files
        self.password = password
        self.engine_password = engine_password

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        programs = {"redis-cli": f"echo {self.primary}", "hostname": "echo node"}
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
            moved = moved.replace("/etc/resolv.conf", str(self.data / "resolv.conf"))
            (self.data / name).write_text(moved)
        (self.data / "resolv.conf").write_text("search shop.svc.cluster.local\n")

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


@pytest.mark.parametrize("keys", ["~*", "~shop:*"], ids=["a Redis of its own", "a shared Redis"])
async def test_the_engine_sells_as_users_who_may_not_change_the_server(
    redis_of_manifest: tuple[str, RedisOfManifest, Redis], keys: str
) -> None:
    name, server, admin = redis_of_manifest
    admin.config_set("min-replicas-to-write", 0)
    set_user: Any = admin.execute_command
    for user, password in (("flashsale", ENGINE), ("flashsale-api", API)):
        given = [rule.replace("~*", keys) for rule in redis_users.rules(user, name)]
        set_user("ACL", "SETUSER", user, "reset", "on", f">{password}", *given)
    operator, api = [
        redis_client.connect(f"redis://{user}:{password}@127.0.0.1:{server.port}/0")
        for user, password in (("flashsale", ENGINE), ("flashsale-api", API))
    ]
    for client in (operator, api):
        Checks().require(requirements.REDIS, *await redis_facts.read(client, "shop"))
    seeding = Inventory(operator, "shop")
    await seeding.index.claim("e-1")
    spec = SaleSpec("default/phone", "phone", 10)
    assert await seeding.apply(spec, 1, engine_id="e-1", seed_until_ms=2**53) is Applied.SEEDED
    inventory, outbox = Inventory(api, "shop"), Outbox(api, "shop")
    await inventory.load()
    await outbox.load()
    request = Request(str(uuid.uuid4()), "ann", 1)
    await inventory.reserve("phone", [request], timeout_seconds=5, engine_id="e-1")
    assert (await inventory.sales(await inventory.index.items()))["phone"].accepted == 1
    [entry] = (await outbox.page("phone", after="-", until_ms=2**53, count=10)).entries
    assert await outbox.settle("phone", [(entry.entry_id, entry.reservation_id, 1)]) == 1
    for _ in ("take", "renew"):
        assert await outbox.take_lease("phone", "pod", 1_000)
        assert await inventory.lease_expiry("phone", "pod", 1_000)
    sent = await heartbeat.beat(api, "pod", {"phone": 0}, await inventory.clocks(), "shop")
    assert not sent.refused
    await heartbeat.retire(api, "pod", ["phone"], "shop")
    assert not await inventory.redis.hgetall(ItemKeys.of("phone", "shop").pods)
    changing = "FLUSHALL", "KEYS *", "CONFIG SET maxmemory-policy allkeys-lru", "SHUTDOWN"
    for client, commands in (
        (operator, changing),
        (api, (*changing, *OF_THE_API_NEVER)),
    ):
        for command in commands:
            refused: Any = client.execute_command(*command.split())  # type: ignore[no-untyped-call]
            with pytest.raises(NoPermissionError):
                await refused
        await client.aclose()


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
    servers = re.findall(r'^ *server \S+ "([^.]+)\.\$\{DOMAIN\}:6379"', proxied, re.MULTILINE)
    assert servers == [f"redis-{n}" for n in range(nodes["replicas"])]
    mounted = proxy["spec"]["volumes"][0]["configMap"]["items"]
    assert {each["key"] for each in mounted} == {"domain.sh", "haproxy.cfg", "haproxy.sh"}


def test_a_proxy_that_finds_no_primary_replaces_no_other_proxy() -> None:
    """With a wrong password a proxy finds none. A started one stays ready, also in a failover."""
    found = documents(Path("k8s/redis/highly-available.yaml"))
    [proxy] = [each["spec"] for each in found if each["kind"] == "Deployment"]
    [container] = proxy["template"]["spec"]["containers"]
    configuration = scripts(Path("k8s/redis/highly-available.yaml"))["haproxy.cfg"]
    start = container["startupProbe"]
    rule = f"return status 200 if {{ path {start['httpGet']['path']} }} {{ nbsrv(primary) gt 0 }}"
    assert rule in configuration
    # HAProxy counts a server before its first check, which ends after an interval and two timeouts.
    assert start["initialDelaySeconds"] > 3
    ready = container["readinessProbe"]["httpGet"]["path"]
    assert f"monitor-uri {ready}\n" in configuration
    assert "monitor fail" not in configuration


def test_no_name_of_a_redis_is_looked_up_outside_the_cluster(tmp_path: Path) -> None:
    """A complete name ends with a dot. HAProxy takes every name for a complete one."""
    files = scripts(Path("k8s/redis/highly-available.yaml"))
    complete = "node.redis-nodes.shop.svc.cluster.local."
    with (
        RedisOfManifest(tmp_path / "redis", files, PASSWORD, primary=complete) as server,
        Redis.from_url(server.url, decode_responses=True) as redis,
    ):
        assert redis.config_get("replica-announce-ip")["replica-announce-ip"] == complete
        started = server.data / "sentinel.sh"
        moved = started.read_text().replace("/data/", f"{tmp_path}/").replace("exec ", ": ")
        environment = {**os.environ, **server._environment()}
        subprocess.run(["sh", "-c", moved], env=environment, cwd=server.data, check=True)
    written = (tmp_path / "sentinel.conf").read_text()
    assert f"sentinel announce-ip {complete}\n" in written
    assert f"sentinel monitor flashsale redis-0{complete.removeprefix('node')} 6379 2\n" in written


@pytest.mark.parametrize("domain", ["", ".shop.svc.cluster.local."])
@pytest.mark.parametrize("primary", ["node", "other"])
def test_a_volume_of_an_earlier_manifest_keeps_its_short_names(
    tmp_path: Path, primary: str, domain: str
) -> None:
    """The Sentinel of such a volume names the primary without its domain."""
    files = scripts(Path("k8s/redis/highly-available.yaml"))
    named = f"{primary}.redis-nodes{domain}"
    with (
        RedisOfManifest(tmp_path / "redis", files, PASSWORD, primary=named) as server,
        Redis.from_url(server.url, decode_responses=True) as redis,
    ):
        own = redis.config_get("replica-announce-ip")["replica-announce-ip"]
        assert own == f"node.redis-nodes{domain}"
        assert redis.info("replication").get("master_host") == (
            named if primary == "other" else None
        )


def test_a_node_waits_while_its_sentinel_refuses_the_password(tmp_path: Path) -> None:
    """redis-cli prints the refusal as if it were the primary's name."""
    files = scripts(Path("k8s/redis/highly-available.yaml"))
    answer = "$(cat named || echo NOAUTH Authentication required. | tee named)"
    server = RedisOfManifest(tmp_path / "redis", files, PASSWORD, primary=answer)
    named = server.data / "named"

    def correct() -> None:
        eventually(named.exists)
        named.write_text("node.redis-nodes")

    with ThreadPoolExecutor() as sentinel:
        corrected = sentinel.submit(correct)
        with server, Redis.from_url(server.url, decode_responses=True) as redis:
            corrected.result()
            assert redis.info("replication")["role"] == "master"


def test_a_sentinel_takes_a_changed_password_from_the_secret(tmp_path: Path) -> None:
    """Sentinel keeps its configuration on the volume, and adds a hash of the password to it."""
    server = RedisOfManifest(
        tmp_path / "redis", scripts(Path("k8s/redis/highly-available.yaml")), PASSWORD
    )
    server.data.mkdir()
    server._prepare()
    script = (server.data / "sentinel.sh").read_text().replace("/data/", f"{tmp_path}/")
    moved = script.replace("redis-0.$DOMAIN. 6379", f"127.0.0.1 {free_port()}")
    port = free_port()
    (server.data / "sentinel.conf").write_text(f"dir {tmp_path}\nport {port}\nbind 127.0.0.1\n")
    written = tmp_path / "sentinel.conf"
    for password, former in ((PASSWORD, "none"), ("changed", PASSWORD), ("changed", PASSWORD)):
        environment = {**os.environ, **server._environment(), "REDISCLI_AUTH": password}
        with (
            subprocess.Popen(["sh", "-c", moved], env=environment, cwd=server.data) as sentinel,
            Redis(port=port, password=password) as accepted,
            Redis(port=port, password=former) as refused,
        ):
            try:
                eventually(partial(answers, accepted))
                with pytest.raises(AuthenticationError):
                    refused.ping()
                # It writes the file again.
                accepted.sentinel_flushconfig()
            finally:
                sentinel.terminate()
        lines = re.findall(r"^.*pass .*$", written.read_text(), re.MULTILINE)
        assert sorted(line.replace('"', "") for line in lines) == [
            f"requirepass {password}",
            f"sentinel auth-pass flashsale {password}",
            f"sentinel sentinel-pass {password}",
        ]


def answers(redis: Redis) -> bool:
    """Whether a server runs and accepts the password."""
    try:
        return bool(redis.ping())
    except RedisError:
        return False


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
    files = scripts(Path("k8s/redis/highly-available.yaml"))
    found, shared = tmp_path / "resolv.conf", tmp_path / "domain.sh"
    shared.write_text(files["domain.sh"].replace("/etc/resolv.conf", str(found)))
    moved = files["haproxy.sh"].replace("/etc/haproxy", str(tmp_path))
    moved = moved.replace("exec haproxy", "printenv DOMAIN; : haproxy")
    nodes = "redis-nodes.shop.svc"
    for text, domain in (
        ("search shop.svc.example.org svc.example.org example.org\n", f"{nodes}.example.org"),
        ("nameserver 10.96.0.10\nsearch shop.svc.other\noptions ndots:5\n", f"{nodes}.other"),
        ("nameserver 10.96.0.10\n", ""),
    ):
        found.write_text(text)
        done = subprocess.run(["sh", "-c", moved], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == domain
        assert (done.returncode == 0) == bool(domain), done.stderr


def test_the_proxy_listens_on_ipv6_where_the_machine_has_it(tmp_path: Path) -> None:
    files = scripts(Path("k8s/redis/highly-available.yaml"))
    ipv6 = tmp_path / "if_inet6"
    (tmp_path / "domain.sh").write_text("DOMAIN=redis-nodes.shop.svc.cluster.local\n")
    moved = files["haproxy.sh"].replace("/etc/haproxy/domain", str(tmp_path / "domain"))
    moved = moved.replace("/proc/net/if_inet6", str(ipv6))
    moved = moved.replace("exec haproxy", "printenv ADDRESS; : haproxy")
    for address in ("", "::"):
        done = subprocess.run(["sh", "-c", moved], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == address, done.stderr
        ipv6.touch()
    binds = re.findall(r"^ *bind (.*)", files["haproxy.cfg"], re.MULTILINE)
    assert binds == ['"${ADDRESS}:6379" v4v6', '"${ADDRESS}:8404" v4v6']
