"""`reserve.lua` on real servers."""

import asyncio
import random
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.inventory import Applied, Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Outbox
from flashsale.reservations import Answer, BatchReply, Outcome, Record, Request, Snapshot, State
from tests.support.inventory import a_request, a_sale, answers, opened, outcome


async def test_concurrent_batches_sell_exactly_the_stock(inventory: Inventory, item: str) -> None:
    await opened(inventory, a_sale(item, 99, max_per_user=3))
    chance = random.Random(item)
    crowd = [a_request(f"user-{n % 400}", chance.randint(1, 3)) for n in range(1_200)]
    chance.shuffle(crowd)
    batches = [crowd[start : start + 17] for start in range(0, len(crowd), 17)]
    replies = await asyncio.gather(*(answers(inventory, item, batch) for batch in batches))
    accepted = [
        request
        for batch, reply in zip(batches, replies, strict=True)
        for request, answer in zip(batch, reply, strict=True)
        if answer.outcome is Outcome.ACCEPTED
    ]
    assert sum(request.quantity for request in accepted) == 99
    held: Counter[str] = Counter()
    for request in accepted:
        held[request.user_id] += request.quantity
    assert max(held.values()) <= 3
    sale = (await inventory.sales([item]))[item]
    assert (sale.accepted, sale.available, sale.outbox_length) == (99, 0, len(accepted))
    for request in accepted:
        record = (await inventory.look(item, request.reservation_id)).record
        assert record is not None
        assert (record.user_id, record.quantity) == (request.user_id, request.quantity)


async def test_sending_an_id_again_returns_the_same_reservation(
    inventory: Inventory, item: str
) -> None:
    await opened(inventory, a_sale(item, 10, max_per_user=10))
    request = a_request(key="k")
    first, again_in_the_batch = await answers(inventory, item, [request, request])
    later = await answers(inventory, item, [request])
    assert first.outcome is Outcome.ACCEPTED
    assert again_in_the_batch.outcome is later[0].outcome is Outcome.REPLAYED
    assert again_in_the_batch.detail == later[0].detail
    assert (await inventory.sales([item]))[item].accepted == 1


async def test_concurrent_retries_of_one_key_take_one_unit(inventory: Inventory, item: str) -> None:
    await opened(inventory, a_sale(item, 50, max_per_user=50))
    request = a_request(key="k", quantity=2)
    outcomes = await asyncio.gather(*(outcome(inventory, item, request) for _ in range(60)))
    assert Counter(outcomes) == {Outcome.ACCEPTED: 1, Outcome.REPLAYED: 59}
    assert (await inventory.sales([item]))[item].accepted == 2


async def test_a_repeated_key_with_another_quantity_is_refused(
    inventory: Inventory, item: str
) -> None:
    await opened(inventory, a_sale(item, 10, max_per_user=10))
    request = a_request(key="k", quantity=2)
    assert await outcome(inventory, item, request) is Outcome.ACCEPTED
    assert await outcome(inventory, item, request._replace(quantity=3)) is Outcome.KEY_REUSED
    assert (await inventory.sales([item]))[item].accepted == 2


async def test_a_replay_is_answered_while_sold_out_paused_and_ended(
    inventory: Inventory, item: str
) -> None:
    spec = await opened(inventory, a_sale(item, 1))
    request = a_request()
    assert await outcome(inventory, item, request) is Outcome.ACCEPTED
    assert await outcome(inventory, item, a_request("bob")) is Outcome.SOLD_OUT
    assert await inventory.apply(replace(spec, paused=True), 2) is Applied.CHANGED
    assert await outcome(inventory, item, request) is Outcome.REPLAYED
    assert await outcome(inventory, item, a_request("bob")) is Outcome.PAUSED
    await inventory.close(item, spec.sale_id, 3)
    assert await outcome(inventory, item, request) is Outcome.REPLAYED
    assert await outcome(inventory, item, a_request("bob")) is Outcome.ENDED


