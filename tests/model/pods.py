"""API pods in the model, as sequences of steps."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from tests.model.kafka import Kafka
from tests.model.ledger import Ledger
from tests.model.records import Answer, Event, Heartbeat, Request
from tests.model.redis import Redis
from tests.model.rules import (
    ACKNOWLEDGED_WITHIN,
    BEAT,
    CALL_DEADLINE,
    CALLS_IN_FLIGHT,
    EXPIRY,
    SWEEP_AGE,
)
from tests.model.world import Process, Steps, Unreachable, Violation, World

SLOW_CALLS: Final = 0.06
"""Share of the calls to Redis that are executed long after the pod has given up on them."""
LONG_SUSPENSION: Final = EXPIRY - 1.5 * BEAT
"""A pod that is suspended for this long, in seconds, may lose its heartbeat."""
NO_REFUSALS: Final = frozenset({"fenced", "unknown", "expired", "cancelled"})
"""Answers of a script that do not say that the buyer has never had the unit."""
EXPIRED_AT_ONCE: Final = 3
DELIVERY_SECONDS: Final = 12.0
"""How long the producer waits for an acknowledgement before it sends a batch again."""
RISK_AT_CHANGES: Final = 0.15
RISK_AT_CHANGES_IF_AIMED: Final = 0.35

T = TypeVar("T")
Reply: TypeAlias = Generator[float, None, tuple[T, float, bool] | None]
"""The steps of a script call, or None without a reply.

They return the reply, when its last try began, and whether an earlier try may still be executed.
"""


@dataclass(slots=True)
class Servers:
    """The servers, and the owner's manifest: stock, state and the length of holds.

    `served`: the FlashSale's status tells that Redis had the sale.
    """

    redis: Redis
    kafka: Kafka
    ledger: Ledger
    stock: int
    state: str = "open"
    hold: float | None = None
    served: bool = False


@dataclass(slots=True)
class Asked:
    """A buyer's request that waits in a pod, and its answer."""

    request: Request
    answer: str = ""
    state: str = ""


@dataclass(slots=True)
class Ordered:
    """A call of the order service, and its answer."""

    verb: str
    reservation_id: str
    order_ref: str | None
    answer: str = ""

    def script(self, redis: Redis) -> Callable[[], Answer]:
        if self.verb == "confirm":
            return lambda: redis.confirm(self.reservation_id, self.order_ref or "")
        return lambda: redis.cancel(self.reservation_id, self.order_ref)


@dataclass(slots=True, eq=False)
class Publication:
    """An event in a pod's memory until Kafka has acknowledged it, with its outbox entry or 0."""

    event: Event
    entry: int = 0
    acknowledged: bool = False


