"""Hundreds of FlashSales at the same time, and a pause next to them."""

import json

import pytest

from dev.services import OperatorServer
from tests.support.cluster import World
from tests.support.eventually import eventually

pytestmark = pytest.mark.slow

MANY = 200


def apply_many(world: World) -> None:
    manifests = [world.manifest(f"sale-{number}") for number in range(MANY)]
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    world.kubectl("apply", "-f", "-", stdin=listed)


def test_200_flashsales_applied_at_once_all_become_ready_and_close(
    world: World, operator: OperatorServer
) -> None:
    apply_many(world)

    def ready() -> bool:
        items = json.loads(world.kubectl("get", "fs", "-o", "json"))["items"]
        conditions = [
            (condition["status"], condition["reason"])
            for live in items
            for condition in live.get("status", {}).get("conditions", [])
            if condition["type"] == "Ready"
        ]
        return conditions == [("True", "Applied")] * MANY

    eventually(ready)
    assert f'flashsale_operator_sales{{state="Selling"}} {MANY}.0' in operator.get("/metrics")
    assert operator.get("/metrics").count("flashsale_sale_available_units{") == MANY
    world.kubectl("delete", "fs", "--all", "--timeout=60s")
    eventually(lambda: world.on_ledger("SELECT count(*) FROM sales WHERE NOT closed") == 0)
    eventually(lambda: "flashsale_sale_available_units{" not in operator.get("/metrics"))


def test_a_pause_does_not_wait_behind_200_new_flashsales(
    world: World, operator: OperatorServer
) -> None:
    world.apply("cup")
    world.until("cup", state="Selling", ready="Applied")
    # The suspended operator gets all of them at once, and the pause last.
    operator.pause()
    apply_many(world)
    world.kubectl("patch", "fs", "cup", "--type=merge", "-p", '{"spec":{"paused":true}}')
    operator.resume()
    eventually(lambda: "Paused" in world.events("cup"))
    world.until(f"sale-{MANY - 1}", ready="Applied")
    listed = json.loads(world.kubectl("get", "events", "--output=json"))["items"]
    in_order = sorted(listed, key=lambda each: int(each["metadata"]["resourceVersion"]))
    reasons = [each["reason"] for each in in_order]
    assert reasons[reasons.index("Paused") :].count("Opened") > MANY / 2
