"""Rebuilds of a fenced sale: the API trusts the keys only after the rebuild is complete."""

import asyncio
import os
import random
import uuid
from typing import Any
from urllib.parse import urlsplit

import pytest

from flashsale import heartbeat, ledger
from flashsale.clocks import ServerTime
from flashsale.errors import LedgerUnavailable, RedisUnavailable
from flashsale.inventory import Closed, Inventory
from flashsale.keys import ItemKeys
from flashsale.reservations import Outcome, Request
from flashsale.sale import Sale, SaleSpec, SaleState
from flashsale_operator.sales.audit import audit
from flashsale_operator.sales.decision import StillFenced, spec_of
from flashsale_operator.sales.drain import Drain, Patience
from flashsale_operator.sales.offsets import Span
from flashsale_operator.sales.rebuild import Rebuilder, Rebuilt
from flashsale_operator.sales.reconciler import Reconciler
from flashsale_operator.sales.recovery import Fenced, Recovery, Step, Trusted
from tests.support.eventually import until
from tests.support.proxy import Proxy
from tests.support.simulated_shop import SimulatedShop


async def rebuild(shop: SimulatedShop, spec: SaleSpec) -> Rebuilt | StillFenced:
    return await shop.rebuilder.rebuild(await shop.row(spec.sale_id))


async def restart(shop: SimulatedShop, spec: SaleSpec) -> None:
    """Make the sale look as after a restart of Redis, with another run id than the server's."""
    await shop.redis.hset(ItemKeys.of(spec.item_id).sale, "run_id", "an earlier run")


