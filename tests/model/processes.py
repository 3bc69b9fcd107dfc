"""API pods, consumers, operators and buyers, each as the steps that it takes."""

from collections.abc import Iterable
from dataclasses import dataclass

from tests.model.rules import (
    BEAT,
    CALL_DEADLINE,
    CALLS_IN_FLIGHT,
    EXPIRY,
    SEED_SECONDS,
    SETTLED_BEFORE,
    SWEEP_AGE,
)
from tests.model.servers import (
    PARTITIONS,
    Answer,
    Heartbeat,
    Kafka,
    Ledger,
    Redis,
    Request,
    Rewound,
    Row,
    SaleHash,
)
from tests.model.world import Away, Event, Process, Steps, World, changes_of

SLOW_CALLS = 0.06
"""Of the calls to Redis, those that are executed long after the pod has given them up."""
LOST_ACKNOWLEDGEMENTS = 0.05
LONG_SUSPENSION = EXPIRY - 1.5 * BEAT
"""From here on a suspended pod's heartbeat may expire."""

Held = tuple[int, Event]
"""An outbox entry that a pod publishes or settles; 0 for an event whose entry it does not know."""


@dataclass(slots=True)
class Servers:
    """What the processes talk to, and what the owner wants of the sale."""

    redis: Redis
    kafka: Kafka
    ledger: Ledger
    stock: int
    state: str = "open"


@dataclass(slots=True)
class Asked:
    """A request that waits in a pod, and what it was answered."""

    request: Request
    answer: str = ""


class Pod(Process):
    """flashsale_api: batching.py, publishing.py, sweeping.py."""

    def __init__(self, world: World, name: str, servers: Servers) -> None:
        super().__init__(world, name)
        self.servers = servers
        self.connected = True
        """To Redis; it may be cut off from that and from nothing else."""
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
        """Takes Redis away from this pod only."""
        self.world.tell(self.name, "cannot reach redis for", f"{seconds:.1f} s")
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
        """Batching.decide."""
        if self.alive:
            self.waiting.append(asked)
            if self.calls < CALLS_IN_FLIGHT:
                self.calls += 1
                self.spawn(self._call())

    def release(self, reservation_id: str) -> None:
        """Gives a reservation back."""
        if self.alive:
            self.spawn(self._release(reservation_id))

    def _call(self) -> Steps:
        """Batching._call and _reserve: once more if it failed, never believed when late."""
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
            except Away:
                yield 0.05
                continue
            late = world.now - started >= CALL_DEADLINE
            if not (late and world.rules.late_answers_disbelieved):
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
            if redis.up and redis.stamp == stamp:  # the connection is the server's own
                self.world.tell(self.name, "has a late call executed", *requests)
                redis.reserve(requests)
            yield from ()

        self.world.later(self.world.between(0.1, 1.5), executes())

    def _deliver(self, batch: list[Asked], answers: list[Answer] | None) -> None:
        """Batching._deliver: hands over what was accepted, then answers, without a pause."""
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
            world.onlooker.promised.setdefault(promise, answer.event.quantity)
            world.onlooker.counts[answer.outcome] += 1
            world.tell(self.name, "answers 202:", answer.outcome, answer.event)

    def _release(self, reservation_id: str) -> Steps:
        world, started = self.world, self.world.now
        try:
            yield world.between(0.005, 0.05)
            self._reached()
            answer = self.servers.redis.release(reservation_id)
            yield world.between(0.005, 0.2)
            self._reached()
            self.servers.redis.replied()
        except Away:
            return
        if world.now - started >= CALL_DEADLINE and world.rules.late_answers_disbelieved:
            return
        if answer.outcome == "accepted" and answer.event is not None:
            self._hold(answer.entry, answer.event)
            world.risk(self)
            world.onlooker.promised[reservation_id, 2] = answer.event.quantity
            world.onlooker.counts["released"] += 1
            world.tell(self.name, "answers released:", answer.event)

    def _hold(self, entry: int, event: Event, *, swept: bool = False) -> None:
        """Publisher.add."""
        if not (self.world.rules.publish_at_once or swept):
            return
        self.pending.append((entry, event))
        self.held.add(entry)
        if not self._publishes:
            self._publishes = True
            self.spawn(self._publish())

    def _publish(self) -> Steps:
        """Publisher._send_forever: whatever fails is sent again from memory."""
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
        """Publisher.settle."""
        while self.acknowledged:
            page = self.acknowledged.copy()
            yield self.world.between(0.005, 0.1)
            try:
                self._reached()
                self.servers.redis.settle(page)
                self.servers.redis.replied()
            except Away:
                yield 2.0
                continue
            del self.acknowledged[: len(page)]
            self.held.difference_update(entry for entry, _ in page)
        self._settles = False

    def _tick(self) -> Steps:
        """Sweeping.beat and Sweeper.run."""
        world, redis = self.world, self.servers.redis
        own = f"{self.name}/{self.generation}"
        while True:
            yield world.between(0.9, 1.1) * BEAT
            try:
                self._reached()
                sampled = world.now
                yield 0.02
                self._reached()
                redis.keys.heartbeats[own] = Heartbeat(
                    self.unacknowledged, sampled, world.now + EXPIRY
                )
                if self.servers.kafka.up:
                    self._sweep(redis)
            except Away:
                continue

    def _sweep(self, redis: Redis) -> None:
        for entry, (event, written) in redis.keys.outbox.items():
            if written <= self.world.now - SWEEP_AGE and entry not in self.held:
                self.world.tell(self.name, "sweeps", entry, event)
                self._hold(entry, event, swept=True)

    def _reached(self) -> None:
        if not self.connected:
            raise Away
        self.servers.redis.reached()

    def _reconnection(self) -> Steps:
        self.connected = True
        yield from ()

    def _orphan(self) -> None:
        held = [event for _, event in (*self.pending, *self.publishing)]
        self.world.onlooker.orphaned |= changes_of(held)