async def test_the_limit_counts_every_purchase_of_a_user(inventory: Inventory, item: str) -> None:
    await opened(inventory, a_sale(item, 100, max_per_user=3))
    first = await answers(inventory, item, [a_request(quantity=4), a_request(quantity=2)])
    assert [answer.outcome for answer in first] == [Outcome.LIMIT_REACHED, Outcome.ACCEPTED]
    later = await answers(
        inventory, item, [a_request(quantity=2), a_request(quantity=1), a_request()]
    )
    assert later[0] == Answer(Outcome.LIMIT_REACHED, "2 3")
    assert later[1].outcome is Outcome.ACCEPTED
    assert later[2] == Answer(Outcome.LIMIT_REACHED, "3 3")


async def test_a_quantity_above_the_available_units_is_not_sold_out(
    inventory: Inventory, item: str
) -> None:
    await opened(inventory, a_sale(item, 3, max_per_user=5))
    found = await answers(
        inventory, item, [a_request("a", 4), a_request("b", 2), a_request("c", 2), a_request("d")]
    )
    assert [answer.outcome for answer in found] == [
        Outcome.NOT_ENOUGH_LEFT,
        Outcome.ACCEPTED,
        Outcome.NOT_ENOUGH_LEFT,
        Outcome.ACCEPTED,
    ]
    assert await outcome(inventory, item, a_request("e")) is Outcome.SOLD_OUT


async def test_an_empty_stock_sells_nothing(inventory: Inventory, item: str) -> None:
    await opened(inventory, a_sale(item, 0))
    assert await outcome(inventory, item, a_request()) is Outcome.SOLD_OUT


async def test_nothing_is_accepted_before_the_start_or_after_the_end(
    inventory: Inventory, item: str
) -> None:
    now_ms = (await inventory.server(item)).now_ms
    starts_ms, ends_ms = now_ms + 150, now_ms + 400
    await opened(inventory, a_sale(item, 10**6, starts_ms=starts_ms, ends_ms=ends_ms))
    seen: list[tuple[Outcome, int]] = []
    async with asyncio.timeout(20):
        while not seen or seen[-1][0] is not Outcome.ENDED:
            reply = await inventory.reserve(item, [a_request(f"u{len(seen)}")], timeout_seconds=5)
            assert isinstance(reply, BatchReply)
            assert reply.starts_ms == starts_ms
            seen.append((reply.answers[0].outcome, reply.now_ms))
    for found, at_ms in seen:
        expected = (
            Outcome.NOT_OPEN
            if at_ms < starts_ms
            else Outcome.ACCEPTED
            if at_ms < ends_ms
            else Outcome.ENDED
        )
        assert found is expected
    assert {found for found, _ in seen} == {Outcome.NOT_OPEN, Outcome.ACCEPTED, Outcome.ENDED}


async def test_moving_the_end_does_not_reopen_an_ended_sale(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    now_ms = (await inventory.server(item)).now_ms
    spec = await opened(inventory, a_sale(item, 10, ends_ms=now_ms - 1))
    assert await outcome(inventory, item, a_request()) is Outcome.ENDED
    assert await redis.hget(ItemKeys.of(item).sale, "state") == "ended"
    assert await inventory.apply(replace(spec, ends_ms=now_ms + 60_000), 2) is Applied.ENDED
    assert await outcome(inventory, item, a_request()) is Outcome.ENDED


async def test_a_clock_that_jumps_back_does_not_close_an_open_sale(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    now_ms = (await inventory.server(item)).now_ms
    await opened(inventory, a_sale(item, 10, starts_ms=now_ms + 3_600_000, max_per_user=9))
    # The last time that the sale saw is after its start, as if the clock was set back since.
    await redis.hset(ItemKeys.of(item).sale, "last_now_ms", str(now_ms + 3_600_001))
    assert await outcome(inventory, item, a_request()) is Outcome.ACCEPTED


async def test_a_full_outbox_refuses_new_requests_and_answers_replays(
    redis: Redis, outbox: Outbox, item: str
) -> None:
    inventory = Inventory(redis, outbox_limit=2)
    await opened(inventory, a_sale(item, 10))
    requests = [a_request(f"u{n}") for n in range(4)]
    found = await answers(inventory, item, requests)
    assert [answer.outcome for answer in found] == [Outcome.ACCEPTED] * 2 + [
        Outcome.OUTBOX_FULL
    ] * 2
    replay = await answers(inventory, item, requests[:1])
    assert replay[0].outcome is Outcome.REPLAYED
    await outbox.settle(item, [(found[0].detail, requests[0].reservation_id, 1)])
    assert await outcome(inventory, item, requests[2]) is Outcome.ACCEPTED


async def test_an_item_without_a_sale_is_unknown(inventory: Inventory, item: str) -> None:
    assert await outcome(inventory, item, a_request()) is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "2"),
        ("state", "open?"),
        ("accepted", "many"),
        ("starts_ms", "soon"),
        ("held", "many"),
        ("hold_ms", "long"),
        ("max_expired_holds", "few"),
        ("rebuilt", "often"),
    ],
)
async def test_a_sale_of_an_unsupported_format_is_not_changed(
    inventory: Inventory, redis: Redis, item: str, field: str, value: str
) -> None:
    spec = await opened(inventory, a_sale(item))
    await redis.hset(ItemKeys.of(item).sale, field, value)
    before = await redis.hgetall(ItemKeys.of(item).sale)
    assert await outcome(inventory, item, a_request()) is Outcome.UNSUPPORTED
    assert await inventory.apply(spec, 2) is Applied.UNSUPPORTED
    assert await redis.hgetall(ItemKeys.of(item).sale) == before


