"""Operators in the model, as sequences of steps."""

from tests.model.pods import Servers
from tests.model.records import PARTITIONS, Row, SaleHash, Stamp
from tests.model.rules import BEAT, EXPIRY, SEED_SECONDS, SETTLED_BEFORE
from tests.model.world import Process, Steps, Unreachable, World


class Superseded(Exception):
    """Another operator rebuilds the sale, or it does not need a rebuild any more."""


class Operator(Process):
    """flashsale_operator/sales: decision.py, reconciler.py, rebuild.py and drain.py."""

    MARK_SECONDS = 3.0
    """Lease of a rebuild: how long other operators wait for its next sign of life."""
    STEPS = 8

    def __init__(
        self, world: World, name: str, servers: Servers, *, every: tuple[float, float]
    ) -> None:
        super().__init__(world, name)
        self.servers = servers
        self.every = every
        self.frees = True
        """Whether closed sales have kept their keys for long enough."""

    def begin(self) -> None:
        self.spawn(self._run(), self.world.between(0, self.every[0]))

    def forget(self) -> None:
        """An operator has no memory between reconciles."""

    @property
    def settled(self) -> bool:
        """Whether a reconcile would find nothing to do."""
        row, sale = self.servers.ledger.tables.row, self.servers.redis.keys.sale
        if row is None or self._differs_from_manifest(row):
            return False
        if sale is None:
            return self._is_freed(row)
        return not self.servers.redis.fenced() and _agrees(sale, row)

    def _run(self) -> Steps:
        while True:
            try:
                yield from self._reconcile()
            except Unreachable:
                self.world.log(self.name, "cannot reach a server")
            except Superseded:
                self.world.log(self.name, "leaves the sale to another operator")
            yield self.world.between(*self.every)

    def _reconcile(self) -> Steps:
        """Observes, decides and acts, until nothing is left to do."""
        world, redis, ledger = self.world, self.servers.redis, self.servers.ledger
        inserted = False
        for _ in range(self.STEPS):
            ledger.reached()
            recorded = ledger.progress()
            yield world.between(0.01, 0.1)
            redis.reached()
            sale, fenced, observed = redis.keys.sale, redis.fenced(), world.now
            lags = redis.lags(recorded)
            above = 0 if sale is None else sale.revision
            yield world.between(0.01, 0.1)
            ledger.reached()
            row = None if ledger.tables.row is None else ledger.tables.row.copy()
            yield world.between(0.01, 0.1)
            ledger.reached()
            if row is None or row.revision < above or self._differs_from_manifest(row):
                servers = self.servers
                row, new = ledger.write_row(servers.stock, servers.state, servers.hold, above)
                world.log(self.name, "writes", row)
                inserted = inserted or new
                if row.state == "closed":
                    yield world.between(0.01, 0.1)
                    redis.reached()
                    redis.close(row.revision)
            elif sale is None and inserted and row.accepted == 0 and not self._served():
                world.risk(self, chance=0.2)
                yield world.between(0.01, 0.1)
                redis.reached()
                if world.rules.seed_is_fresh:
                    inserted = False
                    if world.now > observed + SEED_SECONDS:
                        continue
                world.log(self.name, "seeds:", redis.apply(row, seed=True))
                world.risk(self)
            elif sale is None and self._is_freed(row):
                return
            elif sale is None or fenced or (lags and not self._is_over(sale, row)):
                yield from self._rebuild()
                return
            elif not _agrees(sale, row):
                yield world.between(0.01, 0.1)
                redis.reached()
                world.log(self.name, "applies:", redis.apply(row, seed=False))
            else:
                self.servers.served = True
                if row.state == "closed" and self.frees:
                    yield world.between(0.01, 0.1)
                    redis.reached()
                    world.log(self.name, "frees:", redis.free(row))
                return

    def _differs_from_manifest(self, row: Row) -> bool:
        servers = self.servers
        return (row.allocated, row.state, row.hold) != (servers.stock, servers.state, servers.hold)

    def _served(self) -> bool:
        """Whether Redis had the sale of this FlashSale before."""
        return self.servers.served and self.world.rules.served_not_seeded

    def _is_freed(self, row: Row) -> bool:
        """Whether a sale without keys needs none: it is closed, and the ledger has no open hold."""
        return row.state == "closed" and not (row.held and self.world.rules.closed_holds_rebuilt)

    def _is_over(self, sale: SaleHash, row: Row) -> bool:
        """Whether a closed sale with the ledger's counts is only closed in Redis, too."""
        same = (sale.accepted, sale.released, sale.held) == (row.accepted, row.released, row.held)
        return same and row.state == "closed" and not self.world.rules.closed_rebuilds_compared

    def _rebuild(self) -> Steps:
        """Rebuilds the sale: fence, drain, restore from the ledger, trust."""
        world, redis, ledger = self.world, self.servers.redis, self.servers.ledger
        redis.reached()
        sale, stamp = redis.keys.sale, redis.stamp
        if sale is not None and redis.rebuilding(sale, self.MARK_SECONDS):
            raise Superseded
        ledger.reached()
        claim, recorded = ledger.claim(0 if sale is None else sale.revision), ledger.progress()
        yield world.between(0.01, 0.1)
        redis.reached()
        _continue_if(redis.mark_rebuild(claim, stamp, self.MARK_SECONDS, recorded=recorded))
        world.log(self.name, "begins rebuild", claim)
        world.risk(self)
        ends = [0] * PARTITIONS
        if world.rules.drain:
            began, sampled_from = world.now, redis.clock + SETTLED_BEFORE
            while self.unpublished(began, sampled_from):
                yield world.between(0.2, 0.5)
                self._mark(claim, stamp)
            _continue_if(not self.clock_was_set(began, sampled_from))
            ends = self.servers.kafka.ends()
            while not self._recorded(ends):
                yield world.between(0.2, 0.5)
                self._mark(claim, stamp)
        yield world.between(0.01, 0.1)
        ledger.reached()
        read = ledger.read_for_rebuild(claim, ends)
        if read is None:
            raise Superseded
        row, reservations = read
        world.risk(self)
        yield world.between(0.01, 0.3)
        redis.reached()
        _continue_if(redis.fill_rebuild(claim, reservations))
        yield world.between(0.01, 0.3)
        redis.reached()
        _continue_if(redis.finish_rebuild(claim, row, stamp, len(reservations)))
        world.oracle.counts["rebuilt"] += 1
        world.log(self.name, "has rebuilt:", redis.keys.sale)

    def _mark(self, claim: int, stamp: Stamp) -> None:
        self.servers.redis.reached()
        _continue_if(self.servers.redis.mark_rebuild(claim, stamp, self.MARK_SECONDS, again=True))

    def _recorded(self, ends: list[int]) -> bool:
        """Whether the ledger has recorded all events before `ends`."""
        self.servers.ledger.reached()
        return self.servers.ledger.recorded(ends)

    def unpublished(self, began: float, sampled_from: float) -> bool:
        """Whether the outbox or a pod may hold an event that Kafka lacks.

        `sampled_from` is by the clock of Redis.
        """
        rules, redis = self.world.rules, self.servers.redis
        redis.reached()
        unseen = rules.unseen_pods_awaited and self.world.now < began + EXPIRY
        return (
            unseen
            or bool(redis.keys.outbox)
            or any(
                beat.sampled < sampled_from or beat.unacknowledged > 0
                for beat in redis.keys.heartbeats.values()
                if beat.sampled >= redis.clock - EXPIRY
                and (
                    (beat.stamp == redis.stamp and beat.sampled <= redis.clock + EXPIRY)
                    or not rules.times_ahead_ignored
                )
            )
        )

    def clock_was_set(self, began: float, sampled_from: float) -> bool:
        """Whether the clock of Redis was set since the wait began. Ask after `unpublished`."""
        passed = self.servers.redis.clock - (sampled_from - SETTLED_BEFORE)
        step = abs(passed - (self.world.now - began))
        return self.world.rules.set_clock_ends_rebuild and step > EXPIRY - BEAT


def _continue_if(done: bool) -> None:
    if not done:
        raise Superseded


def _agrees(sale: SaleHash, row: Row) -> bool:
    """Whether Redis has the row's manifest. Closing changes neither allocation nor holds."""
    allocated = max(row.allocated, sale.accepted - sale.released)
    same = (sale.allocated, sale.hold) == (allocated, row.hold) or row.state == "closed"
    return same and (sale.revision, sale.state) == (row.revision, row.state)