class Consumer(Process):
    """flashsale_consumer: worker.py around recording.py."""

    BATCH = 6
    CHECK_SECONDS = 5.0

    def __init__(self, world: World, name: str, servers: Servers) -> None:
        super().__init__(world, name)
        self.servers = servers
        self.assigned: frozenset[int] = frozenset()
        self.forget()

    def begin(self) -> None:
        self.spawn(self._run())

    def forget(self) -> None:
        self.positions: dict[int, int] = {}

    def assign(self, partitions: Iterable[int]) -> None:
        """A rebalance; what it is recording at this moment it does not give up."""
        self.assigned = frozenset(partitions)
        self.positions = {}

    def _run(self) -> Steps:
        world, ledger, kafka = self.world, self.servers.ledger, self.servers.kafka
        checked = world.now
        while True:
            yield world.between(0.3, 0.7)
            try:
                kafka.reached()
                ledger.reached()
                if not self.positions:  # placed where the ledger is
                    offsets = ledger.tables.offsets
                    self.positions = {number: offsets[number] for number in self.assigned}
                    checked = world.now
                positions = self.positions
                batch: list[Event] = []
                offsets_after = dict(positions)
                for number in sorted(positions):
                    at = positions[number]
                    page = kafka.partitions[number][at : at + self.BATCH]
                    batch += page
                    offsets_after[number] = at + len(page)
                if not batch:
                    if world.now - checked > self.CHECK_SECONDS:
                        self.positions = {}
                    continue
                yield world.between(0.01, 0.2)
                ledger.reached()
                ledger.record(positions, offsets_after, batch)
                positions.update(offsets_after)
                checked = world.now
            except (Away, Rewound):
                self.positions = {}


class Superseded(Exception):
    """Somebody else rebuilds the sale, or it needs no rebuild any more."""


