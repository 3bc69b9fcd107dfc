"""The stack's Redis Cluster: it is formed once, and survives a restart of all nodes."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from dev.stack.packages import redis_binaries
from dev.stack.servers import RedisCluster, RedisServer
from flashsale_operator.ctl.commands import run
from flashsale_operator.ctl.redis_cluster import NotFormed
from tests.support import redis_users
from tests.support.eventually import eventually


def roles(cluster: RedisCluster) -> list[str]:
    found = []
    for server in cluster.servers:
        if server.pid is None:
            found.append("dead")
            continue
        with redis.Redis.from_url(server.url) as client:
            found.append(client.info("replication")["role"])
    return found


@pytest.mark.parametrize("name", sorted(redis_binaries()))
def test_a_cluster_is_formed_once_and_survives_a_restart_of_all_nodes(
    name: str, tmp_path: Path
) -> None:
    with RedisCluster(tmp_path, redis_binaries()[name], replicas=1) as cluster:
        before = roles(cluster)
        assert before == ["master"] * 3 + ["slave"] * 3
        assert cluster.form() is False
        with redis.RedisCluster.from_url(cluster.url) as client:
            client.set("a key", "a value")
    with RedisCluster(tmp_path, redis_binaries()[name], replicas=1) as cluster:
        assert roles(cluster) == before
        with redis.RedisCluster.from_url(cluster.url) as client:
            assert client.get("a key") == b"a value"


@pytest.mark.parametrize("name", sorted(redis_binaries()))
def test_nodes_that_all_have_new_addresses_are_introduced_again(name: str, tmp_path: Path) -> None:
    with RedisCluster(tmp_path, redis_binaries()[name], replicas=1) as cluster:
        before = roles(cluster)
        with redis.RedisCluster.from_url(cluster.url) as client:
            client.set("a key", "a value")
    for recorded in tmp_path.glob("*/server.json"):
        recorded.unlink()  # has the port
    with RedisCluster(tmp_path, redis_binaries()[name], replicas=1) as cluster:
        # A replica may have taken over meanwhile.
        assert sorted(roles(cluster)) == sorted(before)
        assert cluster.form() is False
        with redis.RedisCluster.from_url(cluster.url) as client:
            assert client.get("a key") == b"a value"


def test_primaries_that_all_have_new_addresses_are_introduced_at_once(tmp_path: Path) -> None:
    """For some seconds after their start, they do not miss each other."""
    with RedisCluster(tmp_path) as cluster:
        before = {server.port for server in cluster.servers}
    for recorded in tmp_path.glob("*/server.json"):
        recorded.unlink()  # has the port
    cluster = RedisCluster(tmp_path)

    def looks_complete_or_missed() -> bool:
        views = []
        for server in cluster.servers:
            with redis.Redis.from_url(server.url, decode_responses=True) as client:
                ask: Any = client.execute_command
                missed = any("fail" in each["flags"] for each in ask("CLUSTER NODES").values())
                views.append(missed or ask("CLUSTER INFO")["cluster_state"] == "ok")
        return all(views)

    with ExitStack() as servers:
        for server in cluster.servers:
            servers.enter_context(server)
        assert not before & {server.port for server in cluster.servers}
        eventually(looks_complete_or_missed)
        assert cluster.form() is True
        with redis.RedisCluster.from_url(cluster.url) as client:
            assert client.set("a key", "a value")


def test_a_node_that_lost_its_data_joins_again(tmp_path: Path) -> None:
    with RedisCluster(tmp_path, replicas=1) as cluster:
        lost = cluster.servers[0]
        lost.kill()
        for path in lost.data.iterdir():
            if path.name != "server.json":  # has the port
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        eventually(lambda: roles(cluster)[3] == "master")
        lost.start()
        assert cluster.form() is True
        assert roles(cluster) == ["slave", "master", "master", "master", "slave", "slave"]


def test_nodes_of_two_clusters_are_refused_before_they_meet(tmp_path: Path) -> None:
    with RedisCluster(tmp_path / "one") as one, RedisCluster(tmp_path / "other") as other:
        servers = one.servers
        one.servers = [*servers[:2], *other.servers]
        with pytest.raises(NotFormed, match="belong to different clusters"):
            one.form()
        one.servers = servers
        for cluster in (one, other):
            for server in cluster.servers:
                with redis.Redis.from_url(server.url, decode_responses=True) as client:
                    found: Any = client.execute_command("CLUSTER NODES")
                    assert len(found) == 3


def test_a_cluster_needs_three_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"FLASHSALE_REDIS_URL": "redis://127.0.0.1:1/0"}
    assert run(["form-redis-cluster", "127.0.0.1"], environ) == 1
    assert "needs 3 nodes or more, but 1 given" in capsys.readouterr().err
    assert run(["form-redis-cluster", "no-such.invalid", "a.invalid", "b.invalid"], environ) == 1
    assert "the host no-such.invalid is not known" in capsys.readouterr().err
    assert run(["form-redis-cluster", "a" * 64, "b", "c"], environ) == 1
    assert f"the host {'a' * 64} is not known" in capsys.readouterr().err


def test_a_server_that_is_no_node_or_refuses_the_user_gets_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["form-redis-cluster", *["127.0.0.1"] * 3]
    with RedisServer(tmp_path / "alone") as server:
        assert run(command, {"FLASHSALE_REDIS_URL": server.url}) == 1
    error = capsys.readouterr().err
    assert error.startswith("flashsalectl: a node refused a step: ")
    assert error.endswith(": start each node with cluster-enabled yes\n")
    options = redis_users.options(clustered=True)
    with RedisServer(tmp_path / "node", options=options, clustered=True) as server:
        url = redis_users.url_of(server, redis_users.API)
        assert run(command, {"FLASHSALE_REDIS_URL": url}) == 1
    error = capsys.readouterr().err
    assert error.startswith("flashsalectl: a node refused a step: ")
    assert error.endswith("FLASHSALE_REDIS_URL needs the user and password of an administrator\n")
