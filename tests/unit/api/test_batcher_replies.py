"""How the replies to calls decide requests, also after a failure. Redis is a fake."""

import asyncio
from collections.abc import Sequence

import pytest

from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.reservations import Answer, BatchReply, OutboxEntry, Outcome, Request, Transition
from flashsale_api import batcher as batcher_module
from flashsale_api.batcher import Batcher
from flashsale_api.calls import Failure
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from tests.support.batcher import (
    NEVER_SECONDS,
    HeldInventory,
    RecordingPublisher,
    a_request,
    decide,
    turns,
)
from tests.support.eventually import until

pytestmark = pytest.mark.usefixtures("no_request_expires")


class DamagedInventory(HeldInventory):
    """The second request of each call gets `answer`."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def _reply(self, requests: Sequence[Request]) -> BatchReply:
        reply = super()._reply(requests)
        answers = [*reply.answers]
        answers[1] = self.answer
        return reply._replace(answers=answers)


class FailingPublisher(RecordingPublisher):
    """Fails for the reservations of an item."""

    def __init__(self, item_id: str) -> None:
        super().__init__()
        self._item_id = item_id

    def add(self, entry: OutboxEntry) -> None:
        if entry.item_id == self._item_id:
            raise ValueError(self._item_id)
        super().add(entry)


async def test_a_failed_call_is_repeated_once_with_the_same_ids() -> None:
    inventory = HeldInventory()
    inventory.fail = True
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    for _ in range(10):
        inventory.go.release()
    decision = await decide(batcher, "x", a_request())
    assert (decision.outcome, decision.reservation_id) == (Failure.OUTCOME_UNKNOWN, "id-0")
    assert len(inventory.calls) == 2
    assert inventory.calls[0] == inventory.calls[1]


async def of_a_repeated_call(
    batcher: Batcher, inventory: HeldInventory
) -> Outcome | Failure | Transition:
    """Lose the reply to a call, answer its repetition, and return the outcome."""
    inventory.fail = True
    deciding = decide(batcher, "x", a_request())
    await turns()
    inventory.go.release()
    await turns()
    inventory.fail = False
    inventory.go.release()
    return (await deciding).outcome


async def test_a_refusal_of_the_repetition_does_not_say_that_nothing_was_taken() -> None:
    inventory = HeldInventory()
    inventory.errors = {"x": RedisUnavailable("refused")}
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    assert await of_a_repeated_call(batcher, inventory) is Failure.OUTCOME_UNKNOWN


REFUSALS = set(Outcome) - {
    *(Outcome.ACCEPTED, Outcome.REPLAYED, Outcome.KEY_REUSED, Outcome.UNREADABLE),
    *(Outcome.UNKNOWN, Outcome.UNSUPPORTED, Outcome.FENCED, Outcome.OTHER_ENGINE),
}


@pytest.mark.parametrize("refusal", sorted(REFUSALS))
async def test_a_refused_request_of_a_repeated_call_has_no_final_answer(refusal: Outcome) -> None:
    """The first call can still be on its way, and accept it once the sale has a unit again."""
    inventory = HeldInventory()
    inventory.outcome = refusal
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    assert await of_a_repeated_call(batcher, inventory) is Failure.OUTCOME_UNKNOWN
    inventory.go.release()
    assert (await decide(batcher, "x", a_request())).outcome is refusal


@pytest.mark.parametrize(
    "answer", [Answer(Outcome.REPLAYED, "damaged"), Answer(Outcome.UNREADABLE)]
)
async def test_damaged_data_fails_only_its_own_request(answer: Answer) -> None:
    inventory, publisher = DamagedInventory(answer), RecordingPublisher()
    batcher = Batcher(inventory, publisher, Metrics(), Engine("flashsale"))
    inventory.go.release()
    decisions = await asyncio.gather(*(decide(batcher, "x", a_request(n)) for n in range(3)))
    assert [decision.outcome for decision in decisions] == [
        Outcome.ACCEPTED,
        Failure.INTERNAL_ERROR,
        Outcome.ACCEPTED,
    ]
    assert [each.reservation_id for each in publisher.added] == ["id-0", "id-2"]


async def outcomes_of_three_items(
    inventory: HeldInventory, publisher: RecordingPublisher
) -> list[Outcome | Failure | Transition]:
    """Decide a request for each of x0, x1 and x2 in one call."""
    inventory.items_per_call = 4
    batcher = Batcher(inventory, publisher, Metrics(), Engine("flashsale"))
    waiting = [decide(batcher, f"x{n}", a_request(n)) for n in range(3)]
    inventory.go.release()
    return [decision.outcome for decision in await asyncio.gather(*waiting)]


async def test_an_item_that_redis_refuses_leaves_its_call_to_the_others() -> None:
    inventory, publisher = HeldInventory(), RecordingPublisher()
    inventory.errors = {"x1": RedisUnavailable("refused")}
    outcomes = await outcomes_of_three_items(inventory, publisher)
    assert outcomes == [Outcome.ACCEPTED, Failure.REDIS_UNAVAILABLE, Outcome.ACCEPTED]
    assert [accepted.item_id for accepted in publisher.added] == ["x0", "x2"]
    assert len(inventory.calls) == 1


async def test_an_item_whose_reply_cannot_be_read_leaves_its_call_to_the_others() -> None:
    inventory, publisher = HeldInventory(), RecordingPublisher()
    inventory.errors = {"x1": ContractViolation("damaged")}
    outcomes = await outcomes_of_three_items(inventory, publisher)
    assert outcomes == [Outcome.ACCEPTED, Failure.INTERNAL_ERROR, Outcome.ACCEPTED]
    assert [accepted.item_id for accepted in publisher.added] == ["x0", "x2"]


async def test_an_item_that_cannot_be_decided_leaves_its_call_to_the_others() -> None:
    """The script has decided the other items already."""
    outcomes = await outcomes_of_three_items(HeldInventory(), FailingPublisher("x1"))
    assert outcomes == [Outcome.ACCEPTED, Failure.INTERNAL_ERROR, Outcome.ACCEPTED]


async def test_a_pod_without_a_heartbeat_remembers_no_made_up_names() -> None:
    engine = Engine("flashsale")
    batcher = Batcher(
        HeldInventory(),
        RecordingPublisher(),
        Metrics(),
        engine,
        refusal=lambda _: Outcome.FENCED,
    )
    for name in map("made-up-{}".format, range(100)):
        assert (await decide(batcher, name, a_request())).outcome is Outcome.FENCED
        assert name not in engine.items
    assert batcher.called_items() == []


async def test_a_pod_that_holds_too_many_events_refuses_without_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batcher_module, "MOST_HELD", 0)
    inventory = HeldInventory()
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    assert (await decide(batcher, "x", a_request())).outcome is Outcome.OUTBOX_FULL
    assert inventory.calls == []


async def test_a_reply_from_before_a_suspension_is_ignored() -> None:
    inventory, publisher = HeldInventory(), RecordingPublisher()
    batcher = Batcher(inventory, publisher, Metrics(), Engine("flashsale"))
    deciding = decide(batcher, "x", a_request())
    await turns()
    loop = asyncio.get_running_loop()
    clock, suspended = loop.time, 2 * NEVER_SECONDS
    loop.time = lambda: clock() + suspended  # type: ignore[method-assign]
    inventory.go.release()
    await turns()
    inventory.fail = True
    inventory.go.release()
    decision = await deciding
    assert decision.outcome is Failure.OUTCOME_UNKNOWN
    assert publisher.added == []


async def test_sold_out_is_cached_briefly_and_per_item() -> None:
    inventory = HeldInventory()
    inventory.outcome, inventory.available = Outcome.SOLD_OUT, 0
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    inventory.go.release()
    assert not batcher.sold_out("x")
    await decide(batcher, "x", a_request())
    assert batcher.sold_out("x")
    assert not batcher.sold_out("y")
    await until(lambda: not batcher.sold_out("x"))


async def test_not_enough_left_is_not_cached_as_sold_out() -> None:
    inventory = HeldInventory()
    inventory.outcome, inventory.available = Outcome.NOT_ENOUGH_LEFT, 1
    batcher = Batcher(inventory, RecordingPublisher(), Metrics(), Engine("flashsale"))
    inventory.go.release()
    await decide(batcher, "x", a_request())
    assert not batcher.sold_out("x")


async def test_a_buyer_who_disconnects_does_not_cancel_the_batch() -> None:
    inventory, publisher = HeldInventory(), RecordingPublisher()
    batcher = Batcher(inventory, publisher, Metrics(), Engine("flashsale"))
    disconnected = decide(batcher, "x", a_request(1))
    connected = decide(batcher, "x", a_request(2))
    await turns()
    disconnected.cancel()
    await turns()
    inventory.go.release()
    assert (await connected).outcome is Outcome.ACCEPTED
    assert len(publisher.added) == 2


async def test_a_pod_whose_heartbeat_has_expired_does_not_repeat_a_call() -> None:
    """A standstill can end both. A rebuild does not wait for the events of such a pod."""
    inventory = HeldInventory()
    inventory.fail = True
    batcher = Batcher(
        inventory,
        RecordingPublisher(),
        Metrics(),
        Engine("flashsale"),
        refusal=lambda _: Outcome.FENCED if inventory.answered else None,
    )
    for _ in range(2):
        inventory.go.release()
    decision = await decide(batcher, "x", a_request())
    assert decision.outcome is Failure.OUTCOME_UNKNOWN
    assert len(inventory.calls) == 1
