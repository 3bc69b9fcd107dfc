"""API pods and their buyers in the model, each as a sequence of steps."""

from dataclasses import dataclass

from tests.model.kafka import Kafka
from tests.model.ledger import Ledger
from tests.model.redis import Answer, Heartbeat, Redis, Request
from tests.model.rules import (
    BEAT,
    CALL_DEADLINE,
    CALLS_IN_FLIGHT,
    EXPIRY,
    SWEEP_AGE,
)
from tests.model.world import Event, Process, Steps, Unreachable, World, changes_of

SLOW_CALLS = 0.06
"""Share of the calls to Redis that are executed long after the pod has given up on them."""
LOST_ACKNOWLEDGEMENTS = 0.05
LONG_SUSPENSION = EXPIRY - 1.5 * BEAT
"""A pod that is suspended for this long, in seconds, may lose its heartbeat."""

Held = tuple[int, Event]
"""An outbox entry and its event. The entry is 0 if the pod does not know it."""


@dataclass(slots=True)
class Servers:
    """The servers, and the owner's manifest (stock and state)."""

    redis: Redis
    kafka: Kafka
    ledger: Ledger
    stock: int
    state: str = "open"


@dataclass(slots=True)
class Asked:
    """A request that waits in a pod, and its answer."""

    request: Request
    answer: str = ""