async def test_after_a_wipe_the_sold_units_are_restored_and_the_rest_is_sold(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.redis.flushall()
    done = await rebuild(shop, sold)
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


async def test_a_retry_after_the_rebuild_is_a_replay(shop: SimulatedShop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    request = Request(str(uuid.uuid4()), "ann", 1, "k")
    await shop.send(spec.item_id, [request])
    await shop.record(spec.item_id)
    await shop.redis.flushall()
    assert isinstance(await rebuild(shop, spec), Rebuilt)
    [again] = await shop.send(spec.item_id, [request])
    assert again.outcome is Outcome.REPLAYED
    [other] = await shop.send(spec.item_id, [request._replace(quantity=2)])
    assert other.outcome is Outcome.KEY_REUSED


@pytest.mark.parametrize("part", ["sale", "buyers", "reservations", "outbox"])
async def test_a_sale_that_lost_one_key_is_rebuilt(
    shop: SimulatedShop, sold: SaleSpec, part: str
) -> None:
    await shop.redis.delete(getattr(ItemKeys.of(sold.item_id), part))
    assert isinstance(await rebuild(shop, sold), Rebuilt)
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
    await restart(shop, sold)
    done = await rebuild(shop, sold)
    assert isinstance(done, Rebuilt)
    assert (done.accepted, done.redis_lacked, done.lost) == (3, 1, 0)
    assert await shop.buy(sold.item_id, "c") == [Outcome.LIMIT_REACHED]


async def test_units_that_only_redis_has_are_reported_as_lost(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id, lose=1)
    await restart(shop, spec)
    done = await rebuild(shop, spec)
    assert isinstance(done, Rebuilt)
    assert (done.accepted, done.redis_lacked, done.lost) == (2, 0, 1)


async def test_the_sale_stays_fenced_while_the_outbox_has_events(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.buy(sold.item_id, "d")
    await restart(shop, sold)
    still_fenced = await rebuild(shop, sold)
    assert still_fenced == StillFenced(("the outbox has 1 event that Kafka has not acknowledged",))
    assert await shop.buy(sold.item_id, "z") == [Outcome.FENCED]
    sale = await shop.sale(sold.item_id)
    assert sale is not None
    assert sale.outbox_length == 1  # the only copy of the event
    await shop.record(sold.item_id)
    done = await rebuild(shop, sold)
    assert isinstance(done, Rebuilt)
    assert done.accepted == 4


async def test_the_sale_stays_fenced_until_the_ledger_has_read_the_topic(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    shop.topic |= {0: Span(0, 5)}
    await shop.read_to(0, 4)
    await shop.redis.flushall()
    assert isinstance(await rebuild(shop, sold), StillFenced)
    assert await shop.buy(sold.item_id, "z") == [Outcome.FENCED]


async def test_a_sale_that_is_not_fenced_stays_as_it_is(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    before = await shop.sale(sold.item_id)
    assert isinstance(await rebuild(shop, sold), Rebuilt)
    assert await shop.sale(sold.item_id) == before


async def begin(shop: SimulatedShop, spec: SaleSpec, claim: int) -> None:
    """Run a rebuild up to its first write."""
    recovery, row = Recovery(shop.redis), await shop.row(spec.sale_id)
    assert await recovery.fence(spec_of(row), claim) is Fenced.FENCED
    assert await recovery.fence(spec_of(row), claim, step="begin") is Fenced.BEGUN


@pytest.mark.parametrize("step", ["fence", "wait", "begin"])
async def test_a_rebuild_ends_if_the_server_has_another_run(
    shop: SimulatedShop, sold: SaleSpec, step: Step
) -> None:
    """The heartbeats on another server say nothing about the pods that this one waited for."""
    await shop.redis.hset(ItemKeys.of(sold.item_id).sale, "run_id", "0" * 40)
    recovery, row = Recovery(shop.redis), await shop.row(sold.sale_id)
    claim, run_id = row.revision + 1, (await shop.inventory.server()).run_id
    assert await recovery.fence(spec_of(row), claim, run_id=run_id) is Fenced.FENCED
    answer = await recovery.fence(spec_of(row), claim, step=step, run_id="another")
    assert answer is Fenced.SUPERSEDED
    again = await recovery.fence(spec_of(row), claim, step="wait", run_id=run_id)
    assert again is Fenced.FENCED


async def end_lease(shop: SimulatedShop, spec: SaleSpec) -> None:
    """Let the lease of the rebuild run out."""
    await shop.redis.hset(ItemKeys.of(spec.item_id).sale, "rebuild_until_ms", "1")


async def test_an_overtaken_rebuild_cannot_write(shop: SimulatedShop, sold: SaleSpec) -> None:
    recovery = Recovery(shop.redis)
    await shop.redis.flushall()
    run_id = (await shop.inventory.server()).run_id
    await begin(shop, sold, 1)
    assert await rebuild(shop, sold) == StillFenced(
        ("another operator or flashsalectl is rebuilding it",)
    )
    await end_lease(shop, sold)
    assert isinstance(await rebuild(shop, sold), Rebuilt)
    assert await shop.buy(sold.item_id, "d") == [Outcome.ACCEPTED]
    before = await shop.sale(sold.item_id)
    row = spec_of(await shop.row(sold.sale_id))
    assert await recovery.fence(row, 1) is Fenced.TRUSTED
    assert await recovery.fence(row, 1, step="begin") is Fenced.SUPERSEDED
    assert await recovery.restore(sold.item_id, 1, buyers={"e": (1, 0)}) is Trusted.SUPERSEDED
    ended = await recovery.trust(
        sold.item_id, 1, run_id, accepted=0, released=0, held=0, reservations=0, buyers=0, holds=0
    )
    assert ended is Trusted.SUPERSEDED
    assert await shop.sale(sold.item_id) == before


async def test_a_rebuild_suspended_during_a_wipe_of_redis_cannot_begin(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """Its wait ended before later reservations, which Redis has lost."""
    recovery, row = Recovery(shop.redis), await shop.row(sold.sale_id)
    await shop.redis.flushall()
    assert await recovery.fence(spec_of(row), 7) is Fenced.FENCED
    await end_lease(shop, sold)
    assert isinstance(await rebuild(shop, sold), Rebuilt)
    await shop.redis.flushall()
    assert await recovery.fence(spec_of(row), 7, step="begin") is Fenced.SUPERSEDED


async def test_a_wipe_of_redis_during_the_wait_ends_the_rebuild(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    """The wipe deletes the heartbeat of a pod that still has to publish an event."""
    server = await shop.inventory.server()
    sampled = ServerTime(server.now_ms + 60_000, server.run_id)
    await heartbeat.beat(shop.redis, "pod-1", {sold.item_id: 1}, {"": sampled})
    waiting: list[tuple[str, str]] = []
    drain = Drain(shop.inventory, shop.pool, shop.spans, patience=Patience(unseen=0.5))
    rebuilder = Rebuilder(
        shop.inventory, shop.pool, drain, lambda sale_id, step: waiting.append((sale_id, step))
    )
    await shop.redis.delete(*ItemKeys.of(sold.item_id).sold)
    row = await shop.row(sold.sale_id)
    rebuilding = asyncio.create_task(rebuilder.rebuild(row))
    await until(lambda: waiting)
    assert waiting == [(sold.sale_id, "pod pod-1 has 1 unacknowledged event")]
    await shop.redis.flushall()
    assert await rebuilding == StillFenced(
        ("another process changed or rebuilt it: the rebuild starts again",)
    )
    # The ledger noted no rebuild, so it does not refuse the event of the pod.
    assert await shop.pool.fetchval("SELECT max(rebuilt_revision) FROM sales") in (None, 0)
    assert await shop.buy(sold.item_id, "z") != [Outcome.ACCEPTED]


async def test_a_sale_closed_during_its_rebuild_stays_closed(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    recovery, row = Recovery(shop.redis), await shop.row(sold.sale_id)
    await shop.redis.flushall()
    claim = row.revision + 1
    assert await recovery.fence(spec_of(row), claim) is Fenced.FENCED
    assert await shop.inventory.close(sold.item_id, sold.sale_id, claim + 1) is Closed.CLOSED
    assert await recovery.fence(spec_of(row), claim, step="begin") is Fenced.SUPERSEDED


async def test_a_rebuild_fails_if_redis_restarts_during_it(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    recovery = Recovery(shop.redis)
    await shop.redis.flushall()
    await begin(shop, sold, 5)
    ended = await recovery.trust(
        sold.item_id,
        5,
        "an earlier run",
        accepted=0,
        released=0,
        held=0,
        reservations=0,
        buyers=0,
        holds=0,
    )
    assert ended is Trusted.RESTARTED
    run_id = (await shop.inventory.server()).run_id
    ended = await recovery.trust(
        sold.item_id, 5, run_id, accepted=3, released=0, held=0, reservations=3, buyers=3, holds=0
    )
    assert ended is Trusted.INCOMPLETE
    assert await shop.buy(sold.item_id, "z") == [Outcome.FENCED]


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
    await restart(shop, sold)
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


async def test_a_sale_that_is_recorded_during_the_look_is_not_fenced(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    class Selling(Inventory):
        """Sells and records a unit after each read of Redis."""

        async def observe(self, item_id: str) -> tuple[Sale | None, ServerTime]:
            found = await super().observe(item_id)
            await shop.buy(sold.item_id, str(uuid.uuid4()))
            await shop.record(sold.item_id)
            return found

    reconciler = Reconciler(Selling(shop.redis), shop.pool, shop.rebuilder.rebuild)
    report = await reconciler.reconcile(sold)
    assert (report.state, report.ready, report.rebuilt) == (SaleState.SELLING, True, None)
    assert report.sale is not None
    assert report.row is not None
    assert report.row.accepted > report.sale.accepted


async def test_lost_units_are_counted_once(shop: SimulatedShop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id, lose=1)
    for _ in range(2):
        await restart(shop, spec)
        await rebuild(shop, spec)
    assert (await shop.row(spec.sale_id)).lost == 1


async def lost_in_rebuild(shop: SimulatedShop, spec: SaleSpec) -> int:
    done = await rebuild(shop, spec)
    assert isinstance(done, Rebuilt)
    return done.lost


@pytest.mark.parametrize("fault", ["not sent", "no reply", "failover"])
async def test_lost_units_are_counted_once_if_redis_fails_during_the_rebuild(
    shop: SimulatedShop, spec: SaleSpec, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Redis fails when the ledger has counted them and the keys are about to be emptied."""
    sale = ItemKeys.of(spec.item_id).sale
    fence = Recovery.fence

    async def fail(self: Recovery, *arguments: Any, **options: Any) -> Fenced:  # noqa: ANN401
        if options["step"] == "begin":
            before: Any = await shop.redis.hgetall(sale)
            if fault != "not sent":
                assert await fence(self, *arguments, **options) is Fenced.BEGUN
            if fault == "failover":  # to a replica that lagged
                await shop.redis.hset(sale, mapping=before)
            raise RedisUnavailable(fault)
        return await fence(self, *arguments, **options)

    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id, lose=1)
    await restart(shop, spec)
    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "fence", fail)
        for _ in range(2):
            with pytest.raises(RedisUnavailable, match=fault):
                await rebuild(shop, spec)
            await end_lease(shop, spec)
    assert await lost_in_rebuild(shop, spec) == 1
    assert (await shop.row(spec.sale_id)).lost == 1
    # The next loss counts again.
    assert await shop.buy(spec.item_id, "d", "e") == [Outcome.ACCEPTED] * 2
    await shop.record(spec.item_id, lose=1)
    await restart(shop, spec)
    assert await lost_in_rebuild(shop, spec) == 1
    assert (await shop.row(spec.sale_id)).lost == 2


async def test_lost_units_are_reported_if_the_reply_to_their_commit_is_lost(
    shop: SimulatedShop, spec: SaleSpec, database_url: str
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b", "c")
    await shop.record(spec.item_id, lose=1)
    await restart(shop, spec)
    url = urlsplit(database_url)
    async with Proxy(url.port or 5432).serve() as proxy:
        host = url.netloc.rpartition(":")[0]
        pool = await ledger.connect(url._replace(netloc=f"{host}:{proxy.port}").geturl())
        rebuilder = Rebuilder(shop.inventory, pool, shop.drain)
        proxy.cut_replies(b"COMMIT;", 1)
        with pytest.raises(LedgerUnavailable):
            await rebuilder.rebuild(await shop.row(spec.sale_id))
        assert (await shop.row(spec.sale_id)).lost == 1
        await end_lease(shop, spec)
        done = await rebuilder.rebuild(await shop.row(spec.sale_id))
        await pool.close()
    assert isinstance(done, Rebuilt)
    assert done.lost == 1


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
    await restart(shop, sold)
    done = await rebuild(shop, sold)
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
    await restart(shop, spec)
    assert isinstance(await rebuild(shop, spec), Rebuilt)
    assert (await shop.row(spec.sale_id)).lost == 1


async def test_concurrent_rebuilds_give_one_correct_sale(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.redis.flushall()
    done = await asyncio.gather(*(rebuild(shop, sold) for _ in range(5)))
    assert any(isinstance(each, Rebuilt) for each in done)
    sale = await shop.sale(sold.item_id)
    assert sale is not None
    assert (sale.accepted, sale.available, sale.torn) == (3, 7, False)


async def test_a_closed_sale_is_still_closed_after_its_rebuild(
    shop: SimulatedShop, sold: SaleSpec
) -> None:
    await shop.reconciler.close(sold.sale_id)
    await shop.redis.flushall()
    assert isinstance(await rebuild(shop, sold), Rebuilt)
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
    done = await rebuild(shop, large)
    assert isinstance(done, Rebuilt)
    print(f"{number} reservations written in {done.seconds:.2f} s")
    assert (done.accepted, done.reservations) == (number, number)
    keys = ItemKeys.of(spec.item_id)
    assert await shop.redis.hlen(keys.reservations) == number
    assert await shop.redis.hlen(keys.buyers) == (number + 1) // 2
    assert await shop.redis.hget(keys.buyers, "u7") == "2"
    last = await shop.redis.hget(keys.buyers, f"u{(number - 1) // 2}")
    assert last == ("1" if number % 2 else "2")
