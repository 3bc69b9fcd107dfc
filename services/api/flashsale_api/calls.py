"""Requests that arrive while a script call is in flight form the next call.

There is no timer. A lone request is sent at once, and batches grow with the load. A call has at
most `BATCH_LIMIT` requests, of several items if the server permits it. While a call of an item is
in flight, further requests of the item wait for its reply, or until they are `ENOUGH` for a call.
So with many sales, each has several requests in a call, which cost Redis hardly more than one.

The items that the pod knows have a share of the calls and of the waiting places, and all other
names have another one. So requests for made-up items delay no sale. In a Redis Cluster each node
has two shares of its own. So a silent node delays no sale of another one.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

from prometheus_client import Gauge

from flashsale.errors import RedisUnavailable
from flashsale.heartbeat import CALL_DEADLINE_SECONDS, EXPIRY_SECONDS
from flashsale.reservations import BATCH_LIMIT, Outcome, Word
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics

log = logging.getLogger(__name__)

CALLS_IN_FLIGHT: Final = 3
"""Calls of an item in flight."""
ENOUGH: Final = 32
"""With this many requests, an item has another call while one is in flight."""
MAX_CALLS: Final = 64
"""Calls in flight of a share, however many items the requests name."""
MAX_WAITING: Final = 8192
"""Requests of a share that wait for a call. Further requests are refused.

An item has at most as many waiting requests as places are free. So a busy item leaves half of the
places to others.
"""
MAX_WAIT_SECONDS: Final = 0.5
"""About how long a request waits for a call before it is refused."""
MAX_CHECKS: Final = 5
"""A waiting request is refused at so many checks. Checks are counted instead of seconds.

