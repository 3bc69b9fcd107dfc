"""`confirm.lua`, `cancel.lua` and `expire.lua` on real servers."""

import asyncio
from dataclasses import replace
from itertools import chain

import pytest
from redis.asyncio import Redis

from flashsale.inventory import Applied, Closed, Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Outbox
from flashsale.reservations import (
    BatchReply,
    OrderCall,
    Outcome,
    Record,
    State,
    Transition,
    TransitionReply,
    Verb,
)
from tests.support.inventory import a_request, a_sale, answers, drained, opened, outcome
from tests.support.transitions import (
    TRACE,
    change,
    changes,
    contents,
    counts,
    expire,
    hold,
    make_due,
    record_of,
)


@pytest.mark.parametrize(("seconds", "grace_ms"), [(1, 100), (100, 10_000), (3_600, 30_000)])
async def test_a_hold_is_due_after_its_time_and_a_grace_period(
    inventory: Inventory, redis: Redis, item: str, seconds: int, grace_ms: int
) -> None:
    await opened(inventory, a_sale(item, hold_seconds=seconds))
    request = a_request(quantity=1)
    reply = await inventory.reserve(item, [request], timeout_seconds=5)
    assert isinstance(reply, BatchReply)
    assert (reply.version, reply.hold_ms, reply.held) == (1, 1_000 * seconds, 1)
    record = await record_of(inventory, item, request.reservation_id)
    expires_ms = reply.now_ms + 1_000 * seconds
    assert record == Record(State.HELD, 1, 1, reply.now_ms, "ann", "", expires_ms, None, "")
    due = await redis.zscore(ItemKeys.of(item).holds, request.reservation_id)
    assert due == expires_ms + grace_ms
    assert await counts(inventory, item) == (1, 0, 1)


async def test_a_confirmed_hold_has_its_order_and_keeps_its_times(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item, 9, max_per_user=2, hold_seconds=60))
    own_id = await hold(inventory, item, quantity=2)
    before = await record_of(inventory, item, own_id)
    reply = await inventory.change(
        "confirm", item, [OrderCall(own_id, "order-1", TRACE)], timeout_seconds=5
    )
    assert isinstance(reply, TransitionReply)
    [(found, entry_id, record)] = reply.answers
    assert found is Transition.CHANGED
    assert record == before._replace(
        state=State.CONFIRMED, version=2, confirmed_ms=reply.now_ms, order_ref="order-1"
    )
    assert await record_of(inventory, item, own_id) == record
    _, entry = (await outbox.page(item, until_ms=2**50, count=9)).entries
    assert (entry.entry_id, entry.reservation_id, entry.record) == (entry_id, own_id, record)
    assert (entry.snapshot, entry.traceparent) == (reply.snapshot, TRACE)
    assert reply.snapshot == (f"default/{item}", 9, 9, 1, "")
    assert await counts(inventory, item) == (2, 0, 0)
    assert not await redis.exists(ItemKeys.of(item).holds)


async def test_a_confirmation_sets_the_clock_of_its_sale(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    """The next server's clock can be behind, and the sale must not open or reopen."""
    await opened(inventory, a_sale(item, hold_seconds=60))
    own_id = await hold(inventory, item)
    await redis.hset(ItemKeys.of(item).sale, "last_now_ms", "1")
    assert await change(inventory, "confirm", item, own_id, "order-1") is Transition.CHANGED
    record, sale = await record_of(inventory, item, own_id), (await inventory.sales([item]))[item]
    assert sale.last_now_ms == record.confirmed_ms


async def test_a_confirmation_wins_until_the_hold_is_expired(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item, hold_seconds=60))
    own_id = await hold(inventory, item)
    await make_due(redis, item, own_id)
    assert await change(inventory, "confirm", item, own_id, "order-1") is Transition.CHANGED
    assert await expire(inventory, item) == []
    assert (await record_of(inventory, item, own_id)).state is State.CONFIRMED


async def test_only_due_holds_expire_and_in_batches(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item, hold_seconds=60))
    due = [await hold(inventory, item, f"user-{n}") for n in range(5)]
    later = await hold(inventory, item, "later")
    assert await expire(inventory, item) == []
    await make_due(redis, item, *due)
    found = [await expire(inventory, item, 2) for _ in range(4)]
    assert [len(batch) for batch in found] == [2, 2, 1, 0]
    assert sorted(chain(*found)) == sorted(due)
    for own_id in due:
        record = await record_of(inventory, item, own_id)
        assert (record.state, record.version, record.confirmed_ms) == (State.EXPIRED, 2, None)
    assert (await record_of(inventory, item, later)).state is State.HELD
    assert await counts(inventory, item) == (6, 0, 1)


