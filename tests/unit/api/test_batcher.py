"""How batches form, and what is never sent: a fake Redis answers when it is told to."""

import asyncio
from collections.abc import Sequence

from flashsale.errors import RedisUnavailable
from flashsale.heartbeat import CALL_DEADLINE_SECONDS
from flashsale.inventory import Inventory
from flashsale.reservations import Answer, BatchReply, Outcome, Request, Snapshot
from flashsale_api import batcher
from flashsale_api.batcher import Batcher, Decision, Failure
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Accepted, Publisher


class StandingInventory(Inventory):
    """Answers when it is told to; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Sequence[Request]] = []
        self.answered = 0
        self.go = asyncio.Semaphore(0)
        self.outcome = Outcome.ACCEPTED
        self.available = 1
        self.fail = False

    async def reserve(
        self, item_id: str, requests: Sequence[Request], *, timeout_seconds: float
    ) -> BatchReply:
        del item_id, timeout_seconds
        self.calls.append(requests)
        await self.go.acquire()
        self.answered += 1
        if self.fail:
            raise RedisUnavailable("cut", maybe_executed=True)
        return BatchReply(
            now_ms=1,
            snapshot=Snapshot("default/x", 1, 1, 1),
            available=self.available,
            outbox_length=0,
            starts_ms=0,
            answers=[Answer(self.outcome, "1-1") for _ in requests],
        )


class Publications(Publisher):
    def __init__(self) -> None:
        self.taken: list[Accepted] = []

    def add(self, accepted: Accepted) -> None:
        self.taken.append(accepted)


def a_request(number: int = 0) -> Request:
    return Request(f"id-{number}", f"user-{number}", 1)


def decided(batches: Batcher, item_id: str, request: Request) -> "asyncio.Future[Decision]":
    decision: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

    def tell(made: Decision) -> None:
        if not decision.done():  # the buyer has gone
            decision.set_result(made)

    batches.decide(item_id, request, tell)
    return decision


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_what_arrives_while_calls_are_in_flight_forms_the_next_call() -> None:
    inventory, published = StandingInventory(), Publications()
    batches = Batcher(inventory, published, Metrics())
    waiting = []
    for number in range(3):
        waiting.append(decided(batches, "x", a_request(number)))
        await turns()
    assert [len(call) for call in inventory.calls] == [1, 1, 1]
    waiting += [decided(batches, "x", a_request(n)) for n in range(3, 203)]
    await turns()
    assert len(inventory.calls) == 3
    for _ in range(5):
        inventory.go.release()
    await asyncio.gather(*waiting)
    assert [len(call) for call in inventory.calls] == [1, 1, 1, 128, 72]
    sent = [request.reservation_id for call in inventory.calls for request in call]
    assert sent == [f"id-{number}" for number in range(203)]
    assert [each.reservation_id for each in published.taken] == sent


async def test_requests_of_one_turn_go_together() -> None:
    inventory = StandingInventory()
    batches = Batcher(inventory, Publications(), Metrics())
    waiting = [decided(batches, "x", a_request(n)) for n in range(20)]
    inventory.go.release()
    await asyncio.gather(*waiting)
    assert [len(call) for call in inventory.calls] == [20]


async def test_items_do_not_wait_for_one_another() -> None:
    inventory = StandingInventory()
    batches = Batcher(inventory, Publications(), Metrics())
    waiting = [decided(batches, f"x{n}", a_request(n)) for n in range(10)]
    await turns()
    assert len(inventory.calls) == 10
    for _ in range(10):
        inventory.go.release()
    await asyncio.gather(*waiting)


async def test_too_many_are_refused_and_never_sent() -> None:
    inventory = StandingInventory()
    batches = Batcher(inventory, Publications(), Metrics())
    first = decided(batches, "x", a_request())
    await turns()
    waiting = [decided(batches, "x", a_request(n)) for n in range(1, 3 * 128 + 4_400)]
    await turns()
    refused = [task for task in waiting if task.done()]
    assert {task.result().outcome for task in refused} == {Failure.TOO_MANY_WAITING}
    # Two calls went out with what had come; the limit holds for what waits behind them.
    assert len(waiting) - len(refused) == batcher.MAX_WAITING
    all_of_them = asyncio.gather(first, *waiting)
    for _ in range(100):
        inventory.go.release()
    await all_of_them
    assert sum(map(len, inventory.calls)) == 1 + len(waiting) - len(refused)


async def test_who_waited_too_long_is_answered_and_never_sent() -> None:
    inventory = StandingInventory()
    batches = Batcher(inventory, Publications(), Metrics())
    in_flight = []
    for number in range(batcher.CALLS_IN_FLIGHT):
        in_flight.append(decided(batches, "x", a_request(number)))
        await turns()
    late = await decided(batches, "x", a_request(99))
    assert late.outcome is Failure.TOO_MANY_WAITING
    for _ in range(10):
        inventory.go.release()
    decisions = await asyncio.gather(*in_flight)
    assert {decision.outcome for decision in decisions} == {Outcome.ACCEPTED}
    assert "id-99" not in {request.reservation_id for call in inventory.calls for request in call}


async def test_a_failed_call_is_sent_once_more_with_the_same_ids() -> None:
    inventory = StandingInventory()
    inventory.fail = True
    batches = Batcher(inventory, Publications(), Metrics())
    for _ in range(10):
        inventory.go.release()
    decision = await decided(batches, "x", a_request())
    assert (decision.outcome, decision.reservation_id) == (Failure.OUTCOME_UNKNOWN, "id-0")
    assert len(inventory.calls) == 2
    assert inventory.calls[0] == inventory.calls[1]


async def test_an_answer_from_before_a_suspension_is_not_believed() -> None:
    inventory, published = StandingInventory(), Publications()
    batches = Batcher(inventory, published, Metrics())
    deciding = decided(batches, "x", a_request())
    await turns()
    loop = asyncio.get_running_loop()
    awake, slept = loop.time, 2 * CALL_DEADLINE_SECONDS
    loop.time = lambda: awake() + slept  # type: ignore[method-assign] # the process was stopped
    inventory.go.release()
    await turns()
    inventory.fail = True
    inventory.go.release()
    decision = await deciding
    assert decision.outcome is Failure.OUTCOME_UNKNOWN
    assert published.taken == []


async def test_sold_out_is_remembered_for_a_moment_for_its_item_only() -> None:
    inventory = StandingInventory()
    inventory.outcome, inventory.available = Outcome.SOLD_OUT, 0
    batches = Batcher(inventory, Publications(), Metrics())
    inventory.go.release()
    assert not batches.sold_out("x")
    await decided(batches, "x", a_request())
    assert batches.sold_out("x")
    assert not batches.sold_out("y")
    async with asyncio.timeout(20):
        while batches.sold_out("x"):
            await asyncio.sleep(0.01)


async def test_fewer_left_than_asked_for_is_not_sold_out() -> None:
    inventory = StandingInventory()
    inventory.outcome, inventory.available = Outcome.NOT_ENOUGH_LEFT, 1
    batches = Batcher(inventory, Publications(), Metrics())
    inventory.go.release()
    await decided(batches, "x", a_request())
    assert not batches.sold_out("x")


async def test_a_buyer_who_goes_away_does_not_cancel_the_batch() -> None:
    inventory, published = StandingInventory(), Publications()
    batches = Batcher(inventory, published, Metrics())
    leaver = decided(batches, "x", a_request(1))
    stayer = decided(batches, "x", a_request(2))
    await turns()
    leaver.cancel()
    await turns()
    inventory.go.release()
    assert (await stayer).outcome is Outcome.ACCEPTED
    assert len(published.taken) == 2


async def test_however_many_items_are_asked_for_redis_is_not_flooded() -> None:
    inventory = StandingInventory()
    batches = Batcher(inventory, Publications(), Metrics())
    waiting = [decided(batches, f"x{n % 200}", a_request(n)) for n in range(400)]
    await turns()
    assert len(inventory.calls) == batcher.MAX_CALLS
    waiting += [decided(batches, f"x{n % 200}", a_request(n)) for n in range(400, 800)]
    for _ in range(800):
        inventory.go.release()
        await turns(2)
        assert len(inventory.calls) - inventory.answered <= batcher.MAX_CALLS
    decisions = await asyncio.gather(*waiting)
    assert {decision.outcome for decision in decisions} == {Outcome.ACCEPTED}
    assert sum(len(call) for call in inventory.calls) == 800
    assert not batches._queues


async def test_who_closes_decides_what_waits_and_refuses_who_comes() -> None:
    inventory = StandingInventory()
    batches = Batcher(inventory, Publications(), Metrics())
    waiting = [decided(batches, "x", a_request(n)) for n in range(500)]
    await turns()
    closing = asyncio.create_task(batches.close())
    await turns()
    late = await decided(batches, "x", a_request(500))
    assert late.outcome is Failure.TOO_MANY_WAITING
    assert not closing.done()
    for _ in range(5):
        inventory.go.release()
    await closing
    assert {(await each).outcome for each in waiting} == {Outcome.ACCEPTED}


async def test_who_closes_decides_what_has_come_in_the_same_turn() -> None:
    inventory = StandingInventory()
    batches = Batcher(inventory, Publications(), Metrics())
    inventory.go.release()
    last = decided(batches, "x", a_request())
    await batches.close()
    assert last.done()
    assert (await last).outcome is Outcome.ACCEPTED
