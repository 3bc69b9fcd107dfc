"""The order port on a real Redis and a real Kafka: every answer, and every end of a hold."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from dev.stack.ports import free_port
from flashsale import keys
from flashsale.inventory import Applied
from flashsale.reservations import OrderCall, TransitionReply
from tests.support.api import problem, reserve
from tests.support.eventually import until
from tests.support.orders import TOKENS, NewApi, Shop, identity, order_client


@asynccontextmanager
async def kafka_away(shop: Shop) -> AsyncIterator[None]:
    """Kafka answers nothing for as long. Afterwards it has acknowledged every event."""
    shop.kafka.pause()
    try:
        yield
    finally:
        shop.kafka.resume()
    await shop.settled()


async def begin(shop: Shop, state: str) -> str:
    """Bring a reservation into a state. Return its path."""
    await shop.open(hold_seconds=None if state == "confirmed without order" else 60)
    path = await shop.hold(quantity=2)
    if state == "confirmed":
        assert (await shop.confirm(path, "o1")).status_code == 200
    elif state == "cancelled":
        assert (await shop.cancel(path, "o1")).status_code == 200
    elif state == "expired":
        await shop.expire(path)
    return path


@pytest.mark.parametrize(
    ("state", "verb", "order_ref", "status", "outcome"),
    [
        ("held", "confirm", "o1", 200, "confirmed"),
        ("held", "cancel", "", 200, "cancelled"),
        ("held", "cancel", "o1", 200, "cancelled"),
        ("confirmed", "confirm", "o1", 200, "confirmed"),
        ("confirmed", "confirm", "o2", 409, "other-order"),
        ("confirmed", "cancel", "o1", 200, "cancelled"),
        ("confirmed", "cancel", "o2", 409, "other-order"),
        ("confirmed", "cancel", "", 409, "other-order"),
        ("confirmed without order", "confirm", "o1", 200, "confirmed"),
        ("confirmed without order", "cancel", "", 200, "cancelled"),
        ("confirmed without order", "cancel", "o1", 200, "cancelled"),
        ("cancelled", "confirm", "o1", 409, "cancelled"),
        ("cancelled", "cancel", "o1", 200, "cancelled"),
        ("cancelled", "cancel", "", 200, "cancelled"),
        ("expired", "confirm", "o1", 409, "hold-expired"),
        ("expired", "cancel", "", 200, "expired"),
    ],
)
async def test_a_call_is_answered_by_the_state_of_the_reservation(
    shop: Shop, state: str, verb: str, order_ref: str, status: int, outcome: str
) -> None:
    path = await begin(shop, state)
    before = await shop.record(path)
    answer = await shop.call(path, verb, order_ref)
    if status == 200:
        assert (answer.status_code, answer.json()["state"]) == (200, outcome), answer.text
    else:
        problem(answer, status, outcome)
        assert await shop.record(path) == before
    shown = (await shop.orders.get(path)).json()
    after = await shop.record(path)
    assert (shown["state"], shown["version"]) == (after.state, after.version)
    assert shown.get("orderRef", "") == after.order_ref
    if status == 200:
        assert shown == answer.json()
        await shop.settled()
        assert {(e.version, e.state) for e in await shop.published(path)} >= {
            (after.version, after.state)
        }


async def test_an_answer_shows_the_whole_reservation(shop: Shop) -> None:
    await shop.open()
    path = await shop.hold("ann", 3)
    held = (await shop.orders.get(path)).json()
    assert held == {
        "reservationId": identity(path),
        "saleId": f"default/{shop.item}",
        "itemId": shop.item,
        "userId": "ann",
        "quantity": 3,
        "state": "held",
        "acceptedAt": held["acceptedAt"],
        "expiresAt": held["expiresAt"],
        "version": 1,
    }
    confirmed = (await shop.confirm(path, "order-7")).json()
    changed = {"state": "confirmed", "version": 2, "orderRef": "order-7"}
    assert confirmed == held | changed | {"confirmedAt": confirmed["confirmedAt"]}
    for_buyers = (await shop.buyers.get(path)).json()
    hidden = {"version", "orderRef", "userId"}
    assert for_buyers == {name: value for name, value in confirmed.items() if name not in hidden}


@pytest.mark.parametrize("verb", ["confirm", "cancel"])
async def test_a_call_that_names_another_sale_changes_nothing(shop: Shop, verb: str) -> None:
    """A buyer's key names the same reservation in the next sale of the item."""
    spec = await shop.open()
    path = await shop.hold()
    before = await shop.record(path)
    problem(await shop.call(path, verb, "o1", "default/former"), 409, "other-sale")
    unknown = f"/sales/{shop.item}/reservations/{uuid.uuid4()}"
    problem(await shop.call(unknown, verb, "o1", "default/former"), 409, "other-sale")
    problem(await shop.call(path, verb, "o1", "no namespace"), 422, "invalid-field")
    assert await shop.record(path) == before
    answer = await shop.call(path, verb, "o1", spec.sale_id)
    assert (answer.status_code, answer.json()["saleId"]) == (200, spec.sale_id)


