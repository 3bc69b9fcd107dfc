"""A release on a Redis Cluster of three primaries: new addresses, and lost nodes.

The commands are those of docs/runbooks.md. The node has room for one Redis of each shard and one
replica.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from redis.crc import key_slot

from flashsale.keys import ItemKeys
from flashsale.requirements import SLOTS
from flashsale_operator.ctl.redis_cluster import PRIMARIES
from tests.e2e.shop import HERE, WAIT, Object, Shop, commands
from tests.support.manifests import documents, with_stand_ins
from tests.support.paths import CHART, ROOT

SHARDS: Final = "shards"
MANIFEST: Final = Path("k8s/redis/cluster.yaml")
STOCK: Final = 10_000
NODES: Final = "--selector=app.kubernetes.io/component=node"
LOST: Final = ("redis-0", "redis-1")


def secret() -> str:
    """Return the command in the manifest's comment that creates the Secret."""
    comment = (ROOT / MANIFEST).read_text()
    block = comment[comment.index("#   engine=") :].partition("\n#\n")[0]
    return "\n".join(line.removeprefix("#   ") for line in block.splitlines())


def run(name: str, shop: Shop, manifest: Path = MANIFEST) -> str:
    """Run the commands of a block in docs/runbooks.md, and return their output.

    `manifest` replaces the one of the page.
    """
    namespaced = f'kubectl() {{ command kubectl -n {shop.namespace} "$@"; }}\n'
    return "".join(
        shop.shell(namespaced + command.replace(str(MANIFEST), str(manifest)))
        for command in commands(name, "runbooks")
    )


def manifests(nodes: int = PRIMARIES) -> Iterator[Object]:
    """Yield the manifest's objects with the first nodes, whose requests fit the machine."""
    for each in with_stand_ins(MANIFEST):
        if each["kind"] in ("StatefulSet", "Job"):
            pod = each["spec"]["template"]["spec"]
            [container] = pod["containers"]
            if each["kind"] == "Job":
                container["args"] = container["args"][:nodes]
            else:
                each["spec"]["replicas"] = nodes
                container["resources"]["requests"]["memory"] = "256Mi"
                del pod["affinity"], pod["topologySpreadConstraints"]
        yield each


@pytest.fixture(scope="module")
def shards(shop: Shop) -> Iterator[Shop]:
    """A release with a Redis Cluster and a PostgreSQL of its own, and the Kafka of the first."""
    own = Shop(shop.cluster, SHARDS, SHARDS)
    own.create_namespace()
    own.shell(f'kubectl() {{ command kubectl -n {SHARDS} "$@"; }}\n{secret()}')
    for each in documents(Path("k8s/development-secrets.yaml")):
        if each["metadata"]["name"] != "redis":
            own.apply(each)
    for each in (*manifests(), *with_stand_ins(Path("k8s/postgres/one-node.yaml"))):
        own.apply(each)
    own.kubectl("wait", "job/redis-cluster", "--for=condition=Complete", "--timeout=2m")
    for server in ("redis", "postgres"):
        own.kubectl("rollout", "status", f"statefulset/{server}", "--timeout=2m")
    files = (HERE / "values.yaml", ROOT / "k8s" / "values" / "redis-cluster.yaml")
    values = [f"--values={file}" for file in files]
    other = ("--set=kafka.bootstrap=kafka.shop:9092", "--set=crds.enabled=false")
    own.helm("install", SHARDS, str(CHART), *values, *other, *WAIT)
    yield own
    own.helm("uninstall", SHARDS, *WAIT)
    shop.kubectl("delete", "namespace", SHARDS)


def one_item_per_primary(shop: Shop) -> list[str]:
    """Return names of items, of which each primary has one."""
    engine = f"{shop.release}-flashsale"
    found: dict[int, str] = {}
    for number in range(100):
        item = f"ticket-{number}"
        found.setdefault(
            key_slot(ItemKeys.of(item, engine).sale.encode()) * PRIMARIES // SLOTS, item
        )
    assert len(found) == PRIMARIES
    return sorted(found.values())


def addresses(shop: Shop) -> set[str]:
    """Return the addresses of the nodes' running pods."""
    return {each["status"].get("podIP", "") for each in shop.get("pods", NODES)["items"]}


def restart_all(shop: Shop) -> None:
    """Delete the pods of all nodes at once, and wait until new ones run at new addresses."""
    former = addresses(shop)
    # kubectl may wait for a pod of the same name for ever, because another has taken its place.
    shop.kubectl("delete", "pods", NODES, "--wait=false")
    shop.until(
        lambda: len(addresses(shop) - former - {""}) == PRIMARIES, "all nodes have new addresses"
    )


