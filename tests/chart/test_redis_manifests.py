"""Real Redis and HAProxy run with the configuration in the manifests of k8s/redis."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from dev.stack.errors import StackError
from dev.stack.redis import RedisServer, default_binary
from tests.support.manifests import documents
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

REDIS: Final = ROOT / "k8s" / "redis"
PASSWORD: Final = "Secret-of.the_test~1"


def scripts(file: Path) -> dict[str, str]:
    """Return the files in a manifest's ConfigMap."""
    (found,) = (each["data"] for each in documents(file) if each["kind"] == "ConfigMap")
    return dict(found)


class RedisOfManifest(RedisServer):
    """The real server, started by the script of a manifest's ConfigMap on another folder and port.

    No wheel has redis-cli, so a script replaces it. It names this node as the primary.
    """

    def __init__(self, data: Path, files: dict[str, str], password: str) -> None:
        super().__init__(data)
        self.files = files
        self.password = password

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        programs = {"redis-cli": "echo node.redis-nodes", "hostname": "echo node"}
        programs["redis-server"] = f'exec {default_binary()} "$@"'
        for name, line in programs.items():
            path = self.data / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\n{line}\n")
            path.chmod(0o755)
        own = f"dir {self.data}\nport {self.port}\nbind 127.0.0.1\n"
        for name, text in self.files.items():
            moved = text.replace("/etc/redis", str(self.data)).replace("dir /data\n", own)
            (self.data / name).write_text(moved)

    def _command(self) -> list[str]:
        return ["sh", "redis.sh"]

    def _environment(self) -> dict[str, str]:
        path = f"{self.data / 'bin'}:{os.environ['PATH']}"
        return {**super()._environment(), "PATH": path, "REDISCLI_AUTH": self.password}

    def _ready(self) -> bool:
        try:
            with Redis.from_url(self.url) as redis:
                return bool(redis.ping())
        except RedisError as error:
            raise OSError(str(error)) from error


@pytest.fixture(params=sorted(path.stem for path in REDIS.iterdir()))
def redis_of_manifest(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[str, RedisOfManifest, Redis]]:
    """Each shipped Redis with its manifest's name and a client."""
    files = scripts(Path(f"k8s/redis/{request.param}.yaml"))
    with RedisOfManifest(tmp_path / "redis", files, PASSWORD) as server:
        redis = Redis.from_url(server.url, decode_responses=True)
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
    # A replica sends this password to its primary.
    assert redis.config_get("masterauth")["masterauth"] == (
        PASSWORD if name == "highly-available" else ""
    )
    with (
        Redis(port=server.port) as stranger,
        pytest.raises(AuthenticationError, match="authenticated"),
    ):
        stranger.ping()


@pytest.mark.parametrize("password", ["", "two words", 'quote"', "line\nbreak"])
@pytest.mark.parametrize("file", sorted(path.name for path in REDIS.iterdir()))
def test_redis_refuses_a_password_that_its_configuration_cannot_hold(
    tmp_path: Path, file: str, password: str
) -> None:
    server = RedisOfManifest(tmp_path / "redis", scripts(Path("k8s/redis") / file), password)
    with pytest.raises(StackError, match="may have only letters, digits") as refusal:
        server.start()
    assert not password or password not in str(refusal.value)


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