async def test_confirmations_and_expiries_at_once_end_each_hold_once(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item, 200, hold_seconds=60))
    requests = [a_request(f"user-{n}") for n in range(200)]
    for start in (0, 100):
        await answers(inventory, item, requests[start : start + 100])
    ids = [request.reservation_id for request in requests]
    await make_due(redis, item, *ids)
    confirmed, expired = await asyncio.gather(
        asyncio.gather(*(change(inventory, "confirm", item, own_id, "order") for own_id in ids)),
        asyncio.gather(*(expire(inventory, item, 7) for _ in range(30))),
    )
    gone = {*chain(*expired)}
    assert len(gone) == sum(map(len, expired))
    for own_id, found in zip(ids, confirmed, strict=True):
        assert found is (Transition.HOLD_EXPIRED if own_id in gone else Transition.CHANGED)
    await drained(outbox, item)
    assert await counts(inventory, item) == (200, len(gone), 0)


@pytest.mark.parametrize(
    ("first", "verb", "order_ref", "expected"),
    [
        ("confirm", "confirm", "order-1", Transition.REPLAYED),
        ("confirm", "confirm", "order-2", Transition.OTHER_ORDER),
        ("cancel", "confirm", "order-1", Transition.CANCELLED),
        ("expire", "confirm", "order-1", Transition.HOLD_EXPIRED),
        ("confirm", "cancel", "order-2", Transition.OTHER_ORDER),
        ("confirm", "cancel", "", Transition.OTHER_ORDER),
        ("confirm", "cancel", "order-1", Transition.CHANGED),
        ("cancel", "cancel", "", Transition.REPLAYED),
        ("cancel", "cancel", "order-2", Transition.REPLAYED),
        ("expire", "cancel", "", Transition.REPLAYED),
    ],
)
async def test_a_second_call_is_answered_by_the_state_of_the_reservation(
    inventory: Inventory,
    redis: Redis,
    item: str,
    first: str,
    verb: Verb,
    order_ref: str,
    expected: Transition,
) -> None:
    await opened(inventory, a_sale(item, hold_seconds=60))
    own_id = await hold(inventory, item)
    if first == "expire":
        await make_due(redis, item, own_id)
        assert await expire(inventory, item) == [own_id]
    elif first == "cancel":
        assert await change(inventory, "cancel", item, own_id) is Transition.CHANGED
    else:
        assert await change(inventory, "confirm", item, own_id, "order-1") is Transition.CHANGED
    before = await contents(redis, item)
    [answer] = await changes(inventory, verb, item, OrderCall(own_id, order_ref))
    assert answer.outcome is expected
    record = await record_of(inventory, item, own_id)
    if expected is Transition.CHANGED:
        assert (record.state, record.version, record.order_ref) == (State.CANCELLED, 3, "order-1")
        assert record.confirmed_ms is not None
        return
    assert not answer.entry_id
    assert answer.record == (record if expected is Transition.REPLAYED else None)
    assert await contents(redis, item) == before


@pytest.mark.parametrize(
    ("verb", "refs", "second"),
    [
        ("confirm", ("a", "a"), Transition.REPLAYED),
        ("confirm", ("a", "b"), Transition.OTHER_ORDER),
        ("cancel", ("", ""), Transition.REPLAYED),
    ],
)
async def test_a_reservation_twice_in_a_batch_changes_once(
    inventory: Inventory,
    outbox: Outbox,
    item: str,
    verb: Verb,
    refs: tuple[str, str],
    second: Transition,
) -> None:
    await opened(inventory, a_sale(item, hold_seconds=60))
    own_id = await hold(inventory, item)
    other = await hold(inventory, item, "bob")
    calls = [OrderCall(own_id, refs[0]), OrderCall(other, "c"), OrderCall(own_id, refs[1])]
    found = await changes(inventory, verb, item, *calls)
    changed = Transition.CHANGED
    assert [answer.outcome for answer in found] == [changed, changed, second]
    entries = (await outbox.page(item, until_ms=2**50, count=9)).entries
    assert [(entry.reservation_id, entry.record.version) for entry in entries[2:]] == [
        (own_id, 2),
        (other, 2),
    ]
    assert await counts(inventory, item) == (2, 0, 0)


@pytest.mark.parametrize("state", ["paused", "ended", "closed"])
async def test_holds_end_while_the_sale_accepts_nothing(
    inventory: Inventory, redis: Redis, item: str, state: str
) -> None:
    spec = await opened(inventory, a_sale(item, hold_seconds=60))
    first, second, third = [await hold(inventory, item, f"user-{n}") for n in range(3)]
    if state == "closed":
        assert await inventory.close(item, spec.sale_id, 2) is Closed.CLOSED
    else:
        paused = state == "paused"
        ends_ms = None if paused else (await inventory.server(item)).now_ms - 1
        spec = replace(spec, paused=paused, ends_ms=ends_ms)
        assert await inventory.apply(spec, 2) is Applied.CHANGED
    refused = await outcome(inventory, item, a_request("bob"))
    assert refused is (Outcome.PAUSED if state == "paused" else Outcome.ENDED)
    assert await change(inventory, "confirm", item, first, "order-1") is Transition.CHANGED
    assert await change(inventory, "cancel", item, second) is Transition.CHANGED
    await make_due(redis, item, third)
    assert await expire(inventory, item) == [third]
    assert await counts(inventory, item) == (3, 0, 0)


