"""Requests that arrive while a script call is in flight form the next call.

There is no timer and no added delay. A lone request is sent at once, and batches grow with the
load. A call has at most `BATCH_LIMIT` requests. At most `CALLS_IN_FLIGHT` calls per item and
`MAX_CALLS` calls in all are in flight.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from flashsale.errors import RedisUnavailable
from flashsale.heartbeat import CALL_DEADLINE_SECONDS, EXPIRY_SECONDS
from flashsale.inventory import Inventory
from flashsale.reservations import BATCH_LIMIT, BatchReply, Outcome, Record, Request
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Accepted, Publisher

if TYPE_CHECKING:
    from flashsale_api.spans import Spans

log = logging.getLogger(__name__)

CALLS_IN_FLIGHT: Final = 3
MAX_CALLS: Final = 64
"""Calls in flight of all items together, however many items the requests name."""
MAX_WAITING: Final = 4096
"""Requests of all items that wait for a call. Further requests are refused."""
MAX_WAIT_SECONDS: Final = 0.5
"""How long a request waits for a call before it is refused."""
SOLD_OUT_SECONDS: Final = 0.1
"""How long a pod caches "sold out". A restock can take this long to become visible."""
KNOWN_SECONDS: Final = 60.0
"""How long a pod remembers that an item had an unfinished sale.

