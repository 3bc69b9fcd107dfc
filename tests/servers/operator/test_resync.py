"""The decisions of a resync, and the script that frees the keys of a closed sale."""

from dataclasses import replace
from datetime import timedelta

import pytest

from flashsale import keys
from flashsale.inventory import Freed
from flashsale.keys import DEFAULT_ENGINE, ItemKeys
from flashsale.ledger import SaleRow
from flashsale.reservations import Outcome
from flashsale.sale import Sale, SaleSpec
from flashsale_operator.kubernetes.queue import Key
from flashsale_operator.kubernetes.resync import left_behind, may_be_freed, unclosed
from tests.support.observations import a_row, a_sale
from tests.support.simulated_shop import SimulatedShop

HOUR, NOTHING = timedelta(hours=1), timedelta()
CLOSED = a_sale(stored_state="closed", revision=2)
CLOSED_ROW = a_row(closed=True, revision=2)


def test_an_unclosed_sale_of_a_deleted_flashsale_is_found() -> None:
    rows = [a_row(sale_id="shop/here"), a_row(sale_id="shop/gone"), a_row(sale_id="yard/gone")]
    present = [Key("shop", "here"), Key("yard", "here")]
    assert left_behind(rows, present, ()) == [Key("shop", "gone"), Key("yard", "gone")]


def test_sales_of_other_namespaces_are_ignored() -> None:
    rows = [a_row(sale_id="shop/gone"), a_row(sale_id="yard/gone")]
    assert left_behind(rows, [], ("yard",)) == [Key("yard", "gone")]


@pytest.mark.parametrize(
    ("row", "sale", "expected"),
    [
        (CLOSED_ROW, a_sale(), True),
        (CLOSED_ROW, a_sale(stored_state="ended"), True),
        (CLOSED_ROW, CLOSED, False),
        (CLOSED_ROW, a_sale(stored_state="ended", revision=2), False),
        (a_row(), a_sale(), False),
        (a_row(), CLOSED, False),
    ],
)
def test_a_close_that_redis_lacks_is_found(row: SaleRow, sale: Sale, expected: bool) -> None:
    assert unclosed(row, sale) is expected


def test_a_closed_sale_may_be_freed_if_it_is_recorded_and_old_enough() -> None:
    assert may_be_freed(CLOSED_ROW, CLOSED, HOUR, HOUR)
    assert not may_be_freed(CLOSED_ROW, CLOSED, HOUR - timedelta(seconds=1), HOUR)
    assert not may_be_freed(a_row(), a_sale(), HOUR, NOTHING)
    assert not may_be_freed(CLOSED_ROW, a_sale(stored_state="closed"), HOUR, NOTHING)
    for sale in (replace(CLOSED, outbox_length=1), replace(CLOSED, accepted=1)):
        assert not may_be_freed(CLOSED_ROW, sale, HOUR, NOTHING)


async def test_keys_are_freed_after_everything_is_recorded(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    async def free() -> Freed:
        row = await shop.row(spec.sale_id)
        return await shop.inventory.free(spec.item_id, spec.sale_id, row.revision, row.accepted)

    assert await free_unknown(shop, spec) is Freed.UNKNOWN
    await shop.apply(spec)
    assert await shop.buy(spec.item_id, "ada") == [Outcome.ACCEPTED]
    assert await free() is Freed.OPEN
    await shop.reconciler.close(spec.sale_id)
    assert await free() is Freed.UNRECORDED
    await shop.record(spec.item_id)
    assert await shop.inventory.free(spec.item_id, "other/sale", 2, 1) is Freed.UNKNOWN
    assert await shop.inventory.free(spec.item_id, spec.sale_id, 1, 1) is Freed.OPEN
    assert await shop.inventory.free(spec.item_id, spec.sale_id, 2, 0) is Freed.UNRECORDED
    assert spec.item_id in await shop.inventory.items()
    assert await free() is Freed.FREED
    assert await shop.redis.exists(*ItemKeys.of(spec.item_id).four) == 0
    assert not await shop.redis.sismember(keys.items(DEFAULT_ENGINE), spec.item_id)
    assert await free() is Freed.UNKNOWN


async def free_unknown(shop: SimulatedShop, spec: SaleSpec) -> Freed:
    return await shop.inventory.free(spec.item_id, spec.sale_id, 1, 0)


async def test_keys_are_not_freed_while_the_outbox_has_events(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "ada")
    await shop.reconciler.close(spec.sale_id)
    assert await shop.inventory.free(spec.item_id, spec.sale_id, 2, 1) is Freed.UNRECORDED
    assert await shop.redis.xlen(ItemKeys.of(spec.item_id).outbox) == 1


async def test_the_row_of_a_sale_has_the_uid_of_its_flashsale(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.reconciler.reconcile(spec, "uid-1")
    assert (await shop.row(spec.sale_id)).resource_uid == "uid-1"
    await shop.apply(spec)
    assert (await shop.row(spec.sale_id)).resource_uid == "uid-1"
    await shop.reconciler.reconcile(spec, "uid-2")
    assert (await shop.row(spec.sale_id)).resource_uid == "uid-2"
    assert (await shop.row(spec.sale_id)).revision == 1


async def test_a_flashsale_adopts_a_sale_of_flashsalectl(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    assert (await shop.row(spec.sale_id)).resource_uid is None
    await shop.reconciler.reconcile(spec, "uid-1")
    assert (await shop.row(spec.sale_id)).resource_uid == "uid-1"
