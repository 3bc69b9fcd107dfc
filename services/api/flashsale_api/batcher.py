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
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeAlias

from flashsale.errors import RedisUnavailable
from flashsale.heartbeat import CALL_DEADLINE_SECONDS
from flashsale.inventory import Inventory
from flashsale.reservations import BATCH_LIMIT, BatchReply, Outcome, Record, Request, Snapshot
from flashsale_api.metrics import Metrics

if TYPE_CHECKING:
    from flashsale_api.spans import Traces

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


class Accepted(NamedTuple):
    """A reservation that Redis has accepted, and its outbox entry; none for a replay, whose entry
    may be gone.
    """

    item_id: str
    entry_id: str
    reservation_id: str
    record: Record
    snapshot: Snapshot
    traceparent: str


class Publishes(Protocol):
    """Where accepted reservations go; never waits."""

    def add(self, accepted: Accepted) -> None: ...


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


class Batching:
    """Decides requests through batched script calls; one a process."""

    def __init__(
        self,
        inventory: Inventory,
        publisher: Publishes,
        metrics: Metrics,
        *,
        traces: "Traces | None" = None,
    ) -> None:
        self._traces = traces
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

    async def _decisions(self, item_id: str, requests: Sequence[Request]) -> list[Decision]:
        reply = await self._reserve(item_id, requests)
        if isinstance(reply, BatchReply):
            return self._delivered(item_id, requests, reply)
        self._sold_out_until.pop(item_id, None)
        if reply is Outcome.FENCED:
            self._remember(item_id)
        elif reply is Outcome.UNKNOWN and self._remembers(item_id):
            reply = Outcome.FENCED
        return [Decision(reply, request.reservation_id) for request in requests]

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
            if self._traces is not None and self._traces.open:
                self._traces.called(requests, seconds)
            if seconds < CALL_DEADLINE_SECONDS:
                return reply
            maybe_executed = True
        return Failure.OUTCOME_UNKNOWN if maybe_executed else Failure.REDIS_UNAVAILABLE

    def _remember(self, item_id: str) -> None:
        self._known_until[item_id] = asyncio.get_running_loop().time() + KNOWN_SECONDS

    def _remembers(self, item_id: str) -> bool:
        if self._known_until.get(item_id, 0.0) > asyncio.get_running_loop().time():
            return True
        self._known_until.pop(item_id, None)
        return False

    def _delivered(
        self, item_id: str, requests: Sequence[Request], reply: BatchReply
    ) -> list[Decision]:
        """The decisions; what was accepted is with the publisher before anybody is answered."""
        sale_id, now_ms = reply.snapshot.sale_id, reply.now_ms
        self._metrics.know(item_id)
        decisions = []
        sold_out = over = False
        for request, (outcome, detail) in zip(requests, reply.answers, strict=True):
            record = None
            if outcome is Outcome.ACCEPTED:
                entry_id = detail
                record = Record(
                    "accepted", 1, request.quantity, now_ms, request.user_id, request.request_key
                )
            elif outcome is Outcome.REPLAYED:
                # Whoever answers 202 holds the event: the call that was executed may have been
                # answered to nobody, and Redis may lose it before the sweep comes.
                entry_id, record = "", Record.parse(detail)
            if record is not None:
                self._publisher.add(
                    Accepted(
                        item_id,
                        entry_id,
                        request.reservation_id,
                        record,
                        reply.snapshot,
                        request.traceparent,
                    )
                )
                decision = Decision(outcome, request.reservation_id, sale_id, record)
            else:
                sold_out = sold_out or outcome is Outcome.SOLD_OUT
                over = over or outcome is Outcome.ENDED
                decision = Decision(
                    outcome, request.reservation_id, sale_id, None, reply.starts_ms, now_ms
                )
            decisions.append(decision)
        if sold_out and reply.available == 0:
            now = asyncio.get_running_loop().time()
            self._sold_out_until[item_id] = now + SOLD_OUT_SECONDS
        else:
            self._sold_out_until.pop(item_id, None)
        if over:
            self._known_until.pop(item_id, None)
        else:
            self._remember(item_id)
        self._metrics.outbox_length.labels(item_id).set(reply.outbox_length)
        return decisions
