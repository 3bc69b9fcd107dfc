"""Sales with holds on real stores: rebuilds, closes, freed keys and replaced sales."""

import asyncio
from dataclasses import replace

import pytest

from flashsale.inventory import Applied, Freed
from flashsale.keys import ItemKeys
from flashsale.reservations import (
    Expired,
    OrderCall,
    Outcome,
    Record,
    State,
    Transition,
    TransitionReply,
)
from flashsale.sale import Predecessor, SaleSpec, SaleState
from flashsale_operator.sales.decision import Reason, needs_rebuild, spec_of
from flashsale_operator.sales.rebuild import HOLD_MS, Rebuilt
from flashsale_operator.sales.recovery import Fenced, Recovery
from tests.support.eventually import until
from tests.support.fake_kube import resync_of
from tests.support.observations import NOW_MS, SPEC
from tests.support.simulated_shop import QUICK, SimulatedShop

ENDED = replace(SPEC, ends_ms=NOW_MS - 1)
LATER = replace(SPEC, ends_ms=NOW_MS + 1)


@pytest.fixture
def spec(item: str) -> SaleSpec:
    return SaleSpec(f"default/{item}", item, 10, max_per_user=2, hold_seconds=600)


@pytest.fixture
async def mixed(shop: SimulatedShop, spec: SaleSpec) -> SaleSpec:
    """A recorded sale with a reservation in each state, and two open holds."""
    await shop.apply(spec)
    await shop.buy(spec.item_id, "held", "confirmed", "cancelled", "refunded", "expired", "both")
    item_id = spec.item_id
    assert await shop.confirm(item_id, "confirmed", "order-7") is Transition.CHANGED
    assert await shop.cancel(item_id, "cancelled") is Transition.CHANGED
    assert await shop.confirm(item_id, "refunded", "order-8") is Transition.CHANGED
    assert await shop.cancel(item_id, "refunded", "order-8") is Transition.CHANGED
    await shop.expire(item_id, "expired")
    await shop.expire(item_id, "both")
    await shop.record(item_id)
    assert await shop.buy(item_id, "both") == [Outcome.ACCEPTED]
    await shop.record(item_id)
    return spec


async def records(shop: SimulatedShop, spec: SaleSpec) -> dict[str, Record]:
    texts = await shop.redis.hgetall(ItemKeys.of(spec.item_id).reservations)
    return {str(reservation_id): Record.parse(str(text)) for reservation_id, text in texts.items()}


async def test_a_rebuild_restores_every_state(shop: SimulatedShop, mixed: SaleSpec) -> None:
    keys = ItemKeys.of(mixed.item_id)
    before, sale = await records(shop, mixed), await shop.sale(mixed.item_id)
    buyers = await shop.redis.hgetall(keys.buyers)
    holds = await shop.redis.zrange(keys.holds, 0, -1)
    assert sale is not None
    assert (sale.accepted, sale.released, sale.held, sale.confirmed) == (7, 4, 2, 1)
    await shop.redis.flushall()
    assert isinstance(await shop.rebuild(mixed), Rebuilt)
    after = await shop.sale(mixed.item_id)
    assert after is not None
    assert (after.accepted, after.released, after.held, after.torn) == (7, 4, 2, False)
    assert (after.hold_ms, after.max_expired_holds) == (600_000, 3)
    assert await records(shop, mixed) == before
    assert await shop.redis.hgetall(keys.buyers) == buyers
    assert buyers["expired"] == "0,1"
    assert buyers["both"] == "1,1"
    assert buyers["cancelled"] == "0"
    assert sorted(await shop.redis.zrange(keys.holds, 0, -1)) == sorted(holds)
    assert len(holds) == 2


async def test_a_rebuilt_hold_can_be_confirmed_and_a_confirmed_one_keeps_its_order(
    shop: SimulatedShop, mixed: SaleSpec
) -> None:
    await shop.redis.flushall()
    await shop.rebuild(mixed)
    assert await shop.confirm(mixed.item_id, "confirmed", "order-7") is Transition.REPLAYED
    assert await shop.confirm(mixed.item_id, "confirmed", "order-9") is Transition.OTHER_ORDER
    assert await shop.cancel(mixed.item_id, "refunded") is Transition.REPLAYED
    assert await shop.confirm(mixed.item_id, "expired") is Transition.HOLD_EXPIRED
    row = await shop.row(mixed.sale_id)
    assert await shop.confirm(mixed.item_id, "held", "order-1") is Transition.CHANGED
    held = (await records(shop, mixed))[await shop.reservation_of(mixed.item_id, "held")]
    assert held.version > 1000 * row.revision, "no version from before the rebuild is given again"
    await shop.record(mixed.item_id)
    assert (await shop.row(mixed.sale_id)).held == 1


