"""Scaling, killing and upgrading pods while buyers arrive loses no reservation."""

import pytest

from tests.e2e.shop import CHANGED, COMPONENTS, OUTLASTS, RELEASE, SECONDS, WAIT, Shop
from tests.support.paths import CHART

PLENTY = 1_000_000
LABEL = "app.kubernetes.io/component"


def deployment(component: str) -> str:
    return f"deployment/{RELEASE}-flashsale-{component}"


def test_scaling_out_and_in_loses_nothing(shop: Shop) -> None:
    shop.declare("scaled", PLENTY)
    shop.start_load("scaling", "persistent.js", ITEM_ID="scaled", DURATION="90s")
    shop.selling("scaling")
    for api, consumer in ((3, 2), (1, 1)):
        shop.kubectl("scale", deployment("api"), f"--replicas={api}")
        shop.kubectl("scale", deployment("consumer"), f"--replicas={consumer}")
        shop.roll_out("api", "consumer")
    shop.still_selling("scaling")
    shop.check("scaled", PLENTY, shop.end_load("scaling"))


def test_killing_pods_loses_nothing(shop: Shop) -> None:
    shop.declare("killed", PLENTY)
    shop.start_load("killing", "persistent.js", ITEM_ID="killed", DURATION="75s", CUT="allowed")
    shop.selling("killing")
    for component in (*COMPONENTS, *COMPONENTS):
        shop.kubectl(
            "delete", "pod", f"--selector={LABEL}={component}", "--force", "--grace-period=0"
        )
        shop.roll_out(component)
    shop.still_selling("killing")
    promises = shop.end_load("killing")
    shop.check("killed", PLENTY, promises)
    shop.agrees()


@pytest.mark.parametrize("server", ["redis", "kafka", "postgres"])
def test_replacing_the_pod_of_a_server_loses_nothing(shop: Shop, server: str) -> None:
    sale = f"without-{server}"
    shop.declare(sale, PLENTY)
    # Only an outage of Redis is visible to buyers.
    away = "allowed" if server == "redis" else "never"
    shop.start_load(sale, "persistent.js", ITEM_ID=sale, DURATION="60s", AWAY=away)
    shop.selling(sale)
    shop.kubectl("delete", "pod", f"{server}-0")
    shop.kubectl("rollout", "status", f"statefulset/{server}", f"--timeout={SECONDS:.0f}s")
    shop.still_selling(sale)
    shop.check(sale, PLENTY, shop.end_load(sale))
    shop.agrees()
    shop.until_sale(sale, "Selling")


def test_an_upgrade_and_its_rollback_lose_nothing(shop: Shop) -> None:
    shop.declare("upgraded", PLENTY)
    shop.start_load("upgrading", "persistent.js", ITEM_ID="upgraded", DURATION=OUTLASTS)
    shop.selling("upgrading")
    before = shop.images()
    changed = [f"--set={component}.image.tag={CHANGED}" for component in COMPONENTS]
    shop.helm("upgrade", RELEASE, str(CHART), "--reuse-values", *changed, *WAIT)
    shop.until(lambda: shop.images() == {CHANGED}, "all pods have the new image")
    shop.helm("rollback", RELEASE, *WAIT)
    shop.until(lambda: shop.images() == before, "all pods have the old image")
    shop.still_selling("upgrading")
    shop.check("upgraded", PLENTY, shop.end_load("upgrading"))
