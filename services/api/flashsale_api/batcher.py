"""Decides POST /reserve through batched script calls."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.heartbeat import CALL_DEADLINE_SECONDS
from flashsale.inventory import Inventory, ItemReply
from flashsale.reservations import (
    BatchReply,
    OutboxEntry,
    Outcome,
    Record,
    Request,
    State,
    Transition,
)
from flashsale_api.calls import Calls, Failure
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher

if TYPE_CHECKING:
    from flashsale_api.spans import Spans

log = logging.getLogger(__name__)

SOLD_OUT_SECONDS: Final = 0.1
"""How long a pod caches "sold out". A restock can take this long to become visible."""
MOST_HELD: Final = 300_000
"""A pod that holds this many events refuses all requests of buyers, repeated ones too.

They take 190 to 320 MB. Otherwise the events of many items could exceed the pod's memory while
Kafka is away. Acknowledged events count, because they take memory until they are settled.
"""
_ENDINGS: Final = {
    State.EXPIRED: Transition.HOLD_EXPIRED,
    State.CANCELLED: Transition.CANCELLED,
}
"""The outcome of a replay whose reservation has ended."""


class Decision(NamedTuple):
    """The decision on a request. `record` is set if the buyer has the reservation.

    `starts_ms` and `now_ms` are Redis' clock in Unix milliseconds. `held` counts the units of open
    holds, or is None if the sale has no holds. A `Transition` says how the reservation has ended.
    `limit` is the detail of `LIMIT_REACHED`. `reason` explains why the user is unknown.
    """

    outcome: Outcome | Failure | Transition
    reservation_id: str = ""
    sale_id: str = ""
    record: Record | None = None
    starts_ms: int = 0
    now_ms: int = 0
    held: int | None = None
    limit: str = ""
    reason: str = ""


_ItemReply: TypeAlias = BatchReply | Outcome | Failure | ContractViolation


class Batcher(Calls[Request, Decision]):
    """Decides the requests of buyers. A process has one."""

    def __init__(  # noqa: PLR0913 - the parts that a decision needs
        self,
        inventory: Inventory,
        publisher: Publisher,
        metrics: Metrics,
        engine: Engine,
        *,
        refusal: Callable[[str], Outcome | Failure | None] = lambda _: None,
        spans: "Spans | None" = None,
    ) -> None:
        super().__init__(metrics, engine, metrics.waiting, inventory.node_of, refusal)
        self._spans = spans
        self._inventory = inventory
        self._publisher = publisher
        self._sold_out: dict[str, tuple[float, Decision]] = {}

    def sold_out(self, item_id: str) -> Decision | None:
        """Returns the decision that the sale is sold out, for `SOLD_OUT_SECONDS` after it."""
        known = self._sold_out.get(item_id)
        if known is None:
            return None
        until, decision = known
        return decision if asyncio.get_running_loop().time() < until else None

    def _undecided(self, failure: Failure) -> Decision:
        return Decision(failure)

    @property
    def items_per_call(self) -> int:  # type: ignore[override] # it depends on the kind of Redis
        return self._inventory.items_per_call

    async def _decisions(
        self, batches: Sequence[tuple[str, Sequence[Request]]]
    ) -> Sequence[Sequence[Decision]]:
        full = Outcome.OUTBOX_FULL if self._publisher.held >= MOST_HELD else None
        refusals = [full or self._refusal(item_id) for item_id, _ in batches]
        asked = [batch for batch, refusal in zip(batches, refusals, strict=True) if not refusal]
        replies, repeated = await self._reserve(asked) if asked else ((), False)
        left = iter(replies)
        return [
            [Decision(refusal)] * len(requests)
            if refusal
            else self._decide_apart(item_id, requests, next(left), repeated=repeated)
            for (item_id, requests), refusal in zip(batches, refusals, strict=True)
        ]

    def _decide_apart(
        self, item_id: str, requests: Sequence[Request], reply: _ItemReply, *, repeated: bool
    ) -> list[Decision]:
        """Decides as `_decide` does. An error fails no other item of the call."""
        try:
            return self._decide(item_id, requests, reply, repeated=repeated)
        except Exception:  # after any error, every request needs an answer
            log.exception("could not decide a batch for %s", item_id)
            return [Decision(Failure.INTERNAL_ERROR)] * len(requests)

    def _decide(
        self, item_id: str, requests: Sequence[Request], reply: _ItemReply, *, repeated: bool
    ) -> list[Decision]:
        """Returns the decisions on an item's requests, and has the accepted ones published.

        If the call was `repeated`, no refusal is final. The first call can still be on its way, and
        accept the request once the sale has a unit again. Only a key that is taken stays taken.
        """
        if isinstance(reply, ContractViolation):
            raise reply
        if not isinstance(reply, BatchReply):
            outcome = self._of_all(item_id, reply)
            return [Decision(outcome, request.reservation_id) for request in requests]
        self._metrics.add_item(item_id)
        decisions, entries = _read(item_id, requests, reply, repeated=repeated)
        # A pod must hold the event before it answers 202.
        for entry in entries:
            self._publisher.add(entry)
        self._learn(item_id, reply)
        return decisions

    async def _reserve(
        self, batches: Sequence[tuple[str, Sequence[Request]]]
    ) -> tuple[Sequence[_ItemReply], bool]:
        """Calls the script, and returns whether the call was repeated.

        The ids make a repetition a replay.
        """
        item_ids = [item_id for item_id, _ in batches]

        async def send() -> Sequence[ItemReply]:
            return await self._inventory.reserve_all(
                batches,
                timeout_seconds=CALL_DEADLINE_SECONDS / 2,
                engine_id=self._engine.id,
            )

        reply = await self._ask(item_ids, send)
        if isinstance(reply, Failure):
            return [reply] * len(batches), False
        if self._spans is not None and self._spans.open:
            seconds = asyncio.get_running_loop().time() - reply.started
            for _, requests in batches:
                self._spans.called(requests, seconds)
        failure = Failure.OUTCOME_UNKNOWN if reply.repeated else Failure.REDIS_UNAVAILABLE
        found: list[_ItemReply] = []
        for each in reply.value:
            doubtful = reply.repeated and isinstance(each, Outcome)
            found.append(failure if doubtful or isinstance(each, RedisUnavailable) else each)
        return found, reply.repeated

    def _of_all(self, item_id: str, outcome: Outcome | Failure) -> Outcome | Failure:
        """Returns the outcome of a batch that was not decided per request.

        An unknown item whose sale Redis may have lost is answered as fenced.
        """
        self._sold_out.pop(item_id, None)
        if outcome is Outcome.FENCED:
            self._remember(item_id)
        elif outcome is Outcome.UNKNOWN and self._engine.may_have_lost(item_id):
            return Outcome.FENCED
        return outcome

    def _learn(self, item_id: str, reply: BatchReply) -> None:
        """Caches that the sale is sold out, and that it exists."""
        outcomes = {answer.outcome for answer in reply.answers}
        if reply.available == 0 and Outcome.SOLD_OUT in outcomes:
            decision = Decision(Outcome.SOLD_OUT, held=_held(reply))
            until = asyncio.get_running_loop().time() + SOLD_OUT_SECONDS
            self._sold_out[item_id] = until, decision
        else:
            self._sold_out.pop(item_id, None)
        self._remember(item_id)


def _read(
    item_id: str, requests: Sequence[Request], reply: BatchReply, *, repeated: bool
) -> tuple[list[Decision], list[OutboxEntry]]:
    """Returns the decisions on a batch, and the events to publish.

    A replay is published again. The pod that accepted it may be dead, and Redis may lose the
    outbox entry before a sweep.
    """
    snapshot, now_ms = reply.snapshot, reply.now_ms
    version, starts_ms = reply.version, reply.starts_ms
    sale_id, held = snapshot.sale_id, _held(reply)
    state = State.HELD if reply.hold_ms else State.CONFIRMED
    expires_ms = now_ms + reply.hold_ms if reply.hold_ms else None
    confirmed_ms = None if reply.hold_ms else now_ms
    decisions = []
    entries = []
    for request, (outcome, detail) in zip(requests, reply.answers, strict=True):
        reservation_id, user_id, quantity, request_key, traceparent = request
        if outcome is Outcome.ACCEPTED:
            entry_id = detail
            record = Record(
                state, version, quantity, now_ms, user_id, request_key, expires_ms, confirmed_ms
            )
        elif outcome is Outcome.REPLAYED:
            entry_id = ""
            try:
                record = Record.parse(detail)
            except ContractViolation:
                log.exception("the reservation %s of %s is damaged", reservation_id, item_id)
                decisions.append(Decision(Failure.INTERNAL_ERROR, reservation_id, sale_id))
                continue
        elif outcome is Outcome.UNREADABLE:
            log.error(
                "%s: the reservation %s or its buyer is damaged in Redis", item_id, reservation_id
            )
            decisions.append(Decision(Failure.INTERNAL_ERROR, reservation_id, sale_id))
            continue
        elif repeated and outcome is not Outcome.KEY_REUSED:
            decisions.append(Decision(Failure.OUTCOME_UNKNOWN, reservation_id, sale_id))
            continue
        else:
            decisions.append(
                Decision(outcome, reservation_id, sale_id, None, starts_ms, now_ms, held, detail)
            )
            continue
        entries.append(
            OutboxEntry(item_id, entry_id, reservation_id, record, snapshot, traceparent)
        )
        ending = _ENDINGS.get(record.state)
        decisions.append(
            Decision(ending, reservation_id, sale_id)
            if ending
            else Decision(outcome, reservation_id, sale_id, record)
        )
    return decisions, entries


def _held(reply: BatchReply) -> int | None:
    return reply.held if reply.hold_ms or reply.held else None
