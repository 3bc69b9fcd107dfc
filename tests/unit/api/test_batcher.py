"""How requests form calls, and which of them wait or are refused. Redis is a fake."""

import asyncio
import time

import pytest

from flashsale.heartbeat import EXPIRY_SECONDS
from flashsale.reservations import BATCH_LIMIT, Outcome
from flashsale_api import calls as calls_module
from flashsale_api.batcher import Batcher, Decision
from flashsale_api.calls import ENOUGH, MAX_CALLS, MAX_WAITING, Failure
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from tests.support.batcher import HeldInventory, RecordingPublisher, a_request, decide, turns

pytestmark = pytest.mark.usefixtures("no_request_expires")


async def test_requests_that_arrive_during_calls_form_the_next_call() -> None:
    inventory, publisher = HeldInventory(), RecordingPublisher()
    batcher = Batcher(inventory, publisher, Metrics(), Engine("flashsale"))
    waiting: list[asyncio.Future[Decision]] = []
    for size in (1, ENOUGH, ENOUGH, 200):
        waiting += [decide(batcher, "x", a_request(len(waiting) + n)) for n in range(size)]
        await turns()
    assert [len(call) for call in inventory.calls] == [1, ENOUGH, ENOUGH]
    for _ in range(5):
        inventory.go.release()
    await asyncio.gather(*waiting)
    assert [len(call) for call in inventory.calls] == [1, ENOUGH, ENOUGH, 128, 72]
    sent = [request.reservation_id for call in inventory.calls for request in call]
    assert sent == [f"id-{number}" for number in range(len(waiting))]
    assert [accepted.reservation_id for accepted in publisher.added] == sent


async def test_few_requests_wait_for_the_reply_to_the_call_before_them() -> None:
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    waiting = [decide(batcher, "x", a_request())]
    await turns()
    waiting += [decide(batcher, "x", a_request(n)) for n in range(1, ENOUGH)]
    await turns()
    assert [len(call) for call in inventory.calls] == [1]
    inventory.go.release()
    await waiting[0]
    await turns()
    assert [len(call) for call in inventory.calls] == [1, ENOUGH - 1]
    inventory.go.release()
    await asyncio.gather(*waiting)


async def test_a_scrape_counts_the_requests_that_wait_for_a_call() -> None:
    inventory, metrics = HeldInventory(), Metrics()
    batcher = Batcher(inventory, RecordingPublisher(), metrics, Engine("flashsale"))
    for number in range(3):
        decide(batcher, "x", a_request(number))
        await turns()
    assert b"\nflashsale_api_waiting_requests 2.0\n" in metrics.text()
    for _ in range(2):
        inventory.go.release()
    await batcher.close()
    assert b"\nflashsale_api_waiting_requests 0.0\n" in metrics.text()


async def test_requests_of_one_loop_turn_share_a_call() -> None:
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    waiting = [decide(batcher, "x", a_request(n)) for n in range(20)]
    inventory.go.release()
    await asyncio.gather(*waiting)
    assert [len(call) for call in inventory.calls] == [20]


async def test_items_do_not_wait_for_one_another() -> None:
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    waiting = [decide(batcher, f"x{n}", a_request(n)) for n in range(10)]
    await turns()
    assert len(inventory.calls) == 10
    for _ in range(10):
        inventory.go.release()
    await asyncio.gather(*waiting)


async def test_items_share_a_call_if_the_server_permits_it() -> None:
    inventory = HeldInventory()
    inventory.items_per_call = 4
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    waiting = [decide(batcher, f"x{n % 6}", a_request(n)) for n in range(12)]
    await turns()
    assert inventory.items_of_calls == [["x0", "x1", "x2", "x3"], ["x4", "x5"]]
    assert [len(call) for call in inventory.calls] == [8, 4]
    for _ in range(2):
        inventory.go.release()
    decisions = await asyncio.gather(*waiting)
    assert [each.reservation_id for each in decisions] == [f"id-{n}" for n in range(12)]
    assert {each.outcome for each in decisions} == {Outcome.ACCEPTED}