If Redis has no keys of such an item, it has lost them. The sale is then answered as fenced, not as
unknown.
"""


class Failure(StrEnum):
    """Why a request has no decision from Redis."""

    TOO_MANY_WAITING = "too_many_waiting"
    REDIS_UNAVAILABLE = "redis_unavailable"
    OUTCOME_UNKNOWN = "outcome_unknown"
    INTERNAL_ERROR = "internal_error"


class Decision(NamedTuple):
    """The decision on a request. `record` is set if the request has a reservation.

    `starts_ms` and `now_ms` are Redis' clock in Unix milliseconds.
    """

    outcome: Outcome | Failure
    reservation_id: str = ""
    sale_id: str = ""
    record: Record | None = None
    starts_ms: int = 0
    now_ms: int = 0


Decided: TypeAlias = Callable[[Decision], None]
"""Takes the decision on a request. Must not raise."""


class _Waiting(NamedTuple):
    request: Request
    decided: Decided
    since: float


@dataclass(slots=True)
class _Queue:
    """The waiting requests of an item, and the number of its calls in flight."""

    item_id: str
    waiting: deque[_Waiting] = field(default_factory=deque)
    calls: int = 0
    starting: bool = False


class Batcher:
    """Decides requests through batched script calls. A process has one."""

    def __init__(
        self,
        inventory: Inventory,
        publisher: Publisher,
        metrics: Metrics,
        engine: Engine,
        *,
        spans: "Spans | None" = None,
    ) -> None:
        self._spans = spans
        self._inventory = inventory
        self._publisher = publisher
        self._metrics = metrics
        self._engine = engine
        self._called: dict[str, float] = {}
        self._queues: dict[str, _Queue] = {}
        self._waiting = 0
        self._calls: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._held_back: deque[_Queue] = deque()
        self._closed = False
        self._expiry: asyncio.TimerHandle | None = None
        self._sold_out_until: dict[str, float] = {}
        self._known_until: dict[str, float] = {}

    def sold_out(self, item_id: str) -> bool:
        """Whether this pod saw the item's sale sold out within the last `SOLD_OUT_SECONDS`."""
        until = self._sold_out_until.get(item_id)
        return until is not None and asyncio.get_running_loop().time() < until

    def decide(self, item_id: str, request: Request, decided: Decided) -> None:
        """Calls `decided` exactly once, immediately or later.

        The request waits at most `MAX_WAIT_SECONDS` for a call. The call and its one repetition
        take at most `CALL_DEADLINE_SECONDS` together. The request is not cancelled if the buyer
        disconnects, because it is part of a batch.
        """
        if self._closed or self._waiting >= MAX_WAITING:
            decided(Decision(Failure.TOO_MANY_WAITING))
            return
        if self._engine.conflict:
            decided(Decision(Outcome.OTHER_ENGINE))
            return
        loop = asyncio.get_running_loop()
        queue = self._queues.get(item_id)
        if queue is None:
            queue = self._queues[item_id] = _Queue(item_id)
        queue.waiting.append(_Waiting(request, decided, loop.time()))
        self._waiting += 1
        if queue.calls < CALLS_IN_FLIGHT and not queue.starting:
            # Start the call after the requests that are read in the same turn of the event loop.
            queue.starting = True
            loop.call_soon(self._start, queue)
        if self._expiry is None:
            self._expiry = loop.call_later(MAX_WAIT_SECONDS, self._expire)

    def called_items(self) -> list[str]:
        """Returns the items that were called within the lifetime of a heartbeat.

        Redis may have accepted a reservation in such a call that this pod does not count yet.
        """
        oldest = asyncio.get_running_loop().time() - EXPIRY_SECONDS
        self._called = {item: since for item, since in self._called.items() if since > oldest}
        return list(self._called)

    async def close(self) -> None:
        """Refuses new requests, and returns once all waiting requests are decided."""
        self._closed = True
        while self._queues:
            await asyncio.sleep(0)  # the calls of this turn of the event loop start first
            await asyncio.gather(*self._calls, return_exceptions=True)

    def _start(self, queue: _Queue) -> None:
        queue.starting = False
        while queue.waiting and queue.calls < CALLS_IN_FLIGHT:
            if self._in_flight >= MAX_CALLS:
                queue.starting = True
                self._held_back.append(queue)
                break
            size = min(len(queue.waiting), BATCH_LIMIT)
            batch = [queue.waiting.popleft() for _ in range(size)]
            self._waiting -= size
            self._in_flight += 1
            queue.calls += 1
            call = asyncio.get_running_loop().create_task(self._call(queue, batch))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        self._metrics.waiting.set(self._waiting)
        if not queue.waiting and not queue.calls:
            self._queues.pop(queue.item_id, None)

    def _ended(self, queue: _Queue) -> None:
        """Starts the next calls: first for items held back by `MAX_CALLS`, then for this item."""
        self._in_flight -= 1
        queue.calls -= 1
        while self._held_back and self._in_flight < MAX_CALLS:
            self._start(self._held_back.popleft())
        if not queue.starting:
            self._start(queue)

    def _expire(self) -> None:
        """Refuses the requests that have waited too long. They were never sent to Redis."""
        loop = asyncio.get_running_loop()
        oldest_allowed = loop.time() - MAX_WAIT_SECONDS
        next_since = None
        for queue in self._queues.values():
            while queue.waiting and queue.waiting[0].since <= oldest_allowed:
                queue.waiting.popleft().decided(Decision(Failure.TOO_MANY_WAITING))
                self._waiting -= 1
            if queue.waiting:
                since = queue.waiting[0].since
                next_since = since if next_since is None else min(since, next_since)
        self._metrics.waiting.set(self._waiting)
        self._expiry = (
            None
            if next_since is None
            else loop.call_at(next_since + MAX_WAIT_SECONDS, self._expire)
        )

    async def _call(self, queue: _Queue, batch: Sequence[_Waiting]) -> None:
        self._metrics.batch_size.observe(len(batch))
        try:
            decisions = await self._decisions(queue.item_id, [waiting.request for waiting in batch])
        except Exception:  # after any error, every request needs an answer
            log.exception("could not decide a batch for %s", queue.item_id)
            decisions = [Decision(Failure.INTERNAL_ERROR)] * len(batch)
        finally:
            self._ended(queue)
        for waiting, decision in zip(batch, decisions, strict=True):
            waiting.decided(decision)

    async def _decisions(self, item_id: str, requests: Sequence[Request]) -> Sequence[Decision]:
        reply = await self._reserve(item_id, requests)
        if not isinstance(reply, BatchReply):
            outcome = self._undecided(item_id, reply)
            return [Decision(outcome, request.reservation_id) for request in requests]
        self._metrics.add_item(item_id)
        self._metrics.outbox_length.labels(item_id).set(reply.outbox_length)
        decisions, accepted = _read(item_id, requests, reply)
        # A pod must hold the event before it answers 202.
        for each in accepted:
            self._publisher.add(each)
        self._remember(item_id, reply)
        return decisions

    async def _reserve(
        self, item_id: str, requests: Sequence[Request]
    ) -> BatchReply | Outcome | Failure:
        """Calls the script, and repeats a failed call once. The ids make the repetition a replay.

        A reply that arrives after the deadline is ignored. After the pod was suspended, its socket
        may hold a reply from before a Redis failure. The rebuilt sale may lack its reservations.
        """
        loop = asyncio.get_running_loop()
        maybe_executed = False
        for _ in range(2):
            started = self._called[item_id] = loop.time()
            try:
                reply = await self._inventory.reserve(
                    item_id,
                    requests,
                    timeout_seconds=CALL_DEADLINE_SECONDS / 2,
                    engine_id=self._engine.id,
                )
            except RedisUnavailable as error:
                self._metrics.script_failures.inc()
                maybe_executed = maybe_executed or error.maybe_executed
                log.debug("a script call for %s failed: %s", item_id, error)
                continue
            seconds = loop.time() - started
            self._metrics.script_seconds.observe(seconds)
            if self._spans is not None and self._spans.open:
                self._spans.called(requests, seconds)
            if seconds < CALL_DEADLINE_SECONDS:
                return reply
            maybe_executed = True
        return Failure.OUTCOME_UNKNOWN if maybe_executed else Failure.REDIS_UNAVAILABLE

    def _undecided(self, item_id: str, outcome: Outcome | Failure) -> Outcome | Failure:
        """Returns the outcome of a batch that was not decided per request.

        An unknown item that had a sale until recently is answered as fenced.
        """
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
        """Caches that the sale is sold out, and that it exists and has not ended."""
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
