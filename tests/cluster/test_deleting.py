"""Deleting a FlashSale closes its sale without blocking. Unfinished work is done later."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dev.services import OperatorServer
from dev.stack.servers import KafkaServer
from tests.support.cluster import World, reserve, reserve_until
from tests.support.eventually import eventually

pytestmark = pytest.mark.slow


def closed_in_ledger(world: World, item: str) -> bool:
    return bool(world.on_ledger("SELECT closed FROM sales WHERE item_id = $1", item))


def closed_in_redis(world: World, item: str) -> bool:
    return world.sale(item)["state"] == "closed"


def test_a_deletion_during_a_redis_outage_returns_and_is_completed_later(
    world: World, operator: OperatorServer
) -> None:
    world.apply("alone")
    world.until("alone", state="Selling")
    world.redis.stop()
    world.until("alone", ready="RedisUnavailable")
    world.delete("alone")
    assert "NotFound" in world.kubectl("get", "fs", "alone", check=False)
    eventually(lambda: closed_in_ledger(world, "alone"))
    operator.kill()
    world.redis.start()
    assert not closed_in_redis(world, "alone")
    operator.start()
    eventually(lambda: closed_in_redis(world, "alone"))


def test_a_deletion_without_an_operator_is_completed_later(
    world: World, operator: OperatorServer
) -> None:
    world.apply("unseen")
    world.until("unseen", state="Selling")
    operator.kill()
    world.delete("unseen")
    operator.start()
    eventually(lambda: closed_in_redis(world, "unseen"))
    assert closed_in_ledger(world, "unseen")
    eventually(lambda: world.events("unseen") == ["Opened", "Closed"])


def test_a_sale_applied_with_flashsalectl_stays_open(
    world: World, operator: OperatorServer
) -> None:
    world.apply("declared")
    world.until("declared", state="Selling")
    world.on_ledger(
        "UPDATE sales SET resource_uid = NULL, sale_id = $1 || '/by-hand' "
        "WHERE item_id = 'declared'",
        world.namespace,
    )
    world.apply("other", item="another")
    world.until("other", state="Selling")
    before = operator.get("/metrics").partition("last_success_timestamp_seconds ")[2]
    eventually(
        lambda: operator.get("/metrics").partition("last_success_timestamp_seconds ")[2] != before
    )
    assert not closed_in_ledger(world, "declared")


@contextmanager
def deleted_slowly(world: World, name: str) -> Iterator[None]:
    """Run `kubectl delete` for an object that a foreign finalizer keeps until the end."""

    def finalizers(*names: str) -> None:
        patch = json.dumps({"metadata": {"finalizers": names}})
        world.kubectl("patch", "fs", name, "--type=merge", "-p", patch)

    finalizers("example.test/hold")
    world.kubectl("delete", "fs", name, "--wait=false")
    try:
        yield
    finally:
        finalizers()


def test_a_foreign_finalizer_does_not_delay_closing_the_sale(
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    world.apply("bound")
    world.until("bound", state="Selling")
    with deleted_slowly(world, "bound"):
        world.until("bound", state="Closing")
        assert closed_in_redis(world, "bound")
    eventually(lambda: world.events("bound") == ["Opened", "Closed"])


def test_a_foreign_finalizer_does_not_delay_closing_a_sale_with_a_wrong_spec(
    world: World, operator: OperatorServer
) -> None:
    """Since the sale was opened, the item has become another namespace's."""
    world.apply("moved")
    world.until("moved", state="Selling")
    operator.stop()
    world.operator(FLASHSALE_ITEMS=f"{world.namespace}=own-")
    world.until("moved", ready="InvalidSpec")
    with deleted_slowly(world, "moved"):
        world.until("moved", state="Closing", ready="Closed")
        assert closed_in_redis(world, "moved")


def test_a_deleted_flashsale_that_never_had_its_item_is_closed(
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    world.apply("first", item="one")
    world.until("first", state="Selling")
    world.apply("second", item="one")
    world.until("second", state="ItemConflict")
    with deleted_slowly(world, "second"):
        world.until("second", state="Closing", ready="Closed")
        world.until("first", state="Selling", ready="Applied")


def test_keys_of_a_closed_sale_are_freed_once_the_ledger_has_everything(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API and the consumer need it
    world: World,
) -> None:
    operator = world.operator(FLASHSALE_KEEP_CLOSED_SECONDS="0")
    api = world.api()
    world.apply("sold", stock=3)
    world.apply("unsold", stock=3)
    for name in ("sold", "unsold"):
        world.until(name, state="Selling")
    reserve_until(api, "sold", (202, ""))
    for name in ("sold", "unsold"):
        world.delete(name)
    eventually(lambda: world.sale("unsold") == {})
    assert closed_in_redis(world, "sold")
    world.consumer()
    eventually(lambda: world.sale("sold") == {})
    assert "flashsale_operator_sales_freed_total 2.0" in operator.get("/metrics")
    reserve_until(api, "sold", (404, "unknown-item"))

    # Only the ledger has the sold unit now. The same sale continues from it.
    world.apply("sold", stock=3)
    world.until("sold", state="Selling", ready="Applied")
    world.until_available("sold", 2)
    world.apply("new-name", item="unsold", stock=2)
    world.until("new-name", state="Selling", ready="Applied")
    assert reserve(api, "unsold")[0] == 202
