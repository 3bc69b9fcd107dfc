"""Hundreds of FlashSales at the same time."""

import json

import pytest

from dev.services import OperatorServer
from tests.support.cluster import World
from tests.support.eventually import eventually

pytestmark = pytest.mark.slow

MANY = 200


def test_200_flashsales_applied_at_once_all_become_ready_and_close(
    world: World, operator: OperatorServer
) -> None:
    manifests = [world.manifest(f"sale-{number}") for number in range(MANY)]
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    world.kubectl("apply", "-f", "-", stdin=listed)

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
