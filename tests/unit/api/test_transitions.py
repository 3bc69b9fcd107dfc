"""When a call to confirm or cancel is durable, and how calls form batches. Redis is a fake."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from flashsale.errors import RedisUnavailable
from flashsale.heartbeat import ACKNOWLEDGED_SECONDS, CALL_DEADLINE_SECONDS
from flashsale.inventory import Inventory
from flashsale.reservations import (
    OrderCall,
    OutboxEntry,
    Outcome,
    Record,
    Snapshot,
    State,
    Transition,
    TransitionAnswer,
    TransitionReply,
    Verb,
)
from flashsale_api.calls import Failure
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.transitions import Decision, Transitions
from tests.support.batcher import RecordingPublisher

RECORD = Record(State.CONFIRMED, 2, 1, 1, "ann", "", 2, 1, "o")
TRACEPARENT = f"00-{1:032x}-{1:016x}-01"
SNAPSHOT = Snapshot("default/x", 1, 1, 1)


class HeldInventory(Inventory):
    """Records the calls, and answers one call per `go.release()`."""

    def __init__(self) -> None:
        self.calls: list[Sequence[OrderCall]] = []
        self.go = asyncio.Semaphore(0)
        self.fail = False
        self.word: Transition | None = None

    def node_of(self, item_id: str) -> str:  # noqa: ARG002 - there is one node
        return ""

    async def change(
        self,
        verb: Verb,  # noqa: ARG002 - both answer alike
        item_id: str,  # noqa: ARG002 - every item has a sale
        calls: Sequence[OrderCall],
        **_: object,
    ) -> TransitionReply | Transition:
        self.calls.append(calls)
        await self.go.acquire()
        if self.fail:
            raise RedisUnavailable("cut", maybe_executed=True)
        if self.word is not None:
            return self.word
        answer = TransitionAnswer(Transition.CHANGED, "1-1", RECORD)
        return TransitionReply(1, SNAPSHOT, [answer] * len(calls))


class HeldPublisher(RecordingPublisher):
    """A publisher whose events are acknowledged by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited: list[asyncio.Future[None]] = []

    def acknowledgement(self, entry: OutboxEntry) -> "asyncio.Future[None]":
        assert self.added[-1] is entry
        self.awaited.append(asyncio.get_running_loop().create_future())
        return self.awaited[-1]


def transitions(
    inventory: HeldInventory,
    publisher: HeldPublisher,
    *,
    seen: bool = False,
    claimed: bool = True,
    refusal: Callable[[str], Outcome | Failure | None] = lambda _: None,
) -> Transitions:
    engine = Engine("flashsale")
    engine.items.looked(["x"] if seen else [], claimed=claimed)
    return Transitions(inventory, publisher, Metrics(), engine, "confirm", refusal=refusal)


def change(own: Transitions, call: OrderCall) -> "asyncio.Future[tuple[Decision, bool]]":
    """Make a call for the item x. The future has the decision, and whether it is durable."""
    answer: asyncio.Future[tuple[Decision, bool]] = asyncio.get_running_loop().create_future()
    own.change("x", call, lambda decision, durable: answer.set_result((decision, durable)))
    return answer


async def turns(number: int = 5) -> None:
    """Let the event loop run for a few turns."""
    for _ in range(number):
        await asyncio.sleep(0)


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the pod be suspended for `seconds`."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + seconds)


@pytest.mark.parametrize(
    ("suspended", "durable"), [(0.0, True), (ACKNOWLEDGED_SECONDS + 0.1, False)]
)
async def test_an_acknowledgement_counts_only_if_it_is_seen_in_time(
    monkeypatch: pytest.MonkeyPatch, suspended: float, durable: bool
) -> None:
    inventory, publisher = HeldInventory(), HeldPublisher()
    inventory.go.release()
    own = transitions(inventory, publisher)
    call = change(own, OrderCall("id-1", "o", TRACEPARENT))
    await turns()
    assert publisher.added[0].traceparent == TRACEPARENT
    assert own._unacknowledged._value.get() == 1
    later(monkeypatch, suspended)
    # The acknowledgement is there when the pod goes on, before the pod's timers run.
    publisher.awaited[0].set_result(None)
    decision, found = await call
    assert (decision.record, found) == (RECORD, durable)
    assert own._unacknowledged._value.get() == 0


