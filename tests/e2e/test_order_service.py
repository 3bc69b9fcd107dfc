"""The example of an order service in the cluster. It confirms or cancels every hold."""

import json
from collections import Counter

from tests.e2e.shop import RELEASE, Object, Shop
from tests.support.manifests import flash_sale
from tests.support.paths import ROOT

NAME = "order-service"
SALE = "paid"
EXAMPLE = ROOT / "examples" / "order-service" / "order_service.py"
HARDENED: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def pod(image: str) -> Object:
    """Make a pod that runs the example in the consumer's image, which has aiokafka."""
    token = {"secretKeyRef": {"name": "orders", "key": "tokens"}}
    container: Object = {
        "name": NAME,
        "image": image,
        "command": ["python3", f"/example/{EXAMPLE.name}"],
        "args": [
            f"--engine={RELEASE}-flashsale",
            "--kafka=kafka:9092",
            f"--orders=http://{RELEASE}-flashsale-orders",
            "--decline-rate=0.3",
        ],
        "env": [{"name": "FLASHSALE_ORDER_TOKENS", "valueFrom": token}],
        "securityContext": HARDENED,
        "volumeMounts": [{"name": "example", "mountPath": "/example"}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": NAME},
        "spec": {
            "securityContext": {
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "example", "configMap": {"name": NAME}}],
        },
    }


def test_the_example_confirms_or_cancels_every_hold(shop: Shop) -> None:
    shop.kubectl("create", "configmap", NAME, f"--from-file={EXAMPLE}")
    consumer = shop.get("deployment", f"{RELEASE}-flashsale-consumer")
    (container,) = consumer["spec"]["template"]["spec"]["containers"]
    shop.apply(pod(container["image"]))

    shop.apply(flash_sale(SALE, stock=1_000_000, holdSeconds=600))
    shop.until_sale(SALE, "Selling")
    shop.start_load("paying", "persistent.js", ITEM_ID=SALE, DURATION="20s")
    promised = {each.reservation for each in shop.end_load("paying")}

    def states() -> dict[str, str]:
        query = (
            "SELECT json_object_agg(reservation_id, state) FROM reservations "
            f"WHERE sale_id = '{shop.namespace}/{SALE}'"
        )
        psql = ("psql", "--username=flashsale", "--tuples-only", f"--command={query}")
        found: dict[str, str] = json.loads(shop.kubectl("exec", "postgres-0", "--", *psql))
        return found

    def paid() -> bool:
        return states().keys() == promised and "held" not in states().values()

    shop.until(paid, "every hold is confirmed or cancelled")
    assert set(states().values()) == {"confirmed", "cancelled"}
    expected = Counter(
        {"confirmed": "ship", "cancelled": "void"}[each] for each in states().values()
    )

    def decided() -> bool:
        output = shop.kubectl("logs", NAME).splitlines()  # lines about outages, too
        lines = [json.loads(line) for line in output if line.startswith("{")]
        own = [each for each in lines if each["itemId"] == SALE]
        last = {each["reservationId"]: each["decision"] for each in own}
        return Counter(last.values()) == expected

    shop.until(decided, "the example has decided on every reservation as the ledger has it")
    shop.kubectl("delete", "pod", NAME, "--grace-period=1")
    shop.agrees()