async def test_a_key_of_the_wrong_type_sells_nothing(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item))
    await redis.set(ItemKeys.of(item).reservations, "not a hash")
    with pytest.raises(RedisUnavailable) as refused:
        await outcome(inventory, item, a_request())
    assert not refused.value.maybe_executed
    sale = (await inventory.sales([item]))[item]
    assert (sale.accepted, sale.outbox_length) == (0, 0)


@pytest.mark.parametrize("text", ["text", "1,", ""])
async def test_a_damaged_buyer_fails_no_other_request_of_its_batch(
    inventory: Inventory, redis: Redis, item: str, text: str
) -> None:
    await opened(inventory, a_sale(item, max_per_user=2))
    keys, [first, again, other] = ItemKeys.of(item), [a_request("eve") for _ in range(3)]
    assert await outcome(inventory, item, first) is Outcome.ACCEPTED
    await redis.hset(keys.buyers, "eve", text)
    batch = [a_request("ann"), again, other, first, a_request("bob")]
    assert [answer.outcome for answer in await answers(inventory, item, batch)] == [
        Outcome.ACCEPTED,
        Outcome.UNREADABLE,
        Outcome.UNREADABLE,
        Outcome.REPLAYED,
        Outcome.ACCEPTED,
    ]
    sold = {first.reservation_id, batch[0].reservation_id, batch[-1].reservation_id}
    assert set(await redis.hkeys(keys.reservations)) == sold
    assert await redis.hgetall(keys.buyers) == {"ann": "1", "bob": "1", "eve": text}
    assert await redis.hget(keys.sale, "accepted") == "3"
    assert await redis.xlen(keys.outbox) == 3


async def test_a_damaged_record_fails_no_other_request_of_its_batch(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item))
    keys, damaged = ItemKeys.of(item), a_request("eve")
    await redis.hset(keys.reservations, damaged.reservation_id, "text")
    first, second = await answers(inventory, item, [damaged, a_request("ann")])
    assert (first.outcome, second.outcome) == (Outcome.UNREADABLE, Outcome.ACCEPTED)
    assert await redis.hget(keys.reservations, damaged.reservation_id) == "text"


@pytest.mark.parametrize("part", ["buyers", "outbox", "holds"])
async def test_a_key_of_the_wrong_type_takes_no_hold(
    inventory: Inventory, redis: Redis, item: str, part: str
) -> None:
    """A part of a hold would be sold again, because the sale has not counted it."""
    await opened(inventory, a_sale(item, hold_seconds=60))
    keys = ItemKeys.of(item)
    await redis.set(getattr(keys, part), "text")
    with pytest.raises(RedisUnavailable, match="WRONGTYPE"):
        await outcome(inventory, item, a_request())
    others = {keys.buyers, keys.reservations, keys.outbox, keys.holds} - {getattr(keys, part)}
    assert await redis.exists(*others) == 0
    assert await redis.hget(keys.sale, "accepted") == "0"