async def test_the_time_counts_from_the_last_script_call(monkeypatch: pytest.MonkeyPatch) -> None:
    inventory, publisher = HeldInventory(), HeldPublisher()
    call = change(transitions(inventory, publisher), OrderCall("id-1", "o"))
    await turns()
    later(monkeypatch, CALL_DEADLINE_SECONDS / 2)
    inventory.go.release()
    await turns()
    later(monkeypatch, ACKNOWLEDGED_SECONDS - CALL_DEADLINE_SECONDS / 4)
    publisher.awaited[0].set_result(None)
    assert not (await call)[1]


async def test_a_call_without_an_acknowledgement_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    inventory, publisher = HeldInventory(), HeldPublisher()
    inventory.go.release()
    call = change(transitions(inventory, publisher), OrderCall("id-1", "o"))
    await turns()
    later(monkeypatch, ACKNOWLEDGED_SECONDS)
    decision, durable = await call
    assert (decision.record, durable) == (RECORD, False)
    assert publisher.awaited[0].cancelled()


async def test_a_reply_from_before_a_suspension_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inventory, publisher = HeldInventory(), HeldPublisher()
    call = change(transitions(inventory, publisher), OrderCall("id-1", "o"))
    await turns()
    later(monkeypatch, 2 * CALL_DEADLINE_SECONDS)
    inventory.go.release()
    await turns()
    inventory.fail = True
    inventory.go.release()
    decision, durable = await call
    assert (decision.outcome, durable) == (Failure.OUTCOME_UNKNOWN, False)
    assert publisher.added == []


@pytest.mark.parametrize(
    ("refusal", "outcome"),
    [
        (Failure.REDIS_UNAVAILABLE, Failure.REDIS_UNAVAILABLE),
        (Outcome.FENCED, Transition.FENCED),
    ],
)
async def test_a_call_that_redis_may_no_longer_get_when_it_has_its_turn_is_refused(
    refusal: Outcome | Failure, outcome: Transition | Failure
) -> None:
    refusals: list[Outcome | Failure] = []
    inventory = HeldInventory()
    own = transitions(
        inventory, HeldPublisher(), refusal=lambda _: refusals[0] if refusals else None
    )
    call = change(own, OrderCall("id-1", "o"))
    refusals.append(refusal)
    assert (await call)[0].outcome is outcome
    assert inventory.calls == []


async def test_calls_that_arrive_during_calls_form_the_next_call() -> None:
    inventory, publisher = HeldInventory(), HeldPublisher()
    own = transitions(inventory, publisher)
    calls = [change(own, OrderCall("id-0"))]
    await turns()
    calls += [change(own, OrderCall(f"id-{n}")) for n in range(1, 201)]
    await turns()
    for _ in range(3):
        inventory.go.release()
    await turns(20)
    assert [len(call) for call in inventory.calls] == [1, 128, 72]
    assert [each.reservation_id for each in publisher.added] == [f"id-{n}" for n in range(201)]
    assert own.called_items() == ["x"]
    for awaited in publisher.awaited:
        awaited.set_result(None)
    assert all(durable for _, durable in await asyncio.gather(*calls))


@pytest.mark.parametrize(
    ("seen", "claimed", "outcome"),
    [
        (False, True, Transition.UNKNOWN),
        (True, True, Transition.FENCED),
        (False, False, Transition.FENCED),
    ],
)
async def test_an_item_whose_keys_may_be_lost_is_not_unknown(
    seen: bool, claimed: bool, outcome: Transition
) -> None:
    """Redis without the engine's id has lost it, or is new."""
    inventory = HeldInventory()
    inventory.word = Transition.UNKNOWN
    inventory.go.release()
    own = transitions(inventory, HeldPublisher(), seen=seen, claimed=claimed)
    assert (await change(own, OrderCall("id-1", "o")))[0].outcome is outcome