class Pod(Process):
    """flashsale_api: batcher.py, publisher.py, sweeper.py, heartbeat.py, and the order port."""

    def __init__(self, world: World, name: str, servers: Servers) -> None:
        super().__init__(world, name)
        self.servers = servers
        self.connected = True
        """Whether the pod can reach Redis. Its connection to Kafka never fails alone."""
        self.alive = False
        self.forget()

    def begin(self) -> None:
        self.alive = True
        self.spawn(self._tick())

    def forget(self) -> None:
        self.alive = False
        self.waiting: list[Asked] = []
        self.calls = 0
        self.memory: dict[object, Publication] = {}
        self.remembered: dict[object, int] = {}
        """The revisions in which Kafka has acknowledged replays. These are not published again."""
        self.pending: list[Publication] = []
        self.acknowledged: list[tuple[int, Event]] = []
        self.entries: set[int] = set()
        """The outbox entries in memory and of `acknowledged`. The sweep leaves them alone."""
        self._publishes = self._settles = False

    def crash(self, seconds: float) -> None:
        self._orphan()
        super().crash(seconds)

    def suspend(self, seconds: float) -> None:
        if seconds >= LONG_SUSPENSION:
            self._orphan()
        super().suspend(seconds)

    def cut_off(self, seconds: float) -> None:
        """Disconnects this pod from Redis."""
        self.world.log(self.name, "cannot reach redis for", f"{seconds:.1f} s")
        if seconds >= LONG_SUSPENSION:
            self._orphan()
        self.connected = False
        self.world.later(seconds, self._reconnection())

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.calls or self.memory or self.acknowledged)

    # Buyers' requests.

    def ask(self, asked: Asked) -> None:
        """Queues a request, and starts a call if there may be one more."""
        if self.alive:
            self.world.oracle.asked[asked.request.reservation_id] += 1
            self.waiting.append(asked)
            if self.calls < CALLS_IN_FLIGHT:
                self.calls += 1
                self.spawn(self._call())

    def _call(self) -> Steps:
        batch, self.waiting = self.waiting, []
        requests = [asked.request for asked in batch]
        reply = yield from self._script(lambda: self.servers.redis.reserve(requests))
        if reply is None:
            for asked in batch:
                asked.answer = "unavailable"
        else:
            answers, _, repeated = reply
            for asked, answer in zip(batch, answers, strict=True):
                self._deliver(asked, answer, repeated=repeated)
        self.world.risk(self)
        self.calls -= 1
        if self.waiting:
            self.calls += 1
            self.spawn(self._call())

    def _deliver(self, asked: Asked, answer: Answer, *, repeated: bool) -> None:
        """Hands an accepted event to the publisher and then answers, in one step."""
        world, event = self.world, answer.event
        asked.answer = answer.outcome
        if event is None:
            if repeated and world.rules.late_calls_expected:
                asked.answer = "unavailable"
            elif asked.answer not in NO_REFUSALS:
                world.oracle.denied.add(asked.request.reservation_id)
            return
        if event.final:
            raise Violation(f"{event} is answered 202")
        asked.state = event.state
        if answer.outcome == "accepted" or world.rules.replays_published:
            self.publish(answer.entry, event)
        world.oracle.promised.setdefault(event.reservation_id, event.quantity)
        world.oracle.counts[answer.outcome] += 1
        world.log(self.name, "answers 202:", answer.outcome, event)

    def _script(self, execute: Callable[[], T]) -> Reply[T]:
        """Calls a script, again if that fails. A late reply is ignored."""
        world, redis = self.world, self.servers.redis
        repeated = False
        for _ in range(2):
            started, executed = world.now, False
            try:
                if world.chance() < SLOW_CALLS:
                    repeated = True
                    self._execute_later(execute)
                    yield CALL_DEADLINE / 2
                    continue
                yield world.between(0.005, 0.05)
                self._reached()
                found, stamp, executed = execute(), redis.stamp, True
                world.risk(self)
                yield world.between(0.005, 0.2)
                self._reached()
                redis.replied(stamp=stamp)
            except Unreachable:
                repeated = repeated or executed
                yield 0.05
                continue
            late = world.now - started >= CALL_DEADLINE
            if not (late and world.rules.late_answers_ignored):
                return found, started, repeated
            repeated = True
        return None

    def _execute_later(self, execute: Callable[[], T]) -> None:
        redis = self.servers.redis
        stamp = redis.stamp

        def executes() -> Steps:
            if redis.up and redis.stamp == stamp:  # the connection ends with the server's run
                self.world.log(self.name, "has a late call executed")
                execute()
            yield from ()

        self.world.later(self.world.between(0.1, 1.5), executes())

    # Calls of the order service.

    def order(self, ordered: Ordered) -> None:
        """Starts a confirmation or cancellation."""
        if self.alive:
            self.spawn(self._order(ordered))

    def _order(self, ordered: Ordered) -> Steps:
        """Makes the change. Answers 200 if Kafka acknowledges that very event in time."""
        world, rules = self.world, self.world.rules
        reply = yield from self._script(ordered.script(self.servers.redis))
        if reply is None:
            ordered.answer = "unavailable"
            return
        answer, started, _ = reply
        if answer.event is None:
            self._refuse(ordered, answer.outcome)
            return
        publication = self.publish(answer.entry, answer.event)
        self._risk_a_change()
        waits = rules.confirmation_waits if ordered.verb == "confirm" else rules.cancellation_waits
        if answer.outcome == "replayed" and not rules.repeats_wait:
            waits = False
        if waits:
            until = started + ACKNOWLEDGED_WITHIN
            if not rules.late_acknowledgements_ignored:
                until += 10.0
            while not publication.acknowledged and world.now < until:
                yield 0.1
            if not publication.acknowledged or world.now >= until:
                ordered.answer = "202"
                world.oracle.counts[f"{ordered.verb} 202"] += 1
                world.log(self.name, "answers 202:", ordered.verb, answer.event)
                return
        ordered.answer = "200"
        self._promise(ordered, answer.event, started)

    def _promise(self, ordered: Ordered, event: Event, started: float) -> None:
        """Notes a 200 for the verdict. Raises `Violation` if it contradicts an earlier one."""
        oracle, known = self.world.oracle, event.reservation_id
        oracle.counts[f"{ordered.verb} 200"] += 1
        self.world.log(self.name, "answers 200:", ordered.verb, event)
        if ordered.verb == "cancel":
            oracle.cancelled.setdefault(known, self.world.now)
            return
        order = ordered.order_ref or ""
        if oracle.confirmed.setdefault(known, order) != order:
            raise Violation(f"{known} is confirmed for {order} and {oracle.confirmed[known]}")
        if oracle.cancelled.get(known, started) < started:
            raise Violation(f"{known} is confirmed after its cancellation was answered 200")

    def _refuse(self, ordered: Ordered, outcome: str) -> None:
        oracle, known = self.world.oracle, ordered.reservation_id
        ordered.answer = outcome
        oracle.counts[f"{ordered.verb} {outcome}"] += 1
        self.world.log(self.name, "answers", ordered.verb, known, ordered.order_ref, outcome)
        if outcome in {"expired", "not_found"} and known in oracle.confirmed:
            raise Violation(f"{known} is {outcome}, but its confirmation was answered 200")

    # Expiry.

    def _expire(self) -> Steps:
        """Expires due holds. No caller waits, and the sweep publishes the rest."""
        redis = self.servers.redis
        if self.world.rules.expiry_is_a_transition:
            reply = yield from self._script(lambda: redis.expire(EXPIRED_AT_ONCE))
        else:
            found = yield from self._script(lambda: redis.due_holds(EXPIRED_AT_ONCE))
            due = [] if found is None else found[0]
            reply = yield from self._script(lambda: redis.expire_all(due))
        for answer in [] if reply is None else reply[0]:
            if answer.event is not None:
                self.publish(answer.entry, answer.event)
                self._risk_a_change()

    def _risk_a_change(self) -> None:
        self.world.risk(self, RISK_AT_CHANGES_IF_AIMED if self.world.aimed else RISK_AT_CHANGES)

    # The publisher.

    def publish(self, entry: int, event: Event, *, swept: bool = False) -> Publication:
        """Hands an event to the publisher, unless its memory has it already."""
        if not (self.world.rules.publish_at_once or swept):
            return Publication(event)
        publication = Publication(event, entry)
        key = self._key(publication)
        if not entry and self.remembered.get(key) == event.revision:
            self.world.oracle.counts["remembered"] += 1
            publication.acknowledged = True
            return publication
        if key in self.memory:
            return self.memory[key]
        self.memory[key] = publication
        self.pending.append(publication)
        if entry:
            self.entries.add(entry)
        if not self._publishes:
            self._publishes = True
            self.spawn(self._publish())
        return publication

    def _key(self, publication: Publication) -> object:
        entry, event = publication.entry, publication.event
        # The id of a real entry never comes again. Here it does after Redis has lost entries.
        if not self.world.rules.memory_by_version:
            return event.reservation_id
        return entry, event.reservation_id, event.version

    def _publish(self) -> Steps:
        """Publishes from memory, and sends a batch again if it fails."""
        world = self.world
        while self.pending:
            yield world.between(0.0, 0.02)
            batch, self.pending = self.pending, []
            receipt = self.servers.kafka.send([publication.event for publication in batch])
            yield min(receipt.seconds, DELIVERY_SECONDS)
            if not receipt.acknowledged:
                self.pending = batch + self.pending
                yield world.between(0.1, 1.0)
                continue
            for publication in batch:
                publication.acknowledged = True
                key = self._key(publication)
                del self.memory[key]
                if publication.entry:
                    self.acknowledged.append((publication.entry, publication.event))
                else:
                    self.remembered[key] = publication.event.revision
            world.risk(self)
            if self.acknowledged and not self._settles:
                self._settles = True
                self.spawn(self._settle())
        self._publishes = False

    def _settle(self) -> Steps:
        """Settles acknowledged events."""
        while self.acknowledged:
            page = self.acknowledged.copy()
            yield self.world.between(0.005, 0.1)
            try:
                self._reached()
                self.servers.redis.settle(page)
                self.servers.redis.replied()
            except Unreachable:
                yield 2.0
                continue
            del self.acknowledged[: len(page)]
            self.entries.difference_update(entry for entry, _ in page)
        self._settles = False

    def _tick(self) -> Steps:
        """Sends heartbeats, sweeps and expires holds."""
        world, redis = self.world, self.servers.redis
        own = f"{self.name}/{self.generation}"
        while True:
            yield world.between(0.9, 1.1) * BEAT
            try:
                self._reached()
                sampled, stamp = redis.clock, redis.stamp
                yield 0.02
                self._reached()
                redis.keys.heartbeats[own] = Heartbeat(len(self.memory), sampled, stamp)
                if self.servers.kafka.up:
                    self._sweep(redis)
                if redis.due_holds(1):
                    self.spawn(self._expire())
            except Unreachable:
                continue

    def _sweep(self, redis: Redis) -> None:
        for entry, (event, written) in redis.keys.outbox.items():
            if written <= self.world.now - SWEEP_AGE and entry not in self.entries:
                self.world.log(self.name, "sweeps", entry, event)
                self.publish(entry, event, swept=True)

    def _reached(self) -> None:
        if not self.connected:
            raise Unreachable
        self.servers.redis.reached()

    def _reconnection(self) -> Steps:
        self.connected = True
        yield from ()

    def _orphan(self) -> None:
        in_memory = {publication.event.reservation_id for publication in self.memory.values()}
        self.world.oracle.orphaned |= in_memory
