"""Scaling, killing and upgrading pods while buyers arrive loses no reservation."""

import pytest

from tests.e2e.shop import CHANGED, COMPONENTS, RELEASE, SECONDS, WAIT, Shop
from tests.support.paths import CHART

PLENTY = 1_000_000
LABEL = "app.kubernetes.io/component"


def deployment(component: str) -> str:
    return f"deployment/{RELEASE}-flashsale-{component}"


def test_scaling_out_and_in_loses_nothing(shop: Shop) -> None:
    shop.declare("scaled", PLENTY)
    shop.start_buyers("scaled")
    for api, consumer in ((3, 2), (1, 1)):
        shop.kubectl("scale", deployment("api"), f"--replicas={api}")
        shop.kubectl("scale", deployment("consumer"), f"--replicas={consumer}")
        shop.roll_out("api", "consumer")
    shop.check("scaled", PLENTY, shop.end_buyers("scaled"))


def test_killing_pods_loses_nothing(shop: Shop) -> None:
    shop.declare("killed", PLENTY)
    shop.start_buyers("killed", CUT="allowed")
    for component in (*COMPONENTS, *COMPONENTS):
        shop.kubectl(
            "delete", "pod", f"--selector={LABEL}={component}", "--force", "--grace-period=0"
        )
        shop.roll_out(component)
    shop.check("killed", PLENTY, shop.end_buyers("killed"))
    shop.agrees()


@pytest.mark.parametrize("server", ["redis", "kafka", "postgres"])
def test_replacing_the_pod_of_a_server_loses_nothing(shop: Shop, server: str) -> None:
    sale = f"without-{server}"
    shop.declare(sale, PLENTY)
    # Only an outage of Redis is visible to buyers.
    away = "allowed" if server == "redis" else "never"
    shop.start_buyers(sale, AWAY=away)
    shop.kubectl("delete", "pod", f"{server}-0")
    shop.kubectl("rollout", "status", f"statefulset/{server}", f"--timeout={SECONDS:.0f}s")
    shop.check(sale, PLENTY, shop.end_buyers(sale))
    shop.agrees()


def test_an_upgrade_and_its_rollback_lose_nothing(shop: Shop) -> None:
    shop.declare("upgraded", PLENTY)
    shop.start_buyers("upgraded")
    before = shop.images()
    changed = [f"--set={component}.image.tag={CHANGED}" for component in COMPONENTS]
    shop.helm("upgrade", RELEASE, str(CHART), "--reuse-values", *changed, *WAIT)
    shop.until(lambda: shop.images() == {CHANGED}, "all pods have the new image")
    shop.helm("rollback", RELEASE, *WAIT)
    shop.until(lambda: shop.images() == before, "all pods have the old image")
    shop.check("upgraded", PLENTY, shop.end_buyers("upgraded"))