async def test_a_shared_call_has_no_more_requests_than_another_and_items_take_turns() -> None:
    inventory = HeldInventory()
    inventory.items_per_call = 4
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    sizes = {"busy": 2 * BATCH_LIMIT + ENOUGH, "quiet": 1, "other": 5}
    waiting = [
        decide(batcher, item_id, a_request(n))
        for item_id, size in sizes.items()
        for n in range(size)
    ]
    await turns()
    assert inventory.items_of_calls == [["busy"], ["quiet", "other", "busy"], ["busy"]]
    assert [len(call) for call in inventory.calls] == [BATCH_LIMIT, BATCH_LIMIT, ENOUGH + 6]
    for _ in range(3):
        inventory.go.release()
    await asyncio.gather(*waiting)


async def test_an_item_that_the_pod_may_not_call_is_left_out_of_a_shared_call() -> None:
    inventory = HeldInventory()
    inventory.items_per_call = 4
    batcher = Batcher(
        inventory,
        RecordingPublisher(),
        Metrics(),
        Engine("flashsale"),
        refusal=lambda item_id: Outcome.FENCED if item_id == "x1" else None,
    )
    waiting = [decide(batcher, f"x{n}", a_request(n)) for n in range(3)]
    inventory.go.release()
    outcomes = [decision.outcome for decision in await asyncio.gather(*waiting)]
    assert outcomes == [Outcome.ACCEPTED, Outcome.FENCED, Outcome.ACCEPTED]
    assert inventory.items_of_calls == [["x0", "x2"]]


async def test_requests_above_the_limit_are_refused_and_never_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls_module, "MAX_WAIT_SECONDS", 60)
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    first = decide(batcher, "x", a_request())
    await turns()
    waiting = [decide(batcher, "x", a_request(n)) for n in range(1, 3 * 128 + 4_400)]
    await turns()
    refused = [future for future in waiting if future.done()]
    assert {future.result().outcome for future in refused} == {Failure.TOO_MANY_WAITING}
    assert len(waiting) - len(refused) == MAX_WAITING // 2
    all_of_them = asyncio.gather(first, *waiting)
    for _ in range(100):
        inventory.go.release()
    await all_of_them
    sent = {request.reservation_id for call in inventory.calls for request in call}
    assert len(sent) == 1 + len(waiting) - len(refused)