A standstill of the process, however long, makes only one. Afterwards, the requests are sent.
"""

R = TypeVar("R")
D = TypeVar("D")
T = TypeVar("T")


class Failure(Word):
    """Why a request has no decision from Redis."""

    TOO_MANY_WAITING = "too_many_waiting"
    REDIS_UNAVAILABLE = "redis_unavailable"
    OUTCOME_UNKNOWN = "outcome_unknown"
    INTERNAL_ERROR = "internal_error"
    UNAUTHORIZED = "unauthorized"
    KEYS_UNAVAILABLE = "keys_unavailable"
    WRONG_USER = "wrong_user"
    OTHER_ENGINE = "other_engine"
    """The pod meets another engine. The scripts use the same word if a sale is of another one."""


class Reply(NamedTuple, Generic[T]):
    """The reply to a script call that `started` then, by the loop's clock.

    `repeated` means that the call before it may have been executed.
    """

    value: T
    started: float
    repeated: bool = False


class _Waiting(NamedTuple, Generic[R, D]):
    request: R
    decided: Callable[[D], None]
    since: int
    """The number of checks before this request came."""


@dataclass(slots=True)
class _Share(Generic[R, D]):
    """The waiting requests and the calls in flight of several items."""

    known: bool
    waiting: int = 0
    in_flight: int = 0
    starting: bool = False
    ready: "deque[_Queue[R, D]]" = field(default_factory=deque)
    """The queues with requests for the next call."""


@dataclass(slots=True)
class _Queue(Generic[R, D]):
    """The waiting requests of an item, and the number of its calls in flight."""

    item_id: str
    share: _Share[R, D]
    waiting: deque[_Waiting[R, D]] = field(default_factory=deque)
    calls: int = 0
    ready: bool = False


_Batch: TypeAlias = tuple[_Queue[R, D], list[_Waiting[R, D]]]
"""The requests of an item that a call takes."""


class Calls(ABC, Generic[R, D]):
    """Decides requests of one kind through batched script calls."""

    items_per_call = 1
    """The number of items that a call may have."""

    def __init__(
        self,
        metrics: Metrics,
        engine: Engine,
        waiting: Gauge,
        node_of: Callable[[str], str],
        refusal: Callable[[str], Outcome | Failure | None],
    ) -> None:
        """`waiting` counts the requests that wait for a script call.

        `node_of` returns the name of an item's server, as far as it is known. `refusal` returns the
        outcome of an item's requests if the pod may not call Redis now.
        """
        self._metrics = metrics
        self._engine = engine
        self._waiting = 0
        waiting.set_function(lambda: self._waiting)
        self._called: dict[str, float] = {}
        self._queues: dict[str, _Queue[R, D]] = {}
        self._node_of = node_of
        self._refusal = refusal
        self._shares: dict[tuple[str, bool], _Share[R, D]] = {}
        """The shares of each node: that of known items, and that of other names."""
        self._calls: set[asyncio.Task[None]] = set()
        self._closed = False
        self._failing = False
        """Whether the last script call failed."""
        self._checks = 0
        self._check: asyncio.TimerHandle | None = None
        """The timer of the next check. None while no request waits."""

    @abstractmethod
    def _undecided(self, failure: Failure) -> D:
        """Returns the decision on a request that Redis has not decided."""

    @abstractmethod
    async def _decisions(self, batches: Sequence[tuple[str, Sequence[R]]]) -> Sequence[Sequence[D]]:
        """Calls the script with the requests of each item. Returns the decisions in their order."""

    def decide(self, item_id: str, request: R, decided: Callable[[D], None]) -> None:
        """Calls `decided` exactly once, immediately or later. `decided` must not raise.

        The request waits at most about `MAX_WAIT_SECONDS` for a call. The call and its one
        repetition take at most `CALL_DEADLINE_SECONDS` together. The request is not cancelled if
        the caller disconnects, because it is part of a batch.
        """
        queue = self._queues.get(item_id)
        if queue is not None:
            share, of_item = queue.share, len(queue.waiting)
        else:
            share, of_item = self._share(item_id), 0
        if self._closed or of_item >= MAX_WAITING - share.waiting:
            decided(self._undecided(Failure.TOO_MANY_WAITING))
            return
        if self._engine.conflict:
            decided(self._undecided(Failure.OTHER_ENGINE))
            return
        if queue is None:
            queue = self._queues[item_id] = _Queue(item_id, share)
        queue.waiting.append(_Waiting(request, decided, self._checks))
        share.waiting += 1
        self._waiting += 1
        self._make_ready(queue)
        if self._check is None:
            self._check_soon()

    def called_items(self) -> list[str]:
        """Returns the items with a sale that were called within the lifetime of a heartbeat.

        Redis may have changed a reservation in such a call that this pod does not count yet. Names
        without a sale are left out, because a heartbeat writes a key for each item.
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

    async def _ask(
        self, item_ids: Sequence[str], send: Callable[[], Awaitable[Sequence[T]]]
    ) -> "Reply[Sequence[T]] | Failure":
        """Sends a script call, and repeats it once if it failed. The repetition must be a replay.

        `send` returns a reply for each item. It raises `RedisUnavailable` after half of
        `CALL_DEADLINE_SECONDS`. A reply that arrives after the deadline is ignored. After the pod
        was suspended, its socket may hold a reply from before a Redis failure. The rebuilt sale may
        lack its reservations.
        """
        loop = asyncio.get_running_loop()
        maybe_executed = False
        for _ in range(2):
            started = loop.time()
            for item_id in item_ids:
                if item_id in self._engine.items:
                    self._called[item_id] = started
            try:
                self._require_heartbeat(item_ids)
                replies = await send()
            except RedisUnavailable as error:
                self._metrics.script_failures.inc()
                maybe_executed = maybe_executed or error.maybe_executed
                if not self._failing:  # an outage is logged once
                    log.warning("a script call failed: %s", error)
                self._failing = True
                continue
            self._failing = False
            seconds = loop.time() - started
            self._metrics.script_seconds.observe(seconds)
            for item_id, reply in zip(item_ids, replies, strict=True):
                if reply != Outcome.UNKNOWN:
                    self._called[item_id] = started
            if seconds < CALL_DEADLINE_SECONDS:
                return Reply(replies, started, maybe_executed)
            maybe_executed = True
        return Failure.OUTCOME_UNKNOWN if maybe_executed else Failure.REDIS_UNAVAILABLE

    def _require_heartbeat(self, item_ids: Sequence[str]) -> None:
        """Raises `RedisUnavailable` if the pod may not call Redis now.

        During a standstill of the pod, both the first call and the heartbeat can end.
        """
        if any(map(self._refusal, item_ids)):
            raise RedisUnavailable("this pod may not call Redis now")

    def _remember(self, item_id: str) -> None:
        """Remembers that the item has a sale."""
        self._engine.items.note(item_id)
        queue = self._queues.get(item_id)
        if queue is not None and not queue.share.known:
            share = self._share(item_id)
            queue.share.waiting -= len(queue.waiting)
            share.waiting += len(queue.waiting)
            queue.share = share
            if queue.ready:
                self._enter(queue)

    def _share(self, item_id: str) -> _Share[R, D]:
        key = self._node_of(item_id), item_id in self._engine.items
        if key not in self._shares:
            self._shares[key] = _Share(known=key[1])
        return self._shares[key]

    def _make_ready(self, queue: _Queue[R, D]) -> None:
        """Lets the next call take the queue's requests, if the item may have another call."""
        enough = len(queue.waiting) >= ENOUGH and queue.calls < CALLS_IN_FLIGHT
        if not queue.ready and (enough or not queue.calls):
            self._enter(queue)

    def _enter(self, queue: _Queue[R, D]) -> None:
        """Puts the queue at the end of those that the share's next call takes."""
        queue.ready = True
        queue.share.ready.append(queue)
        self._start_soon(queue.share)

    def _start_soon(self, share: _Share[R, D]) -> None:
        """Starts calls after the requests that are read in the same turn of the event loop."""
        if not share.starting:
            share.starting = True
            asyncio.get_running_loop().call_soon(self._start, share)

    def _start(self, share: _Share[R, D]) -> None:
        while share.ready and share.in_flight < MAX_CALLS:
            if batches := self._next_batches(share):
                share.in_flight += 1
                call = asyncio.get_running_loop().create_task(self._call(share, batches))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
        share.starting = False

    def _next_batches(self, share: _Share[R, D]) -> list[_Batch[R, D]]:
        """Takes the requests of a call from the queues that are ready."""
        batches: list[_Batch[R, D]] = []
        left, limit = BATCH_LIMIT, self.items_per_call
        while share.ready and left and len(batches) < limit:
            queue = share.ready.popleft()
            if queue.share is not share:  # the item is known meanwhile, and is ready there
                continue
            queue.ready = False
            size = min(len(queue.waiting), left)
            if size:
                batches.append((queue, [queue.waiting.popleft() for _ in range(size)]))
                left -= size
                share.waiting -= size
                self._waiting -= size
                queue.calls += 1
            self._go_on(queue)
        return batches

    def _go_on(self, queue: _Queue[R, D]) -> None:
        """Keeps a queue that has requests or calls, and makes it ready for a call if it may be."""
        if queue.waiting:
            self._make_ready(queue)
        elif not queue.calls:
            self._queues.pop(queue.item_id, None)

    def _ended(self, share: _Share[R, D], batches: Sequence[_Batch[R, D]]) -> None:
        """Makes room for the next calls. The call was of `share`. An item may have moved since."""
        share.in_flight -= 1
        for queue, _ in batches:
            queue.calls -= 1
            self._go_on(queue)
        if share.ready:
            self._start_soon(share)

    def _check_soon(self) -> None:
        seconds = MAX_WAIT_SECONDS / MAX_CHECKS
        self._check = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        """Refuses the requests that have waited too long. They were never sent to Redis."""
        self._checks += 1
        for queue in self._queues.values():
            while queue.waiting and self._checks - queue.waiting[0].since >= MAX_CHECKS:
                queue.waiting.popleft().decided(self._undecided(Failure.TOO_MANY_WAITING))
                queue.share.waiting -= 1
                self._waiting -= 1
        self._check = None
        if self._waiting:
            self._check_soon()

    async def _call(self, share: _Share[R, D], batches: Sequence[_Batch[R, D]]) -> None:
        asked = [(queue.item_id, [each.request for each in waiting]) for queue, waiting in batches]
        self._metrics.batch_size.observe(sum(len(requests) for _, requests in asked))
        decisions: Sequence[Sequence[D]]
        try:
            decisions = await self._decisions(asked)
        except Exception:  # after any error, every request needs an answer
            log.exception("could not decide a batch for %s", ", ".join(item for item, _ in asked))
            failed = self._undecided(Failure.INTERNAL_ERROR)
            decisions = [[failed] * len(requests) for _, requests in asked]
        finally:
            self._ended(share, batches)
        for (_, waiting), decided in zip(batches, decisions, strict=True):
            for each, decision in zip(waiting, decided, strict=True):
                each.decided(decision)