@pytest.mark.parametrize("command", ["hset", "zadd"])
async def test_a_user_who_lacks_the_right_to_a_write_sells_nothing(
    redis_server: RedisServer, inventory: Inventory, redis: Redis, item: str, command: str
) -> None:
    """Of a part of the writes, the ledger or the repetition would make a reservation."""
    await opened(inventory, a_sale(item, 1, hold_seconds=60))
    admin, name = redis_client.connect(redis_server.url), f"user-{uuid.uuid4().hex[:8]}"
    await admin.acl_setuser(
        name, enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", f"-{command}"]
    )
    client = redis_client.connect(f"redis://{name}:secret@127.0.0.1:{redis_server.port}/0")
    request = a_request()
    for _ in range(2):
        with pytest.raises(RedisUnavailable, match=r"permission|can't run") as refused:
            await outcome(Inventory(client), item, request)
        assert not refused.value.maybe_executed
    await client.aclose()
    await admin.acl_deluser(name)
    await admin.aclose()
    keys = ItemKeys.of(item)
    assert await redis.exists(keys.buyers, keys.reservations, keys.outbox, keys.holds) == 0


@pytest.mark.parametrize("hold_seconds", [None, 60])
async def test_a_server_out_of_memory_sells_nothing(
    tmp_path: Path, redis_server: RedisServer, item: str, hold_seconds: int | None
) -> None:
    with RedisServer(tmp_path, binary=redis_server.binary) as server:
        client = redis_client.connect(server.url)
        inventory = Inventory(client)
        await opened(inventory, a_sale(item, hold_seconds=hold_seconds))
        assert await outcome(inventory, item, a_request("ann")) is Outcome.ACCEPTED
        await client.config_set("maxmemory", "1")
        with pytest.raises(RedisUnavailable) as refused:
            await outcome(inventory, item, a_request("bob"))
        assert not refused.value.maybe_executed
        await client.config_set("maxmemory", "0")
        sale = (await inventory.sales([item]))[item]
        assert (sale.accepted, sale.outbox_length) == (1, 1)
        assert await client.hlen(ItemKeys.of(item).buyers) == 1
        await client.aclose()


async def test_a_malformed_batch_changes_nothing(
    inventory: Inventory, redis: Redis, item: str
) -> None:
    await opened(inventory, a_sale(item))
    for bad in (
        a_request("comma,comma"),
        a_request("line\nline"),
        a_request(quantity=0),
        a_request(quantity=-1),
    ):
        with pytest.raises(RedisUnavailable):
            await inventory.reserve(item, [a_request("good"), bad], timeout_seconds=5)
    assert (await inventory.sales([item]))[item].accepted == 0
    assert await redis.exists(ItemKeys.of(item).buyers) == 0


async def test_an_outbox_entry_contains_the_whole_event(
    inventory: Inventory, outbox: Outbox, item: str
) -> None:
    await opened(inventory, a_sale(item, 7, max_per_user=2))
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    request = Request(str(uuid.uuid4()), "ann", 2, "k", trace)
    [answer] = await answers(inventory, item, [request])
    until_ms = (await inventory.server(item)).now_ms + 1
    [entry] = (await outbox.page(item, until_ms=until_ms, count=10)).entries
    assert (entry.entry_id, entry.reservation_id) == (answer.detail, request.reservation_id)
    at_ms = entry.record.accepted_ms
    assert entry.record == Record(State.CONFIRMED, 1, 2, at_ms, "ann", "k", None, at_ms)
    assert entry.snapshot == Snapshot(f"default/{item}", 7, 7, 1)
    assert entry.traceparent == trace


async def test_the_pages_of_reservations_contain_each_reservation(
    inventory: Inventory, item: str
) -> None:
    await opened(inventory, a_sale(item, 10_000))
    requests = [a_request(f"user-{number}") for number in range(8 * 128)]
    for start in range(0, len(requests), 128):
        await answers(inventory, item, requests[start : start + 128])
    pages = [page async for page in inventory.reservation_pages(item, count=100)]
    assert len(pages) > 1
    found = {own_id: record.user_id for _, page in pages for own_id, record in page}
    assert found == {request.reservation_id: request.user_id for request in requests}


async def test_an_item_without_a_sale_has_no_reservations(inventory: Inventory, item: str) -> None:
    with pytest.raises(ContractViolation, match="has no sale of this item"):
        await anext(inventory.reservation_pages(item))