class Operator(Process):
    """flashsale_operator: decision.py and reconciler.py, and the rebuild of issue 6."""

    MARK_SECONDS = 3.0
    """How long another operator leaves a rebuild alone of which nothing is heard."""
    STEPS = 8

    def __init__(
        self, world: World, name: str, servers: Servers, *, every: tuple[float, float]
    ) -> None:
        super().__init__(world, name)
        self.servers = servers
        self.every = every

    def begin(self) -> None:
        self.spawn(self._run(), self.world.between(0, self.every[0]))

    def forget(self) -> None:
        """All that it knows, it observes."""

    @property
    def settled(self) -> bool:
        """Whether a reconcile would find nothing to do."""
        row, sale = self.servers.ledger.tables.row, self.servers.redis.keys.sale
        return (
            row is not None
            and sale is not None
            and not self.servers.redis.fenced()
            and not self._asks_differently(row)
            and _agrees(sale, row)
        )

    def _run(self) -> Steps:
        while True:
            try:
                yield from self._reconcile()
            except Away:
                self.world.tell(self.name, "meets a server that is away")
            except Superseded:
                self.world.tell(self.name, "leaves it to another")
            yield self.world.between(*self.every)

    def _reconcile(self) -> Steps:
        """Reconciler.reconcile: observe, decide, act; again until nothing is left to do."""
        world, redis, ledger = self.world, self.servers.redis, self.servers.ledger
        inserted = False
        for _ in range(self.STEPS):
            redis.reached()
            sale, fenced, observed = redis.keys.sale, redis.fenced(), world.now
            above = 0 if sale is None else sale.revision
            yield world.between(0.01, 0.1)
            ledger.reached()
            row = None if ledger.tables.row is None else ledger.tables.row.copy()
            yield world.between(0.01, 0.1)
            ledger.reached()
            if row is None or row.revision < above or self._asks_differently(row):
                row, new = ledger.write_row(self.servers.stock, self.servers.state, above)
                world.tell(self.name, "writes", row)
                inserted = inserted or new
                if row.state == "closed":
                    yield world.between(0.01, 0.1)
                    redis.reached()
                    redis.close(row.revision)
            elif sale is None and inserted and row.accepted == 0:
                world.risk(self, chance=0.2)
                yield world.between(0.01, 0.1)
                redis.reached()
                if world.rules.seed_is_fresh:
                    inserted = False
                    if world.now > observed + SEED_SECONDS:
                        continue
                world.tell(self.name, "seeds:", redis.apply(row, seed=True))
                world.risk(self)
            elif sale is None or fenced:
                yield from self._rebuild()
                return
            elif not _agrees(sale, row):
                yield world.between(0.01, 0.1)
                redis.reached()
                world.tell(self.name, "applies:", redis.apply(row, seed=False))
            else:
                return

    def _asks_differently(self, row: Row) -> bool:
        return (row.allocated, row.state) != (self.servers.stock, self.servers.state)

    def _rebuild(self) -> Steps:
        """Issue 6: fence, barrier, the sale as the ledger has it, trusted as the last step."""
        world, redis, ledger = self.world, self.servers.redis, self.servers.ledger
        sale = redis.keys.sale
        if sale is not None and redis.rebuilding(sale):
            raise Superseded
        ledger.reached()
        claim = ledger.claim(0 if sale is None else sale.revision)
        yield world.between(0.01, 0.1)
        self._mark(claim)
        world.tell(self.name, "begins rebuild", claim)
        world.risk(self)
        ends = [0] * PARTITIONS
        if world.rules.barrier:
            began = world.now
            while self._unpublished(began):
                yield world.between(0.2, 0.5)
                self._mark(claim)
            ends = self.servers.kafka.ends()
            while not self._recorded(ends):
                yield world.between(0.2, 0.5)
                self._mark(claim)
        yield world.between(0.01, 0.1)
        ledger.reached()
        read = ledger.read_for_rebuild(claim, ends)
        if read is None:
            raise Superseded
        row, reservations = read
        world.risk(self)
        yield world.between(0.01, 0.3)
        redis.reached()
        _mine(redis.fill_rebuild(claim, reservations))
        yield world.between(0.01, 0.3)
        redis.reached()
        _mine(redis.finish_rebuild(claim, row))
        world.onlooker.counts["rebuilt"] += 1
        world.tell(self.name, "has rebuilt:", redis.keys.sale)

    def _mark(self, claim: int) -> None:
        self.servers.redis.reached()
        _mine(self.servers.redis.mark_rebuild(claim, self.MARK_SECONDS))

    def _recorded(self, ends: list[int]) -> bool:
        """Drain._unread."""
        self.servers.ledger.reached()
        return self.servers.ledger.recorded(ends)

    def _unpublished(self, began: float) -> bool:
        """Drain._unpublished: whether anybody may hold an event that Kafka has not."""
        redis, now = self.servers.redis, self.world.now
        redis.reached()
        unseen = self.world.rules.unseen_pods_awaited and now < began + EXPIRY
        return (
            unseen
            or bool(redis.keys.outbox)
            or any(
                beat.sampled < began + SETTLED_BEFORE or beat.held > 0
                for beat in redis.keys.heartbeats.values()
                if beat.expires > now
            )
        )


def _mine(done: bool) -> None:
    if not done:
        raise Superseded


def _agrees(sale: SaleHash, row: Row) -> bool:
    allocated = max(row.allocated, sale.accepted - sale.released)
    # A closed sale's allocation is left as it is.
    same = sale.allocated == allocated or row.state == "closed"
    return same and (sale.revision, sale.state) == (row.revision, row.state)


def buy(world: World, pods: list[Pod], request: Request, *, keyed: bool) -> Steps:
    """A buyer: asks, waits, asks again, maybe another pod. Without a key that is a new request."""
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
    if keyed and world.chance() < 0.3:  # comes back, to see whether it is still there
        yield world.between(2.0, 15.0)
        pods[int(world.chance() * len(pods))].ask(Asked(sent))
    elif world.chance() < 0.5:
        yield world.between(0.0, 5.0)
        pods[int(world.chance() * len(pods))].release(sent.reservation_id)