async def test_a_confirmation_of_a_sale_without_holds_sets_the_order(
    inventory: Inventory, item: str
) -> None:
    await opened(inventory, a_sale(item))
    own_id = await hold(inventory, item)
    before = await record_of(inventory, item, own_id)
    assert (before.state, before.confirmed_ms) == (State.CONFIRMED, before.accepted_ms)
    assert await change(inventory, "confirm", item, own_id, "order-1") is Transition.CHANGED
    assert await record_of(inventory, item, own_id) == before._replace(
        version=2, order_ref="order-1"
    )
    assert await change(inventory, "cancel", item, own_id) is Transition.OTHER_ORDER
    assert await change(inventory, "cancel", item, own_id, "order-1") is Transition.CHANGED
    assert await counts(inventory, item) == (1, 0, 0)


async def test_an_order_gives_up_a_reservation_that_it_never_confirmed(
    inventory: Inventory, item: str
) -> None:
    """In a sale without holds. Each confirmation was answered 503, and none was made."""
    await opened(inventory, a_sale(item))
    own_id = await hold(inventory, item)
    assert await change(inventory, "cancel", item, own_id, "order-1") is Transition.CHANGED
    assert await change(inventory, "confirm", item, own_id, "order-1") is Transition.CANCELLED


@pytest.mark.parametrize("verb", ["confirm", "cancel"])
async def test_a_reservation_of_the_previous_version_can_be_changed(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str, verb: Verb
) -> None:
    await opened(inventory, a_sale(item, 1))
    own_id = await hold(inventory, item)
    accepted_ms = (await record_of(inventory, item, own_id)).accepted_ms
    keys = ItemKeys.of(item)
    await redis.hset(keys.reservations, own_id, f"accepted,1,1,{accepted_ms},ann,k")
    await redis.hdel(keys.sale, "hold_ms", "max_expired_holds", "held", "rebuilt")
    old = await record_of(inventory, item, own_id)
    assert old == Record(State.CONFIRMED, 1, 1, accepted_ms, "ann", "k", None, accepted_ms, "")
    order_ref = "order-1" if verb == "confirm" else ""
    [answer] = await changes(inventory, verb, item, OrderCall(own_id, order_ref))
    state = State.CONFIRMED if verb == "confirm" else State.CANCELLED
    assert answer.outcome is Transition.CHANGED
    assert answer.record == old._replace(state=state, version=2, order_ref=order_ref)
    await drained(outbox, item)
    expected = Outcome.ACCEPTED if verb == "cancel" else Outcome.SOLD_OUT
    assert await outcome(inventory, item, a_request("bob")) is expected


async def test_a_replay_shows_how_the_reservation_ended(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item, 1, hold_seconds=60))
    request = a_request(key="k")
    assert await outcome(inventory, item, request) is Outcome.ACCEPTED
    await make_due(redis, item, request.reservation_id)
    await expire(inventory, item)
    [answer] = await answers(inventory, item, [request])
    assert answer.outcome is Outcome.REPLAYED
    assert Record.parse(answer.detail).state is State.EXPIRED


async def test_a_buyer_whose_holds_expire_too_often_is_refused(
    inventory: Inventory, outbox: Outbox, redis: Redis, item: str
) -> None:
    spec = await opened(inventory, a_sale(item, 2, hold_seconds=60, max_expired_holds=2))
    for _ in range(2):
        cancelled = await hold(inventory, item)
        assert await change(inventory, "cancel", item, cancelled) is Transition.CHANGED
        await drained(outbox, item)
        own_id = await hold(inventory, item)
        await make_due(redis, item, own_id)
        assert await expire(inventory, item) == [own_id]
        await drained(outbox, item)
    assert await outcome(inventory, item, a_request("ann")) is Outcome.TOO_MANY_HOLDS
    assert await outcome(inventory, item, a_request("bob")) is Outcome.ACCEPTED
    # Without holds the buyer cannot keep a unit from others.
    await inventory.apply(replace(spec, hold_seconds=None), 2)
    assert await outcome(inventory, item, a_request("ann")) is Outcome.ACCEPTED


async def test_versions_after_a_rebuild_exceed_those_that_it_did_not_find(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item, hold_seconds=60))
    old = await hold(inventory, item)
    # Revisions and versions are printed as integers, however large they are.
    await redis.hset(ItemKeys.of(item).sale, "rebuilt", str(10**12))
    new = await hold(inventory, item, "bob")
    assert (await record_of(inventory, item, new)).version == 10**15 + 1
    assert await change(inventory, "confirm", item, old, "order-1") is Transition.CHANGED
    assert await change(inventory, "cancel", item, new) is Transition.CHANGED
    assert (await record_of(inventory, item, old)).version == 10**15 + 1
    assert (await record_of(inventory, item, new)).version == 10**15 + 2
