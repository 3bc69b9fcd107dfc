"""A release on a Redis Cluster of three primaries, whose nodes all restart with new addresses.

The node has room for one Redis of each shard, so there are no replicas and no zones.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from redis.crc import key_slot

from flashsale.keys import ItemKeys
from flashsale.requirements import SLOTS
from flashsale_operator.ctl.redis_cluster import PRIMARIES
from tests.e2e.shop import HERE, WAIT, Object, Promise, Shop
from tests.support.manifests import documents, with_stand_ins
from tests.support.paths import CHART, ROOT

SHARDS: Final = "shards"
MANIFEST: Final = Path("k8s/redis/cluster.yaml")
STOCK: Final = 10_000
NODES: Final = "--selector=app.kubernetes.io/component=node"


def secret() -> str:
    """Return the command in the manifest's comment that creates the Secret."""
    comment = (ROOT / MANIFEST).read_text()
    block = comment[comment.index("#   engine=") :].partition("\n#\n")[0]
    return "\n".join(line.removeprefix("#   ") for line in block.splitlines())


def manifests() -> Iterator[Object]:
    """Yield the manifest's objects with three primaries whose requests fit the node."""
    for each in with_stand_ins(MANIFEST):
        if each["kind"] in ("StatefulSet", "Job"):
            pod = each["spec"]["template"]["spec"]
            if each["kind"] == "Job":
                [container] = pod["containers"]
                container["args"] = container["args"][:PRIMARIES]
            else:
                each["spec"]["replicas"] = PRIMARIES
                del pod["affinity"], pod["topologySpreadConstraints"]
        yield each


def form(shop: Shop) -> None:
    """Run the Job, again if it has run before."""
    [job] = [each for each in manifests() if each["kind"] == "Job"]
    name = job["metadata"]["name"]
    shop.kubectl("delete", "job", name, "--ignore-not-found")
    shop.apply(job)
    shop.kubectl("wait", f"job/{name}", "--for=condition=Complete", "--timeout=2m")


@pytest.fixture(scope="module")
def shards(shop: Shop) -> Iterator[Shop]:
    """A release with a Redis Cluster and a PostgreSQL of its own, and the Kafka of the first."""
    own = Shop(shop.cluster, SHARDS, SHARDS)
    own.create_namespace()
    own.shell(f'kubectl() {{ command kubectl --namespace {SHARDS} "$@"; }}\n{secret()}')
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
        shards.start_load(
            item, "persistent.js", ITEM_ID=item, RATE=5, DURATION="35s", AWAY="allowed", RUN=item
        )
    for item in items:
        shards.selling(item)
    restart_all(shards)
    promises: dict[str, list[Promise]] = {}
    for item in items:
        shards.still_selling(item)
    for item in items:
        promises[item] = shards.end_load(item)
        shards.check(item, STOCK, promises[item])
    sell_on(shards, items)
    assert "failure" not in shards.flashsalectl("doctor")


def test_a_repeated_job_introduces_nodes_whose_services_have_new_addresses(shards: Shop) -> None:
    items = one_item_per_primary(shards)
    for item in items:
        shards.declare(item, STOCK)
    for each in manifests():
        if each["kind"] == "Service" and each["metadata"]["name"].startswith("redis-node-"):
            shards.kubectl("delete", "service", each["metadata"]["name"])
            shards.apply(each)
    restart_all(shards)
    form(shards)
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
