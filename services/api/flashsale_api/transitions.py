"""Confirms or cancels reservations through batched script calls, and waits for Kafka.

The pod that made a change, or found it made already, publishes the event and waits. A change is
durable only if Kafka has acknowledged that very event soon after the script call. Later, Redis may
have been rebuilt without the change: see `ACKNOWLEDGED_SECONDS`.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

from flashsale.heartbeat import ACKNOWLEDGED_SECONDS, CALL_DEADLINE_SECONDS
from flashsale.inventory import Inventory
from flashsale.reservations import (
    OrderCall,
    OutboxEntry,
    Outcome,
    Record,
    Transition,
    TransitionReply,
    Verb,
)
from flashsale_api.calls import Calls, Failure
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher


class Decision(NamedTuple):
    """The decision on a call. `record` is the reservation after it, unless the call was refused.

    The change is durable if `acknowledgement` is done before `until`, by the loop's clock.
    """

    outcome: Transition | Failure
    sale_id: str = ""
    record: Record | None = None
    acknowledgement: "asyncio.Future[None] | None" = None
    until: float = 0.0


Answered: TypeAlias = Callable[[Decision, bool], None]
"""Takes the decision on a call, and whether it is durable. Must not raise."""


class Transitions(Calls[OrderCall, Decision]):
    """Decides the calls of one verb. A process has one for each verb."""

    def __init__(  # noqa: PLR0913 - the parts that a decision needs
        self,
        inventory: Inventory,
        publisher: Publisher,
        metrics: Metrics,
        engine: Engine,
        verb: Verb,
        *,
        refusal: Callable[[str], Outcome | Failure | None] = lambda _: None,
    ) -> None:
        waiting = metrics.waiting_order_calls.labels(verb)
        super().__init__(metrics, engine, waiting, inventory.node_of, refusal)
        self._script = partial(inventory.change, verb)
        self._publisher = publisher
        self._unacknowledged = metrics.unacknowledged_order_calls.labels(verb)

    def change(self, item_id: str, call: OrderCall, answered: Answered) -> None:
        """Calls `answered` exactly once, immediately or later.

        Waits for the script and then for Kafka, but for Kafka at most `ACKNOWLEDGED_SECONDS` after
        the script call began.
        """
        self.decide(item_id, call, partial(self._decided, answered))

    def _decided(self, answered: Answered, decision: Decision) -> None:
        acknowledgement = decision.acknowledgement
        if acknowledgement is None:
            answered(decision, False)
            return
        self._unacknowledged.inc()
        timer = asyncio.get_running_loop().call_at(decision.until, acknowledgement.cancel)
        acknowledgement.add_done_callback(partial(self._acknowledged, answered, decision, timer))

    def _acknowledged(
        self,
        answered: Answered,
        decision: Decision,
        timer: asyncio.TimerHandle,
        acknowledgement: "asyncio.Future[None]",
    ) -> None:
        timer.cancel()
        self._unacknowledged.dec()
        # The clock is read after the acknowledgement: the pod may have been suspended meanwhile.
        in_time = asyncio.get_running_loop().time() < decision.until
        answered(decision, in_time and not acknowledgement.cancelled())

    def _undecided(self, failure: Failure) -> Decision:
        return Decision(failure)

    async def _decisions(
        self, batches: Sequence[tuple[str, Sequence[OrderCall]]]
    ) -> Sequence[Sequence[Decision]]:
        return [await self._decide(item_id, calls) for item_id, calls in batches]

    async def _decide(self, item_id: str, calls: Sequence[OrderCall]) -> Sequence[Decision]:
        # A primary that was frozen, replaced and thawed takes no heartbeat, and gives outdated
        # answers.
        if refusal := self._refusal(item_id):
            failed = refusal if isinstance(refusal, Failure) else Transition.FENCED
            return [Decision(failed)] * len(calls)

        async def send() -> Sequence[TransitionReply | Transition]:
            deadline = CALL_DEADLINE_SECONDS / 2
            engine_id = self._engine.id
            return [
                await self._script(item_id, calls, timeout_seconds=deadline, engine_id=engine_id)
            ]

        reply = await self._ask([item_id], send)
        if isinstance(reply, Failure):
            return [Decision(reply)] * len(calls)
        [value], until = reply.value, reply.started + ACKNOWLEDGED_SECONDS
        if not isinstance(value, TransitionReply):
            if value is Transition.FENCED:
                self._remember(item_id)
            elif value is Transition.UNKNOWN and self._engine.may_have_lost(item_id):
                value = Transition.FENCED  # Redis has lost the sale, and the ledger has it
            return [Decision(value)] * len(calls)
        self._remember(item_id)
        decisions = []
        for call, (outcome, entry_id, record) in zip(calls, value.answers, strict=True):
            if record is None:
                decisions.append(Decision(outcome))
                continue
            entry = OutboxEntry(
                item_id, entry_id, call.reservation_id, record, value.snapshot, call.traceparent
            )
            self._publisher.add(entry)
            acknowledgement = self._publisher.acknowledgement(entry)
            decisions.append(
                Decision(outcome, value.snapshot.sale_id, record, acknowledgement, until)
            )
        return decisions