def sell_on(shop: Shop, items: list[str]) -> None:
    """Check that each sale sells again, and that the ledger agrees."""
    for item in items:
        shop.until_sale(item, "Selling")
    shop.agrees()


def test_all_nodes_restart_at_once_with_new_addresses_and_nothing_is_lost(shards: Shop) -> None:
    items = one_item_per_primary(shards)
    for item in items:
        shards.declare(item, STOCK)
    for item in items:
        shards.start_buyers(item, RATE=5, AWAY="allowed")
    restart_all(shards)
    for item in items:
        shards.check(item, STOCK, shards.end_buyers(item))
    shards.agrees()
    assert "failure" not in shards.flashsalectl("doctor")


def test_a_repeated_job_introduces_nodes_whose_services_have_new_addresses(
    shards: Shop, tmp_path: Path
) -> None:
    items = one_item_per_primary(shards)
    for item in items:
        shards.declare(item, STOCK)
    for each in manifests():
        if each["kind"] == "Service" and each["metadata"]["name"].startswith("redis-node-"):
            shards.kubectl("delete", "service", each["metadata"]["name"])
            shards.apply(each)
    manifest = tmp_path / "cluster.yaml"
    manifest.write_text("---\n".join(json.dumps(each) + "\n" for each in manifests()))
    run("introduce the nodes", shards, manifest)
    shards.kubectl("rollout", "status", "statefulset/redis", "--timeout=2m")
    sell_on(shards, items)
    for item in items:
        shards.start_load(
            f"again-{item}",
            "persistent.js",
            ITEM_ID=item,
            RATE=5,
            DURATION="2s",
            RUN=f"again-{item}",
        )
    for item in items:
        assert shards.end_load(f"again-{item}")
    sell_on(shards, items)


def add_replica(shop: Shop) -> None:
    """Add `redis-3`, which the Job makes the replica of `redis-0`."""
    shop.kubectl("delete", "job", "redis-cluster")
    for each in manifests(PRIMARIES + 1):
        if each["kind"] in ("StatefulSet", "Job"):
            shop.apply(each)
    shop.kubectl("wait", "job/redis-cluster", "--for=condition=Complete", "--timeout=2m")


def replace_lost(shop: Shop, *, possible: bool) -> None:
    """Delete the pods of two primaries. If no replacement is possible, they stay away."""
    selector = None if possible else {"kubernetes.io/hostname": "lost"}
    template = {"spec": {"nodeSelector": selector}}
    strategy = {"type": "OnDelete", "rollingUpdate": None}
    spec = {"updateStrategy": strategy, "template": template}
    shop.kubectl("patch", "statefulset", "redis", f"--patch={json.dumps({'spec': spec})}")
    shop.kubectl("delete", "pods", *LOST)


def replication(shop: Shop, pod: str) -> str:
    """Return a node's view of its replication, or an error while it does not run."""
    return shop.kubectl("exec", pod, "--", "redis-cli", "info", "replication", check=False)


def test_a_person_takes_over_for_the_lost_majority_of_the_primaries(shards: Shop) -> None:
    items = one_item_per_primary(shards)
    for item in items:
        shards.declare(item, STOCK)
    add_replica(shards)
    # A lost machine runs no hook that hands over to the replica.
    shards.kubectl("exec", "redis-0", "--", "redis-cli", "acl", "setuser", "default", "-info")
    replace_lost(shards, possible=False)

    def state(expected: str) -> None:
        shards.until(
            lambda: f"cluster_state:{expected}" in run("look at the nodes", shards),
            f"the state of the cluster is {expected}",
        )

    state("fail")
    pods = run("see that they are lost", shards)
    assert pods.count("Pending") == len(LOST)
    assert "OK" in run("take over", shards)
    state("ok")
    assert "role:master" in replication(shards, "redis-3")
    replace_lost(shards, possible=True)

    def follows() -> bool:
        found = replication(shards, "redis-0")
        return "role:slave" in found and "master_link_status:up" in found

    shards.until(follows, "the lost primary is a replica")

    def exchanged() -> bool:
        # The other primaries may not agree before the second one has returned.
        if "role:master" in replication(shards, "redis-0"):
            return True
        run("exchange a pair", shards)
        return False

    shards.until(exchanged, "the pair has exchanged its roles")
    sell_on(shards, items)
