"""Apply, edit and delete FlashSales with kubectl. Check answers, status and Events."""

import json

import pytest

from dev.services import OperatorServer
from dev.stack.servers import KafkaServer
from tests.support.cluster import World, in_seconds, reserve, reserve_until
from tests.support.eventually import eventually

pytestmark = pytest.mark.slow


def test_kubectl_alone_controls_a_whole_sale(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API needs it
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    api = world.api()
    reserve_until(api, "phone", (404, "unknown-item"))

    world.apply("phone", stock=2)
    live = world.until("phone", state="Selling", ready="Applied")
    assert live["status"]["saleId"] == f"{world.namespace}/phone"
    assert live["status"]["observedGeneration"] == 1
    assert not live["metadata"].get("finalizers")
    assert not [name for name in live["metadata"]["annotations"] if "kubectl" not in name]
    reserve_until(api, "phone", (202, ""))
    assert reserve(api, "phone")[0] == 202
    reserve_until(api, "phone", (409, "sold-out"))
    world.until("phone", state="SoldOut", ready="Applied")
    world.until_available("phone", 0)

    world.apply("phone", stock=3)
    world.until("phone", state="Selling")
    reserve_until(api, "phone", (202, ""))
    world.until("phone", state="SoldOut")

    world.apply("phone", stock=5, paused=True)
    world.until("phone", state="Paused")
    reserve_until(api, "phone", (409, "paused"))
    world.apply("phone", stock=5, paused=False)
    world.until("phone", state="Selling")
    reserve_until(api, "phone", (202, ""))

    world.apply("phone", stock=5, endsAt=in_seconds(2))
    world.until("phone", state="Ended", ready="Applied")
    reserve_until(api, "phone", (409, "ended"))

    world.delete("phone")
    eventually(lambda: world.sale("phone")["revision"] == str(_revision(world, "phone")))
    assert world.on_ledger("SELECT closed FROM sales WHERE item_id = 'phone'")
    eventually(lambda: "Closed" in world.events("phone"))
    history = "Opened SoldOut Restocked SoldOut Restocked Paused Resumed Ended Closed"
    assert world.events("phone") == history.split()


def _revision(world: World, name: str) -> int:
    found = world.on_ledger(
        "SELECT revision FROM sales WHERE sale_id = $1", f"{world.namespace}/{name}"
    )
    return int(found)


def test_a_window_opens_and_ends_automatically(
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    world.apply("soon", startsAt=in_seconds(3600), endsAt=in_seconds(7200))
    scheduled = world.until("soon", state="Scheduled", ready="Applied")
    open_since = world.condition("soon", "Open")["lastTransitionTime"]
    assert world.events("soon") == []
    world.patch("soon", startsAt=in_seconds(3), endsAt=in_seconds(3600))
    world.until("soon", state="Selling")
    assert world.condition("soon", "Open")["lastTransitionTime"] > open_since
    ready = {c["type"]: c["lastTransitionTime"] for c in scheduled["status"]["conditions"]}["Ready"]
    world.patch("soon", endsAt=in_seconds(3))
    ended = world.until("soon", state="Ended", ready="Applied")
    since = {c["type"]: c["lastTransitionTime"] for c in ended["status"]["conditions"]}
    assert since["Ready"] == ready
    eventually(lambda: world.events("soon") == ["Opened", "Ended"])


def test_a_stock_below_the_units_of_buyers_is_reported_and_the_sale_continues(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API needs it
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    api = world.api()
    world.apply("held", stock=5)
    world.until("held", state="Selling")
    for _ in range(3):
        reserve_until(api, "held", (202, ""))
    world.apply("held", stock=1)
    world.until("held", state="SoldOut", ready="StockBelowHeld")
    ready = world.condition("held", "Ready")
    assert (ready["status"], ready["message"]) == (
        "False",
        "spec.stock 1 is below the 3 units that buyers have, so 3 stay allocated",
    )
    assert world.sale("held")["allocated"] == "3"
    world.apply("held", stock=4)
    world.until("held", state="Selling", ready="Applied")
    reserve_until(api, "held", (202, ""))
    reserve_until(api, "held", (409, "sold-out"))


def test_a_sold_out_sale_with_open_holds_sells_again_after_they_expire(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API and the consumer need it
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    api = world.api()
    world.consumer()
    # The operator looks at the sale every five seconds, and must see it sold out.
    world.apply("tickets", stock=2, holdSeconds=20)
    world.until("tickets", state="Selling", ready="Applied")
    reserve_until(api, "tickets", (202, ""))
    assert reserve(api, "tickets")[0] == 202
    world.until("tickets", state="SoldOut")
    assert world.condition("tickets", "SoldOut")["message"] == (
        "no units are available: 2 units held, which may come back"
    )
    status = world.get("tickets")["status"]
    assert {name: status[name] for name in ("available", "held", "confirmed")} == {
        "available": 0,
        "held": 2,
        "confirmed": 0,
    }
    live = world.until("tickets", state="Selling")
    assert live["status"]["available"] > 0
    eventually(lambda: world.get("tickets")["status"].get("holdExpired") is True)
    eventually(
        lambda: (
            world.events("tickets").count("HoldExpired") == 1
            and "SellingAgain" in world.events("tickets")
        )
    )
    world.until_available("tickets", 2)
    eventually(lambda: world.get("tickets")["status"]["held"] == 0)


def test_a_second_sale_of_an_item_waits_for_the_first(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API and the consumer need it
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    api = world.api()
    world.apply("first", item="shared", stock=3)
    world.until("first", state="Selling")
    reserve_until(api, "shared", (202, ""))
    world.apply("second", item="shared", stock=7)
    world.until("second", state="ItemConflict", ready="ItemConflict")
    assert f"{world.namespace}/first" in world.condition("second", "Ready")["message"]
    world.until("first", state="Selling", ready="Applied")

    world.delete("first")
    eventually(lambda: "Closed" in world.events("first"))
    eventually(lambda: "not fully recorded" in world.condition("second", "Ready")["message"])
    assert world.sale("shared")["sale_id"] == f"{world.namespace}/first"
    world.consumer()
    world.until("second", state="Selling", ready="Applied")
    world.until_available("second", 7)
    reserve_until(api, "shared", (202, ""))
    assert world.events("second") == ["ItemConflict", "Opened"]


def test_deleting_and_applying_the_same_flashsale_continues_its_sale(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API needs it
    world: World,
    operator: OperatorServer,
) -> None:
    api = world.api()
    world.apply("again", stock=3)
    world.until("again", state="Selling")
    for user in ("ada", "bob"):
        assert reserve(api, "again", user)[0] == 202
    world.delete("again")
    # A buyer at her limit cannot take the last unit before the sale is closed.
    reserve_until(api, "again", (409, "ended"), user="ada")
    eventually(lambda: 'item="again"' not in operator.get("/metrics"))
    world.apply("again", stock=3)
    world.until("again", state="Selling", ready="Applied")
    world.until_available("again", 1)
    assert reserve(api, "again", "ada") == (409, "limit-reached")
    reserve_until(api, "again", (202, ""))
    reserve_until(api, "again", (409, "sold-out"))
    assert world.sale("again")["accepted"] == "3"


def test_a_changed_item_is_refused_with_the_rule(world: World) -> None:
    world.apply("fixed")
    patch = '{"spec":{"itemId":"other"}}'
    output = world.kubectl("patch", "fs", "fixed", "--type=merge", "-p", patch, check=False)
    assert "spec.itemId: Invalid value" in output
    assert "is immutable" in output


def test_kubectl_get_shows_item_state_stock_and_window(
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    world.apply("a-selling", stock=100, endsAt="2999-01-01T00:00:00Z")
    world.apply("b-later", stock=5, startsAt="2998-11-27T09:00:00Z")
    world.until("a-selling", state="Selling")
    world.until("b-later", state="Scheduled")
    table = [" ".join(line.split()) for line in world.kubectl("get", "fs").splitlines()]
    assert table[0] == "NAME ITEM STATE READY STOCK AVAILABLE HELD STARTS ENDS AGE"
    assert table[1].startswith("a-selling a-selling Selling True 100 100 0 2999-01-01T00:00:00Z ")
    assert table[2].startswith("b-later b-later Scheduled True 5 5 0 2998-11-27T09:00:00Z ")


def test_an_end_in_the_past_is_a_warning(
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    world.apply("late", endsAt="2025-11-27T10:00:00Z")
    world.until("late", state="Ended", ready="Applied")
    selector = "--field-selector=involvedObject.name=late"
    (event,) = json.loads(world.kubectl("get", "events", "-o", "json", selector))["items"]
    assert (event["type"], event["reason"]) == ("Warning", "Ended")
    assert event["message"].startswith("the sale ended at 2025-11-27T10:00:00.000Z and accepted no")


def test_an_item_outside_the_prefix_of_its_namespace_names_the_rule(world: World) -> None:
    world.operator(FLASHSALE_ITEMS=f"{world.namespace}=home-,other=away-")
    world.apply("home-cup")
    world.until("home-cup", state="Selling", ready="Applied")
    world.apply("away-cup")
    world.until("away-cup", state="Unknown", ready="InvalidSpec")
    assert world.condition("away-cup", "Ready")["message"] == (
        f"spec.itemId: must begin with home- in the namespace {world.namespace} (operator.items)"
    )
    assert world.sale("away-cup") == {}


def test_the_status_has_room_for_the_conditions_of_many_other_controllers(
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    world.apply("cup")
    own = world.until("cup", state="Selling", ready="Applied")["status"]["conditions"]
    others = [{**own[0], "type": f"example.test/{number}"} for number in range(20)]
    patch = json.dumps({"status": {"conditions": [*own, *others]}})
    world.kubectl("patch", "fs", "cup", "--subresource=status", "--type=merge", "-p", patch)
    world.patch("cup", paused=True)
    after = world.until("cup", state="Paused", ready="Applied")["status"]["conditions"]
    assert len(after) == len(own) + len(others)


def test_managed_fields_and_events_name_the_operator(
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    world.apply("cup")
    world.until("cup", state="Selling", ready="Applied")
    eventually(lambda: world.events("cup") == ["Opened"])
    for kind, subresource in (("fs", "status"), ("events", None)):
        listed = json.loads(world.kubectl("get", kind, "-o", "json", "--show-managed-fields"))
        (live,) = listed["items"]
        writers = {
            each["manager"]
            for each in live["metadata"]["managedFields"]
            if each.get("subresource") == subresource
        }
        assert "flashsale-operator" in writers
        assert not [name for name in writers if "python" in name.lower()]


def test_kubectl_wait_waits_for_the_answer_to_the_last_change(
    world: World, operator: OperatorServer
) -> None:
    world.apply("cup")
    world.until("cup", state="Selling", ready="Applied")
    wait = ("wait", "fs/cup", "--for=condition=Ready")
    assert "condition met" in world.kubectl(*wait, "--timeout=0s")
    operator.pause()
    world.kubectl("patch", "fs", "cup", "--type=merge", "-p", '{"spec":{"paused":true}}')
    assert "timed out" in world.kubectl(*wait, "--timeout=3s", check=False)
    operator.resume()
    assert "condition met" in world.kubectl(*wait, "--timeout=60s")
    assert world.condition("cup", "Open")["reason"] == "Paused"