async def test_an_item_leaves_as_many_places_free_as_its_requests_take() -> None:
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    waiting: dict[str, int] = {}
    for item_id in ("x", "y", "z"):
        sent = [decide(batcher, item_id, a_request(n)) for n in range(MAX_WAITING)]
        waiting[item_id] = sum(not future.done() for future in sent)
    assert waiting == {"x": MAX_WAITING // 2, "y": MAX_WAITING // 4, "z": MAX_WAITING // 8}
    for _ in range(100):
        inventory.go.release()
    await batcher.close()


async def test_made_up_items_take_no_place_and_no_call_of_a_sale() -> None:
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    inventory.go.release()
    assert (await decide(batcher, "sale", a_request())).outcome is Outcome.ACCEPTED
    inventory.outcome = Outcome.UNKNOWN
    number = MAX_WAITING + MAX_CALLS + 100
    made_up = [decide(batcher, f"nothing-{n}", a_request(n)) for n in range(number)]
    await turns()
    assert sum(future.done() for future in made_up) == MAX_CALLS + 100
    assert len(inventory.calls) == 1 + MAX_CALLS
    decide(batcher, "sale", a_request(1))
    await turns()
    assert len(inventory.calls) == 2 + MAX_CALLS
    assert batcher.called_items() == ["sale"]
    for _ in range(number + 2):
        inventory.go.release()
    await batcher.close()
    shares = batcher._shares.values()
    assert [(share.waiting, share.in_flight) for share in shares] == [(0, 0)] * 2


async def test_an_item_is_called_from_its_call_for_the_lifetime_of_a_heartbeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A heartbeat reports the item, because the reply can bring events that it has not counted."""
    inventory, engine = HeldInventory(), Engine("flashsale")
    engine.items.note("sale")
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), engine)
    deciding = decide(batcher, "sale", a_request())
    await turns()
    assert batcher.called_items() == ["sale"]
    inventory.go.release()
    await deciding
    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now + EXPIRY_SECONDS - 1)
    assert batcher.called_items() == ["sale"]
    monkeypatch.setattr(loop, "time", lambda: now + EXPIRY_SECONDS)
    assert batcher.called_items() == []


async def test_a_sale_that_becomes_known_does_not_wait_for_made_up_items() -> None:
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    first = decide(batcher, "sale", a_request())
    await turns()
    made_up = [decide(batcher, f"nothing-{n}", a_request(n)) for n in range(2 * MAX_CALLS)]
    second = decide(batcher, "sale", a_request(1))
    await turns()
    assert len(inventory.calls) == MAX_CALLS
    inventory.go.release()
    assert (await first).outcome is Outcome.ACCEPTED
    await turns()
    assert ["sale"] in inventory.items_of_calls[MAX_CALLS:]
    for _ in range(2 * MAX_CALLS + 1):
        inventory.go.release()
    await batcher.close()
    assert (await second).outcome is Outcome.ACCEPTED
    assert all(future.done() for future in made_up)


async def test_a_silent_node_takes_no_place_and_no_call_of_another_one() -> None:
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    for item_id in ("silent.0", "other.0"):
        inventory.go.release()
        assert (await decide(batcher, item_id, a_request())).outcome is Outcome.ACCEPTED
    waiting = [decide(batcher, f"silent.{n}", a_request(n)) for n in range(MAX_WAITING)]
    await turns()
    sent = len(inventory.calls)
    waiting.append(decide(batcher, "other.0", a_request(1)))
    await turns()
    assert len(inventory.calls) == sent + 1
    for _ in waiting:
        inventory.go.release()
    await batcher.close()


async def test_a_request_that_waited_too_long_is_refused_and_never_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls_module, "MAX_WAIT_SECONDS", 0.1)
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    in_flight = [decide(batcher, "x", a_request())]
    await turns()
    late = await decide(batcher, "x", a_request(99))
    assert late.outcome is Failure.TOO_MANY_WAITING
    for _ in range(10):
        inventory.go.release()
    decisions = await asyncio.gather(*in_flight)
    assert {decision.outcome for decision in decisions} == {Outcome.ACCEPTED}
    assert "id-99" not in {request.reservation_id for call in inventory.calls for request in call}


async def test_a_request_that_waited_while_the_process_stood_still_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls_module, "MAX_WAIT_SECONDS", 0.3)  # a call takes at most 0.5 s
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    waiting = [decide(batcher, "x", a_request())]
    await turns()
    waiting.append(decide(batcher, "x", a_request(1)))
    time.sleep(0.4)  # noqa: ASYNC251 - the process stands still
    for _ in waiting:
        inventory.go.release()
    decisions = await asyncio.gather(*waiting)
    assert [decision.outcome for decision in decisions] == [Outcome.ACCEPTED] * 2


async def test_calls_in_flight_are_limited_across_items() -> None:
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    waiting = [decide(batcher, f"x{n % 200}", a_request(n)) for n in range(400)]
    await turns()
    assert len(inventory.calls) == MAX_CALLS
    waiting += [decide(batcher, f"x{n % 200}", a_request(n)) for n in range(400, 800)]
    for _ in range(800):
        inventory.go.release()
        await turns(2)
        assert len(inventory.calls) - inventory.answered <= 2 * MAX_CALLS
    decisions = await asyncio.gather(*waiting)
    assert {decision.outcome for decision in decisions} == {Outcome.ACCEPTED}
    assert sum(len(call) for call in inventory.calls) == 800
    assert not batcher._queues


async def test_close_decides_waiting_requests_and_refuses_new_ones() -> None:
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    waiting = [decide(batcher, "x", a_request(n)) for n in range(500)]
    await turns()
    closing = asyncio.create_task(batcher.close())
    await turns()
    late = await decide(batcher, "x", a_request(500))
    assert late.outcome is Failure.TOO_MANY_WAITING
    assert not closing.done()
    for _ in range(5):
        inventory.go.release()
    await closing
    assert {(await future).outcome for future in waiting} == {Outcome.ACCEPTED}


async def test_close_decides_requests_that_arrived_in_the_same_loop_turn() -> None:
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    inventory.go.release()
    last = decide(batcher, "x", a_request())
    await batcher.close()
    assert last.done()
    assert (await last).outcome is Outcome.ACCEPTED