@pytest.mark.parametrize("verb", ["confirm", "cancel"])
async def test_a_repeated_call_changes_the_reservation_once(shop: Shop, verb: str) -> None:
    await shop.open()
    path = await shop.hold()
    together = await asyncio.gather(*(shop.call(path, verb, "o1") for _ in range(20)))
    later = [await shop.call(path, verb, "o1") for _ in range(3)]
    assert {answer.status_code for answer in [*together, *later]} == {200}
    assert len({answer.text for answer in [*together, *later]}) == 1
    await shop.settled()
    sale = await shop.sale()
    assert (sale.accepted, sale.released, sale.held) == (1, int(verb == "cancel"), 0)


async def test_repeated_requests_and_calls_add_no_events(shop: Shop) -> None:
    spec = await shop.open()

    async def repeat(times: int) -> str:
        """Reserve with one key, ten requests at a time. Return the path."""
        paths = set()
        for _ in range(times // 10):
            wanted = (reserve(shop.buyers, shop.item, key="k") for _ in range(10))
            answers = await asyncio.gather(*wanted)
            assert {answer.status_code for answer in answers} == {202}
            paths |= {answer.headers["location"] for answer in answers}
        [path] = paths
        return str(path)

    async def publishes(expected: list[tuple[int, int]]) -> None:
        """Wait until the events have exactly these versions and revisions of the sale."""
        await shop.settled()

        async def published() -> bool:
            events = await shop.published(path)
            return sorted((event.version, event.revision) for event in events) == expected

        # A replay has no outbox entry, so the outbox may be empty before Kafka has its event.
        await until(published)

    path = await repeat(1_000)
    accepted = [(1, 1)] * 2  # the acceptance and one replay
    await publishes(accepted)
    for _ in range(20):
        answers = await asyncio.gather(*(shop.confirm(path, "o1") for _ in range(10)))
        assert {answer.status_code for answer in answers} == {200}
    await repeat(100)
    confirmed = [(2, 1)] * 2
    await publishes(accepted + confirmed)
    # In another revision of the sale, one event is published again.
    more = replace(spec, stock=200)
    assert await shop.inventory.apply(more, 2, seed_until_ms=0) is Applied.CHANGED
    await repeat(100)
    await shop.confirm(path, "o1")
    await publishes([*accepted, *confirmed, (2, 2)])


async def test_of_two_orders_that_race_for_a_hold_one_gets_it(shop: Shop) -> None:
    await shop.open()
    path = await shop.hold()
    answers = await asyncio.gather(*(shop.confirm(path, f"o{n % 8}") for n in range(64)))
    winners = {answer.json()["orderRef"] for answer in answers if answer.status_code == 200}
    assert len(winners) == 1
    assert sum(answer.status_code == 200 for answer in answers) == 8
    for answer in answers:
        if answer.status_code != 200:
            problem(answer, 409, "other-order")
    assert {(await shop.record(path)).order_ref} == winners


async def test_a_hold_that_is_confirmed_while_it_expires_does_one_of_both(shop: Shop) -> None:
    await shop.open()
    paths = [await shop.hold(f"u{n}") for n in range(60)]

    async def race(number: int) -> httpx.Response:
        await asyncio.sleep(number * 0.03)
        return await shop.confirm(paths[number], f"o{number}")

    calls = [asyncio.create_task(race(number)) for number in range(len(paths))]
    await shop.make_due()
    answers = await asyncio.gather(*calls)
    await shop.settled()
    for path, answer in zip(paths, answers, strict=True):
        if answer.status_code == 200:
            assert (await shop.record(path)).state == "confirmed"
        else:
            problem(answer, 409, "hold-expired")
            assert (await shop.record(path)).state == "expired"
    confirmed = sum(answer.status_code == 200 for answer in answers)
    sale = await shop.sale()
    assert (sale.accepted, sale.released, sale.held) == (60, 60 - confirmed, 0)


async def test_a_hold_can_be_confirmed_after_its_time_until_it_is_expired(shop: Shop) -> None:
    await shop.open(hold_seconds=4)
    path = await shop.hold()
    expires_ms = (await shop.record(path)).expires_ms
    assert expires_ms is not None
    # Keep the sweep away, as if its turn had not come.
    await shop.redis.zadd(shop.keys.holds, {identity(path): 2**53}, xx=True)

    async def late() -> bool:
        return (await shop.inventory.server()).now_ms > expires_ms

    await until(late)
    assert (await shop.confirm(path)).status_code == 200


async def test_a_call_is_accepted_but_not_promised_while_kafka_is_away(shop: Shop) -> None:
    await shop.open()
    paths = await shop.hold("ann"), await shop.hold("bob")
    await shop.settled()

    async def both() -> list[httpx.Response]:
        confirming = shop.confirm(paths[0], "o1", repeat=False)
        return [*await asyncio.gather(confirming, shop.cancel(paths[1], "o2", repeat=False))]

    async with kafka_away(shop):
        # A repetition finds the change made, and must not promise more than the first call.
        answers = [*await both(), *await both()]
    for answer in answers:
        assert answer.status_code == 202
        assert int(answer.headers["retry-after"]) >= 1
    assert [answer.json()["state"] for answer in answers] == ["confirmed", "cancelled"] * 2
    for path, verb, order_ref in zip(paths, ("confirm", "cancel"), ("o1", "o2"), strict=True):
        assert (await shop.call(path, verb, order_ref)).status_code == 200
        assert 2 in {event.version for event in await shop.published(path)}


async def test_a_cancelled_unit_is_sold_again_only_after_kafka_has_the_cancellation(
    shop: Shop,
) -> None:
    await shop.open(1, max_per_user=1)
    path = await shop.hold("ann")
    await shop.settled()
    async with kafka_away(shop):
        assert (await shop.cancel(path, repeat=False)).status_code == 202
        problem(await reserve(shop.buyers, shop.item, "bob", key="k"), 409, "sold-out")
        # The buyer has not got the limit back either.
        problem(await reserve(shop.buyers, shop.item, "ann", key="k"), 409, "limit-reached")
        assert (await shop.sale()).available == 0
    assert (await shop.sale()).available == 1
    assert (await reserve(shop.buyers, shop.item, "ann", key="k")).status_code == 202


async def test_an_expired_unit_is_sold_again(shop: Shop) -> None:
    await shop.open(1, max_per_user=1)
    path = await shop.hold("ann")
    assert (
        problem(await reserve(shop.buyers, shop.item, "bob", key="k"), 409, "sold-out")["held"] == 1
    )
    await shop.expire(path)
    assert (await reserve(shop.buyers, shop.item, "bob", key="k")).status_code == 202
    assert problem(await reserve(shop.buyers, shop.item, "ann", key="k"), 409, "sold-out")


async def test_a_buyer_with_three_expired_holds_gets_no_other(shop: Shop) -> None:
    await shop.open()
    for _ in range(3):
        await shop.expire(await shop.hold("ann"))
    problem(await reserve(shop.buyers, shop.item, "ann"), 409, "too-many-holds")
    await shop.hold("bob")


async def test_cancellations_by_the_shop_do_not_count_as_expired_holds(shop: Shop) -> None:
    await shop.open()
    for _ in range(4):
        assert (await shop.cancel(await shop.hold("ann"))).status_code == 200
    await shop.settled()
    await shop.hold("ann")


@pytest.mark.parametrize("state", ["paused", "ended", "closed"])
async def test_a_sale_that_accepts_nothing_still_confirms_cancels_and_expires(
    shop: Shop, state: str
) -> None:
    spec = await shop.open()
    paths = [await shop.hold(user) for user in ("ann", "bob", "cid")]
    if state == "closed":
        await shop.inventory.close(shop.item, spec.sale_id, 2)
    else:
        changes: dict[str, Any] = {"paused": True} if state == "paused" else {"ends_ms": 1}
        await shop.inventory.apply(replace(spec, **changes), 2)
    kind = "paused" if state == "paused" else "ended"
    problem(await reserve(shop.buyers, shop.item, "dan"), 409, kind)
    assert (await shop.confirm(paths[0])).status_code == 200
    assert (await shop.cancel(paths[1])).status_code == 200
    await shop.expire(paths[2])


@pytest.mark.parametrize(("field", "value"), [("run_id", "another"), ("format", "99")])
async def test_a_fenced_sale_answers_503_to_every_call(shop: Shop, field: str, value: str) -> None:
    await shop.open()
    path = await shop.hold()
    await shop.redis.hset(shop.keys.sale, field, value)
    answers = [await shop.confirm(path), await shop.cancel(path), await shop.orders.get(path)]
    for answer in [*answers, await shop.buyers.get(path)]:
        problem(answer, 503, "fenced")
        assert int(answer.headers["retry-after"]) >= 1


async def test_a_primary_without_its_replicas_answers_no_order(shop: Shop) -> None:
    """Another server may have replaced it. A reservation that is unknown here can exist there."""
    await shop.open()
    path = await shop.hold()
    assert (await shop.confirm(path)).status_code == 200
    unknown = path.replace(identity(path), str(uuid.uuid4()))
    await shop.redis.config_set("min-replicas-to-write", 1)
    try:

        async def without_heartbeat() -> bool:
            return "fenced" in (await shop.orders.get(path)).text

        # The scripts are refused at once.
        for call, asked in ((shop.confirm, path), (shop.confirm, unknown), (shop.cancel, unknown)):
            assert (await call(asked)).status_code == 503
        await until(without_heartbeat)
        for known in (path, unknown):
            problem(await shop.orders.get(known), 503, "fenced")
            problem(await shop.confirm(known), 503, "fenced")
            problem(await shop.cancel(known), 503, "fenced")
    finally:
        await shop.redis.config_set("min-replicas-to-write", 0)

    async def answered() -> bool:
        return (await shop.orders.get(path)).status_code == 200

    await until(answered)
    assert (await shop.confirm(path)).status_code == 200
    problem(await shop.confirm(unknown), 404, "unknown-reservation")


async def test_lost_keys_do_not_look_like_an_unknown_sale(shop: Shop) -> None:
    """A shop that gets 404 gives the buyer the money back."""
    spec = await shop.open()
    path = await shop.hold()
    await shop.inventory.close(shop.item, spec.sale_id, 2)
    problem(await reserve(shop.buyers, shop.item, "bob"), 409, "ended")
    assert (await shop.confirm(path)).status_code == 200
    await shop.settled()
    await shop.redis.delete(*shop.keys.sold)
    for answer in (await shop.confirm(path), await shop.orders.get(path)):
        problem(answer, 503, "fenced")


async def test_a_repetition_publishes_the_change_of_a_dead_pod(shop: Shop) -> None:
    """The pod died after the script call, and Redis then lost the outbox entry."""
    await shop.open()
    path = await shop.hold()
    await shop.settled()
    reply = await shop.inventory.change(
        "confirm", shop.item, [OrderCall(identity(path), "o1")], timeout_seconds=5
    )
    assert isinstance(reply, TransitionReply)
    await shop.redis.xdel(shop.keys.outbox, reply.answers[0].entry_id)
    assert (await shop.confirm(path, "o1")).status_code == 200
    found = [(event.version, event.state) for event in await shop.published(path)]
    assert sorted(found) == [(1, "held"), (2, "confirmed")]


async def test_the_sweep_publishes_the_cancellation_of_a_dead_pod(
    shop: Shop, new_order_api: NewApi
) -> None:
    await shop.open(1)
    path = await shop.hold()
    await shop.settled()
    nowhere = f"127.0.0.1:{free_port()}"
    victim = await asyncio.to_thread(new_order_api, TOKENS[0], kafka_bootstrap=nowhere)
    async with order_client(victim) as orders:
        calling = asyncio.create_task(orders.post(f"{path}/cancel"))

        async def cancelled() -> bool:
            return (await shop.record(path)).state == "cancelled"

        await until(cancelled)
        # The other pod leaves the entry alone until it is 3 seconds old.
        assert (await shop.sale()).available == 0
        answer = await calling
    assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
    victim.kill()
    await shop.settled()
    assert (await shop.sale()).available == 1
    assert {event.state for event in await shop.published(path)} == {"held", "cancelled"}


async def test_a_stopping_pod_answers_the_calls_in_progress(
    shop: Shop, new_order_api: NewApi
) -> None:
    api = await asyncio.to_thread(new_order_api, TOKENS[0])
    await shop.open()
    path = await shop.hold()
    async with kafka_away(shop), order_client(api) as orders:
        calling = asyncio.create_task(orders.post(f"{path}/confirm", json={"orderRef": "o"}))

        async def confirmed() -> bool:
            return (await shop.record(path)).state == "confirmed"

        await until(confirmed)
        stopping = asyncio.create_task(asyncio.to_thread(api.stop))
        answer = await calling
        assert (answer.status_code, answer.json()["state"]) == (202, "confirmed")
    await stopping
    assert 2 in {event.version for event in await shop.published(path)}


async def test_metrics_count_the_calls_by_verb_and_outcome(shop: Shop) -> None:
    await shop.open()
    path = await shop.hold()
    await shop.settled()
    for order_ref in ("o1", "o1", "o2", "a b"):
        await shop.confirm(path, order_ref, repeat=False)
    await shop.cancel(path, "o1", repeat=False)
    async with httpx.AsyncClient() as scraper:
        text = (await scraper.get(shop.api.metrics_url)).text
    for outcome, verb in (
        ("changed", "confirm"),
        ("replayed", "confirm"),
        ("other_order", "confirm"),
        ("invalid_field", "confirm"),
        ("changed", "cancel"),
    ):
        labels = f'item="{shop.item}",outcome="{outcome}",verb="{verb}"'
        assert f"flashsale_api_transitions_total{{{labels}}} 1.0" in text
    assert (
        'flashsale_api_order_call_seconds_bucket{answer="durable",le="2.0",verb="confirm"}' in text
    )
    assert 'flashsale_api_unacknowledged_order_calls{verb="confirm"} 0.0' in text
    assert 'flashsale_api_waiting_order_calls{verb="confirm"} 0.0' in text


async def test_a_new_pod_takes_no_lost_reservation_for_an_unknown_one(
    shop: Shop, new_order_api: NewApi
) -> None:
    """A 404 is final, and the shop would void a payment that the ledger has."""
    await shop.open()
    path = await shop.hold()
    assert (await shop.confirm(path)).status_code == 200
    engine_id = await shop.inventory.index.engine_id()
    await shop.redis.delete(*shop.keys.sold, keys.engine_id(shop.inventory.engine))
    try:
        async with order_client(new_order_api(",".join(TOKENS))) as orders:
            problem(await orders.post(f"{path}/confirm", json={"orderRef": "o1"}), 503, "fenced")
            problem(await orders.get(path), 503, "fenced")
    finally:
        await shop.inventory.index.claim(engine_id)
