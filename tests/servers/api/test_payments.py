"""Failures of other shops that take payments, on a real Redis and a real Kafka.

The table in docs/taking-payment.md has all of them. The other tests of that table are elsewhere.
"""

import asyncio

from tests.support.api import problem, reserve
from tests.support.eventually import until
from tests.support.orders import Shop, identity


async def test_a_payment_after_the_hold_gets_the_same_refusal_however_often_it_is_repeated(
    shop: Shop,
) -> None:
    await shop.open(1)
    late = await shop.hold("ann")
    await shop.expire(late)
    problem(await shop.confirm(late, "of-ann"), 409, "hold-expired")
    on_time = await shop.hold("bob")
    for _ in range(3):
        problem(await shop.confirm(late, "of-ann"), 409, "hold-expired")
    assert (await shop.confirm(on_time, "of-bob")).status_code == 200
    problem(await shop.confirm(late, "of-ann"), 409, "hold-expired")
    sale = await shop.sale()
    assert (sale.accepted, sale.released, sale.held) == (2, 1, 0)
    assert (await shop.record(late)).order_ref == ""


async def test_a_repeated_request_and_a_look_at_the_hold_do_not_extend_it(shop: Shop) -> None:
    await shop.open(1, max_per_user=1)
    first = await reserve(shop.buyers, shop.item, "ann", key="cart")
    path = first.headers["location"]
    due_ms = await shop.redis.zscore(shop.keys.holds, identity(path))
    for _ in range(3):
        again = await reserve(shop.buyers, shop.item, "ann", key="cart")
        assert (again.status_code, again.json()) == (202, first.json())
        for port in (shop.buyers, shop.orders):
            assert (await port.get(path)).json()["expiresAt"] == first.json()["expiresAt"]
    assert await shop.redis.zscore(shop.keys.holds, identity(path)) == due_ms
    await shop.expire(path)
    # The former cart takes nothing, so it blocks no other buyer.
    problem(await reserve(shop.buyers, shop.item, "ann", key="cart"), 409, "hold-expired")
    assert (await reserve(shop.buyers, shop.item, "bob", key="cart")).status_code == 202
    problem(await reserve(shop.buyers, shop.item, "ann", key="cart"), 409, "hold-expired")
    problem(await reserve(shop.buyers, shop.item, "ann", key="new"), 409, "sold-out")


async def test_cancellations_and_the_end_of_a_hold_give_its_unit_back_once(shop: Shop) -> None:
    await shop.open(20)
    paths = [await shop.hold(f"u{number}") for number in range(20)]
    problem(await reserve(shop.buyers, shop.item, "late", key="k"), 409, "sold-out")

    async def cancel(path: str, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return (await shop.cancel(path)).status_code

    calls = [
        asyncio.create_task(cancel(path, 0.1 * turn + 0.02 * number))
        for turn in range(5)
        for number, path in enumerate(paths)
    ]
    await shop.make_due()
    assert {*await asyncio.gather(*calls)} == {200}
    await shop.settled()
    sale = await shop.sale()
    assert (sale.accepted, sale.released, sale.held, sale.available) == (20, 20, 0, 20)


async def test_a_confirmed_reservation_outlives_its_hold_until_its_order_gives_it_back(
    shop: Shop,
) -> None:
    await shop.open(2, hold_seconds=4)
    reviewed, left = await shop.hold("ann"), await shop.hold("bob")
    assert (await shop.confirm(reviewed, "review-1")).status_code == 200

    async def expired() -> bool:
        return (await shop.record(left)).state == "expired"

    # The sweep has ended the other hold, which began later.
    await until(expired)
    await shop.settled()
    assert (await shop.orders.get(reviewed)).json()["state"] == "confirmed"
    assert (await shop.sale()).available == 1
    # A late message about an earlier attempt to pay names another order.
    problem(await shop.cancel(reviewed, "attempt-0"), 409, "other-order")
    problem(await shop.cancel(reviewed), 409, "other-order")
    assert (await shop.sale()).available == 1
    assert (await shop.cancel(reviewed, "review-1")).status_code == 200
    await shop.settled()
    assert (await shop.sale()).available == 2
