"""Requests that arrive while a script call is in flight form the next call.

No timer and no added delay: a lone request goes at once, and under load the batches grow by
themselves, up to `BATCH_LIMIT` requests a call, `CALLS_IN_FLIGHT` calls an item and `MAX_CALLS`
in all.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from flashsale.errors import RedisUnavailable
from flashsale.heartbeat import CALL_DEADLINE_SECONDS
from flashsale.inventory import Inventory
from flashsale.reservations import BATCH_LIMIT, BatchReply, Outcome, Record, Request
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Accepted, Publisher

if TYPE_CHECKING:
    from flashsale_api.spans import Spans

log = logging.getLogger(__name__)

CALLS_IN_FLIGHT: Final = 3
MAX_CALLS: Final = 64
"""Calls in flight of all items together, however many items are asked for."""
MAX_WAITING: Final = 4096
MAX_WAIT_SECONDS: Final = 0.5
SOLD_OUT_SECONDS: Final = 0.1
"""How long a pod answers "sold out" without asking: what a restock may be late by."""
KNOWN_SECONDS: Final = 60.0
"""How long a pod remembers that an item had a sale that was not over. If Redis knows nothing of it
then, its keys are lost: the sale is about to be fenced, and is not unknown."""


class Failure(StrEnum):
    """Why a request was not decided."""

    TOO_MANY_WAITING = "too_many_waiting"
    REDIS_UNAVAILABLE = "redis_unavailable"
    OUTCOME_UNKNOWN = "outcome_unknown"
    INTERNAL_ERROR = "internal_error"


class Decision(NamedTuple):
    """What became of a request; a record where a reservation exists."""

    outcome: Outcome | Failure
    reservation_id: str = ""
    sale_id: str = ""
    record: Record | None = None
    starts_ms: int = 0
    now_ms: int = 0


Decided: TypeAlias = Callable[[Decision], None]


class _Waiting(NamedTuple):
    request: Request
    decided: Decided
    since: float


@dataclass(slots=True)
class _Lane:
    item_id: str
    waiting: deque[_Waiting] = field(default_factory=deque)
    calls: int = 0
    starting: bool = False


class Batcher:
    """Decides requests through batched script calls; one a process."""

    def __init__(
        self,
        inventory: Inventory,
        publisher: Publisher,
        metrics: Metrics,
        *,
        spans: "Spans | None" = None,
    ) -> None:
        self._spans = spans
        self._inventory = inventory
        self._publisher = publisher
        self._metrics = metrics
        self._lanes: dict[str, _Lane] = {}
        self._waiting = 0
        self._calls: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._held_back: deque[_Lane] = deque()
        self._closed = False
        self._expiry: asyncio.TimerHandle | None = None
        self._sold_out_until: dict[str, float] = {}
        self._known_until: dict[str, float] = {}

    def sold_out(self, item_id: str) -> bool:
        """Whether this pod has just seen the item's sale sold out."""
        until = self._sold_out_until.get(item_id)
        return until is not None and asyncio.get_running_loop().time() < until

    def decide(self, item_id: str, request: Request, decided: Decided) -> None:
        """Calls `decided`, which may not fail, once, now or later.

        The request waits `MAX_WAIT_SECONDS` for its turn at most, then for the call and, should it
        fail, one more: `CALL_DEADLINE_SECONDS` together. Nothing cancels it, whether the buyer is
        still there or not: it is part of a batch.
        """
        if self._closed or self._waiting >= MAX_WAITING:
            decided(Decision(Failure.TOO_MANY_WAITING))
            return
        loop = asyncio.get_running_loop()
        lane = self._lanes.get(item_id)
        if lane is None:
            lane = self._lanes[item_id] = _Lane(item_id)
        lane.waiting.append(_Waiting(request, decided, loop.time()))
        self._waiting += 1
        if lane.calls < CALLS_IN_FLIGHT and not lane.starting:
            # After what is ready now: requests read in the same turn of the loop go together.
            lane.starting = True
            loop.call_soon(self._start, lane)
        if self._expiry is None:
            self._expiry = loop.call_later(MAX_WAIT_SECONDS, self._expire)

    async def close(self) -> None:
        """Decides all that waits; whoever comes now is refused."""
        self._closed = True
        while self._lanes:
            await asyncio.sleep(0)  # what came in this turn has no call yet
            await asyncio.gather(*self._calls, return_exceptions=True)

    def _start(self, lane: _Lane) -> None:
        lane.starting = False
        while lane.waiting and lane.calls < CALLS_IN_FLIGHT:
            if self._in_flight >= MAX_CALLS:
                lane.starting = True
                self._held_back.append(lane)
                break
            size = min(len(lane.waiting), BATCH_LIMIT)
            batch = [lane.waiting.popleft() for _ in range(size)]
            self._waiting -= size
            self._in_flight += 1
            lane.calls += 1
            call = asyncio.get_running_loop().create_task(self._call(lane, batch))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        self._metrics.waiting.set(self._waiting)
        if not lane.waiting and not lane.calls:
            self._lanes.pop(lane.item_id, None)

    def _ended(self, lane: _Lane) -> None:
        """A call has: those go on that were held back, and then its own item."""
        self._in_flight -= 1
        lane.calls -= 1
        while self._held_back and self._in_flight < MAX_CALLS:
            self._start(self._held_back.popleft())
        if not lane.starting:
            self._start(lane)

    def _expire(self) -> None:
        """Answers those that have waited too long; they were never sent."""
        loop = asyncio.get_running_loop()
        oldest_allowed = loop.time() - MAX_WAIT_SECONDS
        next_since = None
        for lane in self._lanes.values():
            while lane.waiting and lane.waiting[0].since <= oldest_allowed:
                lane.waiting.popleft().decided(Decision(Failure.TOO_MANY_WAITING))
                self._waiting -= 1
            if lane.waiting:
                since = lane.waiting[0].since
                next_since = since if next_since is None else min(since, next_since)
        self._metrics.waiting.set(self._waiting)
        self._expiry = (
            None
            if next_since is None
            else loop.call_at(next_since + MAX_WAIT_SECONDS, self._expire)
        )

    async def _call(self, lane: _Lane, batch: Sequence[_Waiting]) -> None:
        self._metrics.batch_size.observe(len(batch))
        try:
            decisions = await self._decisions(lane.item_id, [waiting.request for waiting in batch])
        except Exception:  # whatever it was: nobody may be left waiting
            log.exception("a batch for %s failed", lane.item_id)
            decisions = [Decision(Failure.INTERNAL_ERROR)] * len(batch)
        finally:
            self._ended(lane)
        for waiting, decision in zip(batch, decisions, strict=True):
            waiting.decided(decision)

    async def _decisions(self, item_id: str, requests: Sequence[Request]) -> Sequence[Decision]:
        reply = await self._reserve(item_id, requests)
        if not isinstance(reply, BatchReply):
            outcome = self._of_a_whole_batch(item_id, reply)
            return [Decision(outcome, request.reservation_id) for request in requests]
        self._metrics.know(item_id)
        self._metrics.outbox_length.labels(item_id).set(reply.outbox_length)
        decisions, accepted = _read(item_id, requests, reply)
        # Before any buyer is answered: a pod that answers 202 holds the event.
        for each in accepted:
            self._publisher.add(each)
        self._remember(item_id, reply)
        return decisions

    async def _reserve(
        self, item_id: str, requests: Sequence[Request]
    ) -> BatchReply | Outcome | Failure:
        """Calls the script, and once more if that failed: the ids make it a replay.

        An answer that comes after the deadline is not believed. A pod that was suspended may find
        one in its socket from before a Redis failure, and the sale rebuilt without it since.
        """
        loop = asyncio.get_running_loop()
        maybe_executed = False
        for _ in range(2):
            started = loop.time()
            try:
                reply = await self._inventory.reserve(
                    item_id, requests, timeout_seconds=CALL_DEADLINE_SECONDS / 2
                )
            except RedisUnavailable as error:
                self._metrics.script_failures.inc()
                maybe_executed = maybe_executed or error.maybe_executed
                log.debug("a call for %s failed: %s", item_id, error)
                continue
            seconds = loop.time() - started
            self._metrics.script_seconds.observe(seconds)
            if self._spans is not None and self._spans.open:
                self._spans.called(requests, seconds)
            if seconds < CALL_DEADLINE_SECONDS:
                return reply
            maybe_executed = True
        return Failure.OUTCOME_UNKNOWN if maybe_executed else Failure.REDIS_UNAVAILABLE

    def _of_a_whole_batch(self, item_id: str, outcome: Outcome | Failure) -> Outcome | Failure:
        """Remembers a fenced sale, and takes the lost keys of a remembered sale for its fence."""
        self._sold_out_until.pop(item_id, None)
        now = asyncio.get_running_loop().time()
        if outcome is Outcome.FENCED:
            self._known_until[item_id] = now + KNOWN_SECONDS
        elif outcome is Outcome.UNKNOWN:
            if now < self._known_until.get(item_id, 0.0):
                return Outcome.FENCED
            self._known_until.pop(item_id, None)
        return outcome

    def _remember(self, item_id: str, reply: BatchReply) -> None:
        """Remembers for a while that the sale exists, and for a moment that it is sold out."""
        now = asyncio.get_running_loop().time()
        outcomes = {answer.outcome for answer in reply.answers}
        if reply.available == 0 and Outcome.SOLD_OUT in outcomes:
            self._sold_out_until[item_id] = now + SOLD_OUT_SECONDS
        else:
            self._sold_out_until.pop(item_id, None)
        if Outcome.ENDED in outcomes:
            self._known_until.pop(item_id, None)
        else:
            self._known_until[item_id] = now + KNOWN_SECONDS


def _read(
    item_id: str, requests: Sequence[Request], reply: BatchReply
) -> tuple[list[Decision], list[Accepted]]:
    """Returns the decisions on a batch, and the reservations to publish.

    A replay is published again. The pod that accepted it may be dead, and Redis may lose the
    outbox entry before a sweep.
    """
    snapshot, now_ms = reply.snapshot, reply.now_ms
    sale_id = snapshot.sale_id
    decisions = []
    accepted = []
    for request, (outcome, detail) in zip(requests, reply.answers, strict=True):
        identity, user_id, quantity, request_key, traceparent = request
        if outcome is Outcome.ACCEPTED:
            entry_id = detail
            record = Record("accepted", 1, quantity, now_ms, user_id, request_key)
        elif outcome is Outcome.REPLAYED:
            entry_id, record = "", Record.parse(detail)
        else:
            decisions.append(Decision(outcome, identity, sale_id, None, reply.starts_ms, now_ms))
            continue
        accepted.append(Accepted(item_id, entry_id, identity, record, snapshot, traceparent))
        decisions.append(Decision(outcome, identity, sale_id, record))
    return decisions, accepted
