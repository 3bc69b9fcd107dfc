"""Holds are confirmed, cancelled and expire in the cluster, also if the API's pod is replaced."""

from collections import Counter
from typing import Any

import yaml

from tests.e2e.shop import Object, Shop
from tests.support.manifests import flash_sale
from tests.support.paths import ROOT

STOCK = 100
LEFT = 20


def concert() -> Object:
    """Return the sample with a smaller stock and a shorter hold."""
    sample: Object = yaml.safe_load((ROOT / "k8s" / "samples" / "concert-tickets.yaml").read_text())
    sample["spec"] |= {"stock": STOCK, "holdSeconds": 5}
    return sample


def states(shop: Shop, sale: str) -> dict[str, tuple[str, str | None]]:
    """Return the state and the order reference of each reservation in the ledger."""
    rows = shop.rows(sale, "reservation_id, state, order_ref")
    return {reservation: (state, order) for reservation, state, order in rows}


def units(shop: Shop, sale: str) -> dict[str, Any]:
    """Return the units in the FlashSale's status."""
    status = shop.get("fs", sale)["status"]
    return {name: status[name] for name in ("available", "held", "confirmed")}


def events(shop: Shop, sale: str) -> Counter[str]:
    """Return how many Events of each reason the sale has."""
    selector = f"--field-selector=involvedObject.name={sale},involvedObject.kind=FlashSale"
    return Counter(each["reason"] for each in shop.get("events", selector)["items"])


def test_a_crowd_of_whom_a_part_pays_confirms_every_unit(shop: Shop) -> None:
    manifest = concert()
    sale = manifest["metadata"]["name"]
    shop.apply(manifest)
    shop.until_sale(sale, "Selling")
    variables = {"ITEM_ID": manifest["spec"]["itemId"], "STOCK": STOCK, "HOLD": "5s"}
    shop.start_load("checkout", "checkout.js", RATE=30, DURATION="10s", **variables)
    promises = shop.end_load("checkout")

    def ended() -> bool:
        return Counter(state for state, _ in states(shop, sale).values())["held"] == 0

    shop.until(ended, "the ledger has no open hold")
    found = states(shop, sale)
    assert found.keys() == {each.reservation for each in promises}
    count = Counter(state for state, _ in found.values())
    assert count["confirmed"] == STOCK
    assert count["cancelled"]
    assert count["expired"], "every buyer paid"
    orders = [order for state, order in found.values() if state == "confirmed"]
    assert None not in orders
    assert len(set(orders)) == STOCK

    shop.until_sale(sale, "SoldOut")
    sold = {"available": 0, "held": 0, "confirmed": STOCK}
    shop.until(lambda: units(shop, sale) == sold, "the status shows every unit confirmed")
    assert events(shop, sale)["HoldExpired"] == 1
    shop.agrees()


def test_the_holds_of_a_killed_pod_expire_and_their_units_are_for_sale_again(shop: Shop) -> None:
    shop.apply(flash_sale("left", stock=2 * LEFT, holdSeconds=45))
    shop.until_sale("left", "Selling")
    shop.start_load("leaving", "persistent.js", ITEM_ID="left", RATE=LEFT, DURATION="1s")
    promises = {each.reservation for each in shop.end_load("leaving")}
    assert promises
    assert {state for state, _ in states(shop, "left").values()} <= {"held"}
    api = "--selector=app.kubernetes.io/component=api"
    shop.kubectl("delete", "pod", api, "--force", "--grace-period=0")
    shop.roll_out("api")

    def expired() -> bool:
        return states(shop, "left") == dict.fromkeys(promises, ("expired", None))

    shop.until(expired, "the ledger has every hold as expired")
    back = {"available": 2 * LEFT, "held": 0, "confirmed": 0}
    shop.until(lambda: units(shop, "left") == back, "the status shows every unit available")
    assert events(shop, "left")["HoldExpired"] == 1
    shop.agrees()