class Pod(Process):
    """flashsale_api: batcher.py, publisher.py, sweeper.py, heartbeat.py."""

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
        self.pending: list[Held] = []
        self.publishing: list[Held] = []
        self.acknowledged: list[Held] = []
        self.held: set[int] = set()
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
    def unacknowledged(self) -> int:
        return len(self.pending) + len(self.publishing)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.calls or self.unacknowledged or self.acknowledged)

    def ask(self, asked: Asked) -> None:
        """Queues a request, and starts a call if there may be one more."""
        if self.alive:
            self.waiting.append(asked)
            if self.calls < CALLS_IN_FLIGHT:
                self.calls += 1
                self.spawn(self._call())

    def release(self, reservation_id: str) -> None:
        """Starts the release of a reservation."""
        if self.alive:
            self.spawn(self._release(reservation_id))

    def _call(self) -> Steps:
        """Calls `reserve`, again if that fails. A late reply is ignored."""
        world, redis = self.world, self.servers.redis
        batch, self.waiting = self.waiting, []
        requests = [asked.request for asked in batch]
        answers: list[Answer] | None = None
        for _ in range(2):
            started = world.now
            try:
                if world.chance() < SLOW_CALLS:
                    self._execute_later(requests)
                    yield CALL_DEADLINE / 2
                    continue
                yield world.between(0.005, 0.05)
                self._reached()
                found, stamp = redis.reserve(requests), redis.stamp
                world.risk(self)
                yield world.between(0.005, 0.2)
                self._reached()
                redis.replied(stamp=stamp)
            except Unreachable:
                yield 0.05
                continue
            late = world.now - started >= CALL_DEADLINE
            if not (late and world.rules.late_answers_ignored):
                answers = found
                break
        self._deliver(batch, answers)
        world.risk(self)
        self.calls -= 1
        if self.waiting:
            self.calls += 1
            self.spawn(self._call())

    def _execute_later(self, requests: list[Request]) -> None:
        redis = self.servers.redis
        stamp = redis.stamp

        def executes() -> Steps:
            if redis.up and redis.stamp == stamp:  # the connection ends with the server's run
                self.world.log(self.name, "has its late call executed", *requests)
                redis.reserve(requests)
            yield from ()

        self.world.later(self.world.between(0.1, 1.5), executes())

    def _deliver(self, batch: list[Asked], answers: list[Answer] | None) -> None:
        """Hands accepted events to the publisher and then answers, in one step."""
        world = self.world
        if answers is None:
            for asked in batch:
                asked.answer = "unavailable"
            return
        for asked, answer in zip(batch, answers, strict=True):
            asked.answer = answer.outcome
            if answer.event is None:
                continue
            if answer.outcome == "accepted" or world.rules.replays_published:
                self._hold(answer.entry, answer.event)
            promise = (answer.event.reservation_id, 1)
            world.oracle.promised.setdefault(promise, answer.event.quantity)
            world.oracle.counts[answer.outcome] += 1
            world.log(self.name, "answers 202:", answer.outcome, answer.event)

    def _release(self, reservation_id: str) -> Steps:
        world, started = self.world, self.world.now
        try:
            yield world.between(0.005, 0.05)
            self._reached()
            answer = self.servers.redis.release(reservation_id)
            yield world.between(0.005, 0.2)
            self._reached()
            self.servers.redis.replied()
        except Unreachable:
            return
        if world.now - started >= CALL_DEADLINE and world.rules.late_answers_ignored:
            return
        if answer.outcome == "accepted" and answer.event is not None:
            self._hold(answer.entry, answer.event)
            world.risk(self)
            world.oracle.promised[reservation_id, 2] = answer.event.quantity
            world.oracle.counts["released"] += 1
            world.log(self.name, "answers released:", answer.event)

    def _hold(self, entry: int, event: Event, *, swept: bool = False) -> None:
        """Hands an event to the publisher."""
        if not (self.world.rules.publish_at_once or swept):
            return
        self.pending.append((entry, event))
        self.held.add(entry)
        if not self._publishes:
            self._publishes = True
            self.spawn(self._publish())

    def _publish(self) -> Steps:
        """Publishes from memory, and sends a batch again if it fails."""
        world, kafka = self.world, self.servers.kafka
        while self.pending:
            self.publishing, self.pending = self.pending, []
            yield world.between(0.01, kafka.delay)
            if kafka.up:
                kafka.append(event for _, event in self.publishing)
                yield world.between(0.005, 0.1)
            if not kafka.up or world.chance() < LOST_ACKNOWLEDGEMENTS:
                self.pending, self.publishing = self.publishing + self.pending, []
                yield world.between(0.1, 1.0)
                continue
            self.acknowledged += [held for held in self.publishing if held[0]]
            self.publishing = []
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
            self.held.difference_update(entry for entry, _ in page)
        self._settles = False

    def _tick(self) -> Steps:
        """Sends heartbeats and sweeps."""
        world, redis = self.world, self.servers.redis
        own = f"{self.name}/{self.generation}"
        while True:
            yield world.between(0.9, 1.1) * BEAT
            try:
                self._reached()
                sampled, stamp = redis.clock, redis.stamp
                yield 0.02
                self._reached()
                redis.keys.heartbeats[own] = Heartbeat(self.unacknowledged, sampled, stamp)
                if self.servers.kafka.up:
                    self._sweep(redis)
            except Unreachable:
                continue

    def _sweep(self, redis: Redis) -> None:
        for entry, (event, written) in redis.keys.outbox.items():
            if written <= self.world.now - SWEEP_AGE and entry not in self.held:
                self.world.log(self.name, "sweeps", entry, event)
                self._hold(entry, event, swept=True)

    def _reached(self) -> None:
        if not self.connected:
            raise Unreachable
        self.servers.redis.reached()

    def _reconnection(self) -> Steps:
        self.connected = True
        yield from ()

    def _orphan(self) -> None:
        held = [event for _, event in (*self.pending, *self.publishing)]
        self.world.oracle.orphaned |= changes_of(held)


def buy(world: World, pods: list[Pod], request: Request, *, keyed: bool) -> Steps:
    """A buyer, who retries, maybe on another pod. Without a key each attempt is a new request."""
    sent = request
    for attempt in range(1 + int(world.chance() * 5)):
        if not keyed:
            sent = request._replace(reservation_id=f"{request.reservation_id}.{attempt}")
        asked = Asked(sent)
        pods[int(world.chance() * len(pods))].ask(asked)
        yield world.between(1.2, 3.0)
        patient = asked.answer in {"", "unavailable", "fenced", "sold_out"}
        if world.chance() < (0.1 if patient else 0.8):
            break
    if keyed and world.chance() < 0.3:  # later repeats the request to check the reservation
        yield world.between(2.0, 15.0)
        pods[int(world.chance() * len(pods))].ask(Asked(sent))
    elif world.chance() < 0.5:
        yield world.between(0.0, 5.0)
        pods[int(world.chance() * len(pods))].release(sent.reservation_id)
