"""A second release, in a namespace with a quota, a LimitRange and a default-deny policy.

It uses the Kafka of the first release, and a Redis and a PostgreSQL of its own. The node does not
enforce NetworkPolicies.
"""

import json
from collections.abc import Iterator

import pytest

from tests.e2e.shop import CHANGED, COMPONENTS, WAIT, Shop, block
from tests.support.manifests import flash_sale
from tests.support.paths import CHART

BRAND = "brand"


@pytest.fixture(scope="module")
def brand(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The second release, installed with the objects and values of docs/install.md."""
    second = Shop(shop.cluster, BRAND, BRAND)
    second.create_namespace()
    second.kubectl("apply", "--filename=-", stdin=block("restrictions"))
    second.start_servers()
    values = tmp_path_factory.mktemp("brand") / "values.yaml"
    values.write_text(block("restricted values"))
    second.helm("install", BRAND, str(CHART), f"--values={values}", *WAIT)
    yield second
    second.helm("uninstall", BRAND, *WAIT)
    shop.kubectl("delete", "namespace", BRAND)


def test_two_releases_that_share_kafka_sell_the_same_item_exactly(shop: Shop, brand: Shop) -> None:
    for each in (shop, brand):
        each.declare("cup", 50)
        each.start_load("cups", "stampede.js", ITEM_ID="cup", STOCK=50, RATE=30, DURATION="5s")
    for each in (shop, brand):
        promises = each.end_load("cups")
        assert len(promises) == 50
        each.check("cup", 50, promises)
        each.until_sale("cup", "SoldOut")
        each.agrees()


def test_a_restricted_release_passes_helm_test(brand: Shop) -> None:
    assert "Failed" not in brand.helm("test", BRAND, "--timeout=2m")


def test_a_rollout_ends_in_a_full_quota(brand: Shop) -> None:
    brand.declare("full", 1_000_000)
    brand.start_buyers("full", RATE=10)
    pods = brand.get("resourcequota", "tenant")["status"]
    assert pods["used"]["pods"] == pods["hard"]["pods"]
    changed = [f"--set={component}.image.tag={CHANGED}" for component in COMPONENTS]
    brand.helm("upgrade", BRAND, str(CHART), "--reuse-values", *changed, *WAIT)
    brand.check("full", 1_000_000, brand.end_buyers("full"))


def test_a_quota_limits_the_flashsales_of_a_namespace(brand: Shop) -> None:
    def refused() -> bool:
        # Another name each time, because an attempt before the quota counts makes an object.
        sale = flash_sale("more", stock=1, paused=True)
        sale["metadata"] = {"generateName": "more-"}
        output = brand.kubectl("create", "--filename=-", stdin=json.dumps(sale), check=False)
        return "exceeded quota: tenant" in output and "flashsales.flashsale.dev=3" in output

    brand.until(refused, "Kubernetes refuses a FlashSale above the quota")


def test_kubectl_wait_times_out_until_an_operator_serves_the_flashsale(shop: Shop) -> None:
    operator = f"deployment/{shop.release}-flashsale-operator"
    shop.declare("waited", 10)
    wait = ("wait", "flashsale/waited", "--for=condition=Ready")
    shop.kubectl(*wait, "--timeout=30s")
    shop.kubectl("scale", operator, "--replicas=0", "--timeout=1m")
    shop.until(lambda: not shop.pods("operator"), "the operator's pod is gone")
    shop.kubectl("patch", "flashsale/waited", "--type=merge", '--patch={"spec":{"stock":11}}')
    assert "timed out" in shop.kubectl(*wait, "--timeout=3s", check=False)
    shop.kubectl("scale", operator, "--replicas=1")
    shop.kubectl(*wait, "--timeout=1m")