async def test_expired_holds_of_a_buyer_count_after_a_rebuild(
    shop: SimulatedShop, mixed: SaleSpec
) -> None:
    await shop.apply(replace(mixed, max_expired_holds=1))
    await shop.redis.flushall()
    await shop.rebuild(mixed)
    assert await shop.buy(mixed.item_id, "expired", "cancelled") == [
        Outcome.TOO_MANY_HOLDS,
        Outcome.ACCEPTED,
    ]


async def test_a_changed_hold_time_applies_to_new_reservations_only(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a")
    result = await shop.apply(replace(spec, hold_seconds=30))
    assert result.applied is Applied.CHANGED
    await shop.buy(spec.item_id, "b")
    await shop.apply(replace(spec, hold_seconds=None))
    await shop.buy(spec.item_id, "c")
    found = {record.user_id: record for record in (await records(shop, spec)).values()}
    lengths = {
        user: record.expires_ms and record.expires_ms - record.accepted_ms
        for user, record in found.items()
    }
    assert lengths == {"a": 600_000, "b": 30_000, "c": None}
    assert found["c"].state is State.CONFIRMED
    row = await shop.row(spec.sale_id)
    assert (row.hold_seconds, row.max_expired_holds) == (None, 3)


@pytest.mark.parametrize(("hold_seconds", "at_least_ms"), [(600, HOLD_MS), (20, 20_000)])
async def test_no_hold_expires_soon_after_a_rebuild(
    shop: SimulatedShop, spec: SaleSpec, hold_seconds: int, at_least_ms: int
) -> None:
    await shop.apply(replace(spec, hold_seconds=hold_seconds))
    await shop.buy(spec.item_id, "a", "b")
    await shop.record(spec.item_id)
    # Both were accepted long ago, and are overdue.
    await shop.pool.execute(
        "UPDATE reservations SET accepted_at = accepted_at - interval '1 day', "
        "expires_at = expires_at - interval '1 day'"
    )
    await shop.redis.flushall()
    began = (await shop.inventory.server()).now_ms
    await shop.rebuild(spec)
    ended = (await shop.inventory.server()).now_ms
    restored = (await records(shop, spec)).values()
    assert len(restored) == 2
    for record in restored:
        assert record.expires_ms is not None
        assert began + at_least_ms <= record.expires_ms <= ended + at_least_ms
    assert (
        await shop.redis.zcount(ItemKeys.of(spec.item_id).holds, "-inf", began + at_least_ms) == 0
    )
    reply = await shop.inventory.expire(spec.item_id, 10, timeout_seconds=5)
    assert isinstance(reply, Expired)
    assert reply.holds == []


async def test_no_hold_expires_soon_after_a_rebuild_under_a_clock_that_is_behind(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """The sale keeps the time of the former server, by which holds expire."""
    await shop.apply(replace(spec, hold_seconds=600))
    await shop.buy(spec.item_id, "a")
    await shop.record(spec.item_id)
    last_now_ms = (await shop.inventory.server()).now_ms + 3_600_000
    sale = ItemKeys.of(spec.item_id).sale
    await shop.redis.hset(sale, mapping={"last_now_ms": last_now_ms})
    await shop.change_run(spec.item_id)
    assert isinstance(await shop.rebuild(spec), Rebuilt)
    [record] = (await records(shop, spec)).values()
    assert record.expires_ms == last_now_ms + HOLD_MS


async def test_a_hold_that_ends_later_keeps_its_end_in_a_rebuild(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a")
    await shop.record(spec.item_id)
    before = await records(shop, spec)
    await shop.redis.flushall()
    await shop.rebuild(spec)
    assert await records(shop, spec) == before


async def test_a_sale_with_an_older_hold_than_the_ledger_is_rebuilt(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """The server went back to an older copy, and it has the same run id."""
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a")
    await shop.record(spec.item_id)
    names = ItemKeys.of(spec.item_id).sold
    for name in names:
        await shop.redis.copy(name, f"{name}-older")
    await shop.confirm(spec.item_id, "a", "order-1")
    await shop.record(spec.item_id)
    for name in names:
        await shop.redis.copy(f"{name}-older", name, replace=True)
    row = await shop.row(spec.sale_id)
    trusted = await Recovery(shop.redis).fence(spec_of(row), row.revision + 1, recorded=1, held=1)
    assert trusted is Fenced.TRUSTED
    report = await shop.apply(spec)
    assert (report.state, report.ready) == (SaleState.SELLING, True)
    assert report.rebuilt is not None
    assert await shop.confirm(spec.item_id, "a", "order-1") is Transition.REPLAYED


async def test_a_trusted_sale_with_open_holds_stays_as_it_is(
    shop: SimulatedShop, mixed: SaleSpec
) -> None:
    before = await shop.sale(mixed.item_id)
    assert isinstance(await shop.rebuild(mixed), Rebuilt)
    assert await shop.sale(mixed.item_id) == before


async def test_keys_are_freed_only_without_open_holds(shop: SimulatedShop, spec: SaleSpec) -> None:
    async def free() -> Freed:
        row = await shop.row(spec.sale_id)
        return await shop.inventory.free(
            spec.item_id,
            spec.sale_id,
            row.revision,
            accepted=row.accepted,
            released=row.released,
        )

    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b")
    await shop.record(spec.item_id)
    result = await shop.reconciler.close(spec.sale_id)
    assert result.message == "2 units recorded, 2 of them held"
    assert await free() is Freed.UNRECORDED
    await shop.confirm(spec.item_id, "a")
    await shop.expire(spec.item_id, "b")
    assert await free() is Freed.UNRECORDED
    await shop.record(spec.item_id)
    assert await free() is Freed.FREED


async def test_a_sale_with_open_holds_is_not_replaced(
    shop: SimulatedShop, spec: SaleSpec, other: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a")
    await shop.record(spec.item_id)
    await shop.reconciler.close(spec.sale_id)
    report = await shop.apply(other)
    assert report.state is SaleState.ITEM_CONFLICT
    assert report.message == f"{spec.sale_id} sold {spec.item_id} before and has open holds: 1 unit"
    # The script refuses it too, if the decision was made before the hold.
    predecessor = Predecessor(spec.sale_id, 1)
    applied = await shop.inventory.apply(other, 1, seed_until_ms=2**53, replaces=predecessor)
    assert applied is Applied.CONFLICT
    await shop.redis.flushall()
    assert (await shop.apply(other)).state is SaleState.ITEM_CONFLICT, "its holds need the item"
    await shop.rebuild(spec)
    await shop.expire(spec.item_id, "a")
    await shop.record(spec.item_id)
    report = await shop.apply(other)
    assert (report.state, report.applied) == (SaleState.SELLING, Applied.SEEDED)


@pytest.mark.parametrize("loss", ["flush", "restart"])
async def test_a_closed_sale_that_lost_its_open_holds_is_rebuilt_and_they_expire(
    shop: SimulatedShop, mixed: SaleSpec, loss: str
) -> None:
    """No FlashSale declares it any more, so only the resync finds it."""
    await shop.reconciler.close(mixed.sale_id)
    if loss == "flush":
        await shop.redis.flushall()
    else:
        await shop.change_run(mixed.item_id)
    resync = resync_of(shop)

    async def trusted() -> bool:
        await resync.resync()
        row, sale = await shop.row(mixed.sale_id), await shop.sale(mixed.item_id)
        return not needs_rebuild(row, sale, await shop.inventory.server())

    await until(trusted, "the sale is rebuilt")
    sale = await shop.sale(mixed.item_id)
    assert sale is not None
    assert (sale.stored_state, sale.held) == ("closed", 2)
    assert await shop.buy(mixed.item_id, "z") == [Outcome.ENDED]
    for user in ("held", "both"):
        holds = ItemKeys.of(mixed.item_id).holds
        [first] = await shop.redis.zrange(holds, 0, 0)
        await shop.redis.zadd(holds, {str(first): 0})
        reply = await shop.inventory.expire(mixed.item_id, 1, timeout_seconds=5)
        assert isinstance(reply, Expired)
        assert len(reply.holds) == 1, user
    await shop.record(mixed.item_id)
    row = await shop.row(mixed.sale_id)
    assert (row.accepted, row.released, row.held) == (7, 6, 0)


async def test_a_hold_that_reaches_the_ledger_after_its_item_was_given_away_ends_later(
    shop: SimulatedShop, spec: SaleSpec, other: SaleSpec
) -> None:
    """Redis was emptied while the hold of a closed sale was on its way to the ledger."""
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a")
    reservation_id = await shop.reservation_of(spec.item_id, "a")
    [late] = (await shop.outbox.page(spec.item_id, until_ms=2**50, count=10)).entries
    await shop.reconciler.close(spec.sale_id)
    await shop.redis.flushall()
    assert (await shop.apply(other)).applied is Applied.SEEDED
    await shop.write(late)
    assert (await shop.row(spec.sale_id)).held == 1
    call = OrderCall(reservation_id, "order-1")
    reply = await shop.inventory.change("confirm", spec.item_id, [call], timeout_seconds=5)
    assert isinstance(reply, TransitionReply)
    assert [answer.outcome for answer in reply.answers] == [Transition.UNKNOWN_RESERVATION]

    await shop.reconciler.close(other.sale_id)
    row = await shop.row(other.sale_id)
    freed = await shop.inventory.free(
        other.item_id, other.sale_id, row.revision, accepted=0, released=0
    )
    assert freed is Freed.FREED
    resync = resync_of(shop)

    async def back() -> bool:
        await resync.resync()
        sale = await shop.sale(spec.item_id)
        server = await shop.inventory.server()
        return sale is not None and sale.run_id == server.run_id

    await until(back, "the sale of the hold is rebuilt")
    await shop.expire(spec.item_id, "a")
    await shop.record(spec.item_id)
    row = await shop.row(spec.sale_id)
    assert (row.accepted, row.released, row.held) == (1, 1, 0)


async def test_an_ended_sale_that_was_deleted_stays_ended_in_a_rebuild(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    now_ms = (await shop.inventory.server()).now_ms
    ending = replace(spec, ends_ms=now_ms + 60_000)
    await shop.apply(ending)
    await shop.buy(spec.item_id, "a")
    await shop.record(spec.item_id)
    # The end has passed meanwhile.
    ended = replace(spec, ends_ms=now_ms - 1_000)
    await shop.pool.execute(
        "UPDATE sales SET ends_at = to_timestamp($1::float8)", (now_ms - 1_000) / 1000
    )
    await shop.redis.hset(ItemKeys.of(spec.item_id).sale, "ends_ms", now_ms - 1_000)
    await shop.reconciler.close(spec.sale_id)
    assert (await shop.apply(replace(ended, ends_ms=now_ms + 60_000))).reason is Reason.SALE_ENDED
    await shop.change_run(spec.item_id)
    await shop.rebuild(spec)
    sale = await shop.sale(spec.item_id)
    assert sale is not None
    assert (sale.stored_state, sale.held) == ("ended", 1)
    assert (await shop.apply(replace(ended, ends_ms=now_ms + 60_000))).reason is Reason.SALE_ENDED


async def test_a_closed_sale_without_open_holds_stays_freed(
    shop: SimulatedShop, mixed: SaleSpec
) -> None:
    for user in ("held", "both"):
        await end(shop, mixed, user)
    await shop.record(mixed.item_id)
    await shop.reconciler.close(mixed.sale_id)
    await shop.redis.flushall()
    await resync_of(shop).resync()
    await asyncio.sleep(3 * QUICK.seeding)
    assert await shop.sale(mixed.item_id) is None


async def end(shop: SimulatedShop, spec: SaleSpec, user: str) -> None:
    """End all open holds of a user."""
    for reservation_id, record in (await records(shop, spec)).items():
        if record.user_id == user and record.state is State.HELD:
            call = OrderCall(reservation_id)
            await shop.inventory.change("cancel", spec.item_id, [call], timeout_seconds=5)


async def test_an_ended_sale_that_redis_lost_is_rebuilt_by_its_manifest(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    now_ms = (await shop.inventory.server()).now_ms
    await shop.apply(replace(spec, ends_ms=now_ms + 60_000))
    await shop.buy(spec.item_id, "a")
    await shop.record(spec.item_id)
    # The end has passed meanwhile.
    ended = replace(spec, ends_ms=now_ms - 1_000)
    await shop.pool.execute(
        "UPDATE sales SET ends_at = to_timestamp($1::float8)", (now_ms - 1_000) / 1000
    )
    await shop.redis.flushall()
    report = await shop.apply(ended)
    assert (report.state, report.ready) == (SaleState.ENDED, True)
    assert report.rebuilt is not None
    assert await shop.confirm(spec.item_id, "a") is Transition.CHANGED
    await shop.record(spec.item_id)
    await shop.redis.flushall()
    report = await shop.apply(ended)
    assert (report.state, report.ready) == (SaleState.ENDED, True)
    assert report.rebuilt is not None
    assert await shop.confirm(spec.item_id, "a") is Transition.REPLAYED
    assert await shop.cancel(spec.item_id, "a", "order-1") is Transition.CHANGED, "a refund"
