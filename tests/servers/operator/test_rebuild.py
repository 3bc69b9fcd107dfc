"""Rebuilds of a fenced sale: the API trusts the keys only after the rebuild is complete."""

import asyncio
import os
import random
import uuid
from dataclasses import replace

import pytest

from dev.stack.servers import RedisServer
from flashsale.errors import FlashsaleError
from flashsale.keys import ItemKeys
from flashsale.reservations import Outcome, Request, Transition
from flashsale.sale import Predecessor, SaleSpec, SaleState
from flashsale_operator.sales.audit import audit
from flashsale_operator.sales.decision import Reason, StillFenced, spec_of
from flashsale_operator.sales.offsets import Span
from flashsale_operator.sales.rebuild import Rebuilt
from flashsale_operator.sales.recovery import Fenced, Recovery
from tests.support.eventually import until
from tests.support.ledgers import waits
from tests.support.simulated_shop import SimulatedShop


async def test_after_a_wipe_the_sold_units_are_restored_and_the_rest_is_sold(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.redis.flushall()
    done = await shop.rebuild(sold)
    assert isinstance(done, Rebuilt)
    assert (done.accepted, done.reservations, done.redis_lacked, done.lost) == (3, 3, 3, 0)
    sale = await shop.sale(sold.item_id)
    assert sale is not None
    assert (sale.accepted, sale.available, sale.torn) == (3, 7, False)
    assert await shop.buy(sold.item_id, "a", "d") == [Outcome.LIMIT_REACHED, Outcome.ACCEPTED]
    crowd = await shop.buy(sold.item_id, *(f"u{n}" for n in range(20)))
    assert crowd.count(Outcome.ACCEPTED) == 6
    report = await shop.apply(sold)
    assert report.state is SaleState.SOLD_OUT


async def test_the_units_of_a_finished_sale_are_not_lost_units_of_the_sale_that_replaces_it(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """Redis is an older copy, from before the item's next sale began."""
    keys, following = ItemKeys.of(sold.item_id).sold, replace(sold, sale_id="default/following")
    await shop.reconciler.close(sold.sale_id)
    for key in keys:
        await shop.redis.copy(key, f"older:{key}")
    await shop.apply(following)
    await shop.buy(following.item_id, "d")
    await shop.record(following.item_id)
    await shop.redis.delete(*keys)
    for key in keys:
        await shop.redis.copy(f"older:{key}", key)
    done = await shop.rebuilder.rebuild(
        await shop.row(following.sale_id), Predecessor(sold.sale_id, accepted=3)
    )
    assert isinstance(done, Rebuilt)
    assert (done.accepted, done.redis_lacked, done.lost) == (1, 1, 0)
    assert (await shop.row(following.sale_id)).lost == 0
    sale = await shop.sale(following.item_id)
    assert sale is not None
    assert (sale.sale_id, sale.accepted) == (following.sale_id, 1)


async def test_a_rebuild_that_another_one_has_superseded_is_not_noted(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    row = await shop.rebuilder._claim(sold.sale_id, above=0)
    await shop.rebuilder._claim(sold.sale_id, above=0)
    with pytest.raises(FlashsaleError, match="another process changed or rebuilt it"):
        await shop.rebuilder._note(row, {}, None)
    assert (await shop.row(sold.sale_id)).rebuilt_revision == 0


async def test_the_note_of_a_rebuild_and_a_migration_do_not_deadlock(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """A migration locks the same tables one after another."""
    row = await shop.rebuilder._claim(sold.sale_id, above=0)
    async with shop.pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE kafka_offsets IN ACCESS EXCLUSIVE MODE")
        note = asyncio.create_task(shop.rebuilder._note(row, {}, None))
        await until(lambda: waits(connection))
        await connection.execute("LOCK TABLE sales IN ACCESS EXCLUSIVE MODE NOWAIT")
    assert await note == (3, 0, 0)


async def test_a_sale_from_before_its_last_rebuild_is_rebuilt(
    shop: SimulatedShop, sold: SaleSpec, redis_server: RedisServer
) -> None:
    """The engine returns to a Redis that it left. A buyer gave a unit back at the other one."""
    async with shop.at_another_redis(sold, redis_server.url):
        assert await shop.cancel(sold.item_id, "a") is Transition.CHANGED
        await shop.record(sold.item_id)
    report = await audit(shop.inventory, shop.pool, shop.spans)
    assert "Redis has the sale from before its last rebuild" in report.findings[0].notes
    result = await shop.apply(sold)
    assert (result.reason, result.rebuilt is not None) == (Reason.APPLIED, True)
    assert await shop.confirm(sold.item_id, "a") is Transition.CANCELLED
    sale = await shop.sale(sold.item_id)
    assert sale is not None
    assert (sale.accepted, sale.released, sale.available) == (3, 1, 8)


async def test_a_sale_that_the_previous_version_rebuilt_is_trusted(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """Its keys do not tell when."""
    await shop.redis.flushall()
    assert isinstance(await shop.rebuild(sold), Rebuilt)
    await shop.redis.hdel(ItemKeys.of(sold.item_id).sale, "rebuilt")
    result = await shop.apply(sold)
    assert (result.reason, result.rebuilt) == (Reason.APPLIED, None)
    row = await shop.row(sold.sale_id)
    answer = await Recovery(shop.redis).fence(
        spec_of(row), row.revision + 1, recorded=row.accepted, rebuilt=row.rebuilt_revision
    )
    assert answer is Fenced.TRUSTED


async def test_the_rebuild_of_an_older_ledger_takes_a_revision_above_redis(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.redis.hset(ItemKeys.of(sold.item_id).sale, mapping={"revision": 7})
    await shop.change_run(sold.item_id)
    assert isinstance(await shop.rebuild(sold), Rebuilt)
    assert (await shop.row(sold.sale_id)).revision == 8


async def test_a_retry_after_the_rebuild_is_a_replay(shop: SimulatedShop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    request = Request(str(uuid.uuid4()), "ann", 1, "k")
    await shop.send(spec.item_id, [request])
    await shop.record(spec.item_id)
    await shop.redis.flushall()
    assert isinstance(await shop.rebuild(spec), Rebuilt)
    [again] = await shop.send(spec.item_id, [request])
    assert again.outcome is Outcome.REPLAYED
    [other] = await shop.send(spec.item_id, [request._replace(quantity=2)])
    assert other.outcome is Outcome.KEY_REUSED


@pytest.mark.parametrize("part", ["sale", "buyers", "reservations", "outbox"])
async def test_a_sale_that_lost_one_key_is_rebuilt(
    shop: SimulatedShop, sold: SaleSpec, part: str
) -> None:
    await shop.redis.delete(getattr(ItemKeys.of(sold.item_id), part))
    assert isinstance(await shop.rebuild(sold), Rebuilt)
    assert await shop.buy(sold.item_id, "a", "z") == [Outcome.LIMIT_REACHED, Outcome.ACCEPTED]


async def test_a_lost_sale_is_fenced_during_its_rebuild_and_not_unknown(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.redis.flushall()
    row = await shop.row(sold.sale_id)
    assert await Recovery(shop.redis).fence(spec_of(row), row.revision + 1) is Fenced.FENCED
    assert await shop.buy(sold.item_id, "z") == [Outcome.FENCED]


async def test_an_older_copy_in_redis_is_replaced_by_the_ledger(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    keys = ItemKeys.of(sold.item_id)
    await shop.redis.hdel(keys.buyers, "c")
    await shop.redis.hset(keys.sale, "accepted", "2")
    await shop.change_run(sold.item_id)
    done = await shop.rebuild(sold)
    assert isinstance(done, Rebuilt)
    assert (done.accepted, done.redis_lacked, done.lost) == (3, 1, 0)
    assert await shop.buy(sold.item_id, "c") == [Outcome.LIMIT_REACHED]


async def test_units_that_only_redis_has_are_reported_as_lost(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id, lose=1)
    await shop.change_run(spec.item_id)
    done = await shop.rebuild(spec)
    assert isinstance(done, Rebuilt)
    assert (done.accepted, done.redis_lacked, done.lost) == (2, 0, 1)


async def test_the_sale_stays_fenced_while_the_outbox_has_events(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.buy(sold.item_id, "d")
    await shop.change_run(sold.item_id)
    still_fenced = await shop.rebuild(sold)
    assert still_fenced == StillFenced(("the outbox has 1 event that Kafka has not acknowledged",))
    assert await shop.buy(sold.item_id, "z") == [Outcome.FENCED]
    sale = await shop.sale(sold.item_id)
    assert sale is not None
    assert sale.outbox_length == 1  # the only copy of the event
    await shop.record(sold.item_id)
    done = await shop.rebuild(sold)
    assert isinstance(done, Rebuilt)
    assert done.accepted == 4


async def test_the_sale_stays_fenced_until_the_ledger_has_read_the_topic(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    shop.topic |= {0: Span(0, 5)}
    await shop.read_to(0, 4)
    await shop.redis.flushall()
    assert isinstance(await shop.rebuild(sold), StillFenced)
    assert await shop.buy(sold.item_id, "z") == [Outcome.FENCED]


async def test_a_sale_that_is_not_fenced_stays_as_it_is(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    before = await shop.sale(sold.item_id)
    assert isinstance(await shop.rebuild(sold), Rebuilt)
    assert await shop.sale(sold.item_id) == before


async def test_a_freed_sale_is_rebuilt_in_place_of_a_finished_one(
    shop: SimulatedShop, sold: SaleSpec, other: SaleSpec
) -> None:
    await shop.reconciler.close(sold.sale_id)
    await shop.apply(other)
    await shop.reconciler.close(other.sale_id)
    report = await shop.apply(sold)
    assert (report.state, report.ready) == (SaleState.SELLING, True)
    assert report.rebuilt is not None
    assert (report.rebuilt.accepted, report.rebuilt.reservations) == (3, 3)
    assert await shop.buy(sold.item_id, "a", "z") == [Outcome.LIMIT_REACHED, Outcome.ACCEPTED]


async def test_applying_a_fenced_sale_rebuilds_it(shop: SimulatedShop, sold: SaleSpec) -> None:
    await shop.change_run(sold.item_id)
    report = await shop.apply(sold)
    assert (report.state, report.ready) == (SaleState.SELLING, True)
    assert report.rebuilt is not None
    assert report.rebuilt.redis_lacked == 0


async def test_a_sale_with_fewer_units_than_the_ledger_is_fenced_and_rebuilt(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """The server went back to an older copy, and it has the same run id."""
    keys = ItemKeys.of(sold.item_id)
    await shop.redis.hdel(keys.buyers, "c")
    await shop.redis.hset(keys.sale, "accepted", "2")
    report = await shop.apply(sold)
    assert (report.state, report.ready) == (SaleState.SELLING, True)
    assert report.rebuilt is not None
    assert (report.rebuilt.accepted, report.rebuilt.redis_lacked) == (3, 1)
    assert await shop.buy(sold.item_id, "c", "d") == [Outcome.LIMIT_REACHED, Outcome.ACCEPTED]


async def test_lost_units_are_counted_once(shop: SimulatedShop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id, lose=1)
    for _ in range(2):
        await shop.change_run(spec.item_id)
        await shop.rebuild(spec)
    assert (await shop.row(spec.sale_id)).lost == 1


@pytest.mark.parametrize("limit", ["statement_timeout", "transaction_timeout"])
async def test_a_large_sale_is_rebuilt_and_audited_in_spite_of_a_limit_for_short_statements(
    shop: SimulatedShop, sold: SaleSpec, limit: str
) -> None:
    await shop.pool.execute(
        "ALTER TABLE reservations RENAME TO stored;"
        "CREATE VIEW reservations AS SELECT stored.* FROM stored CROSS JOIN pg_sleep(0.6)"
    )
    name = await shop.pool.fetchval("SELECT current_database()")
    await shop.pool.execute(f'ALTER DATABASE "{name}" SET {limit} = 500')
    await shop.pool.expire_connections()
    await shop.change_run(sold.item_id)
    done = await shop.rebuild(sold)
    assert isinstance(done, Rebuilt)
    assert done.accepted == 3
    assert (await audit(shop.inventory, shop.pool, shop.spans)).agrees


async def test_units_lost_by_a_sale_of_the_previous_version_are_counted(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """Its hash does not name the last rebuild, which that version has made."""
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id, lose=1)
    await shop.redis.hdel(ItemKeys.of(spec.item_id).sale, "rebuilt")
    await shop.pool.execute("UPDATE sales SET rebuilt_revision = revision")
    await shop.change_run(spec.item_id)
    assert isinstance(await shop.rebuild(spec), Rebuilt)
    assert (await shop.row(spec.sale_id)).lost == 1


async def test_a_closed_sale_is_still_closed_after_its_rebuild(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.reconciler.close(sold.sale_id)
    await shop.redis.flushall()
    assert isinstance(await shop.rebuild(sold), Rebuilt)
    assert await shop.buy(sold.item_id, "z") == [Outcome.ENDED]


async def test_a_large_sale_is_rebuilt_in_pages(shop: SimulatedShop, spec: SaleSpec) -> None:
    number = int(os.environ.get("FLASHSALE_REBUILD_RESERVATIONS", "4321"))
    large = SaleSpec(spec.sale_id, spec.item_id, 5 * number, max_per_user=3)
    await shop.apply(large)
    chance = random.Random(1)
    async with shop.pool.acquire() as connection:
        rows = [
            (spec.sale_id, uuid.UUID(int=chance.getrandbits(128)), f"u{n // 2}", 1)
            for n in range(number)
        ]
        await connection.executemany(
            "INSERT INTO reservations (sale_id, reservation_id, user_id, quantity, state, version, "
            "accepted_at, confirmed_at) VALUES ($1, $2, $3, $4, 'confirmed', 1, now(), now())",
            rows,
        )
        await connection.execute(
            "UPDATE sales SET accepted = $2 WHERE sale_id = $1", spec.sale_id, number
        )
    await shop.redis.flushall()
    done = await shop.rebuild(large)
    assert isinstance(done, Rebuilt)
    print(f"{number} reservations written in {done.seconds:.2f} s")
    assert (done.accepted, done.reservations) == (number, number)
    keys = ItemKeys.of(spec.item_id)
    assert await shop.redis.hlen(keys.reservations) == number
    assert await shop.redis.hlen(keys.buyers) == (number + 1) // 2
    assert await shop.redis.hget(keys.buyers, "u7") == "2"
    last = await shop.redis.hget(keys.buyers, f"u{(number - 1) // 2}")
    assert last == ("1" if number % 2 else "2")
