"""Short schedules of calls, for parts of the protocol that random runs need too rarely.

Each schedule keeps its promises with the whole protocol, and raises `Violation` without its part.
"""

from collections.abc import Callable
from typing import Final

from tests.model.kafka import Kafka
from tests.model.ledger import Ledger
from tests.model.operators import Operator
from tests.model.pods import Servers
from tests.model.redis import Heartbeat, Keys, Redis, Request, held_by
from tests.model.rules import EXPIRY, SETTLED_BEFORE, Rules
from tests.model.world import Event, Violation, World

CLOCK_AHEAD, CLOCK_BEHIND = 2, 3
"""Run ids of servers whose clocks are ahead and behind. See `Redis.clock`."""
LEASE = 60.0


class Scene:
    """A sale of few units, without processes: a schedule makes each call itself."""

    def __init__(self, rules: Rules, stock: int) -> None:
        self.world = World(1, rules)
        self.redis = Redis(self.world, always=True)
        self.ledger = Ledger(self.world)
        servers = Servers(self.redis, Kafka(self.world), self.ledger, stock)
        self.operator = Operator(self.world, "operator", servers, every=(0.5, 2.0))
        self.promised: list[str] = []
        self.highest_stock = 0
        self.declare(stock)

    def declare(self, stock: int, state: str = "open") -> None:
        """Writes the manifest to the ledger and then to Redis."""
        sale, self.highest_stock = self.redis.keys.sale, max(self.highest_stock, stock)
        above = 0 if sale is None else sale.revision
        row, inserted = self.ledger.write_row(stock, state, above)
        if state == "closed":
            self.redis.close(row.revision)
        else:
            self.redis.apply(row, seed=inserted)

    def buy(self, name: str, *, promised: bool = True) -> Event | None:
        """Reserves a unit. The pod is lost before Kafka has the event unless it is `promised`."""
        [answer] = self.redis.reserve([Request(name, f"user of {name}", 1)])
        if answer.outcome == "accepted" and promised:
            self.promised.append(name)
        return answer.event if answer.outcome == "accepted" else None

    def record(self, *events: Event | None) -> None:
        """Lets Kafka and the ledger have the events, and settles them."""
        found = [event for event in events if event is not None]
        offset = self.ledger.tables.offsets[0]
        self.ledger.record({0: offset}, {0: offset + len(found)}, found)
        entries = [(entry, event) for entry, (event, _) in self.redis.keys.outbox.items()]
        self.redis.settle(held for held in entries if held[1] in found)

    def fence(self) -> int:
        """Begins a rebuild and returns its claim."""
        sale = self.redis.keys.sale
        claim = self.ledger.claim(0 if sale is None else sale.revision)
        self.redis.mark_rebuild(claim, LEASE, recorded=self.ledger.accepted())
        return claim

    def write(self, claim: int) -> None:
        """Ends a rebuild whose wait is over."""
        read = self.ledger.read_for_rebuild(claim, self.ledger.tables.offsets)
        if read is None:
            raise Violation("the ledger refuses the rebuild")
        row, reservations = read
        self.redis.fill_rebuild(claim, reservations)
        self.redis.finish_rebuild(claim, row, self.redis.stamp, len(reservations))

    def judge(self) -> None:
        """Raises `Violation` if the ledger lacks a promised reservation or has too many units."""
        recorded = self.ledger.tables.reservations
        for name in self.promised:
            if name not in recorded:
                raise Violation(f"{name} was promised, and the ledger refused it")
        if sum(held_by(recorded.values()).values()) > self.highest_stock:
            raise Violation(f"more than {self.highest_stock} units are recorded and not released")


def a_late_settlement_meets_a_release(rules: Rules) -> None:
    """The acknowledged entry is lost, and the release of its reservation gets the same entry id."""
    scene = Scene(rules, stock=1)
    before = scene.redis.keys.copy()
    [accepted] = scene.redis.reserve([Request("first", "user", 1)])
    event = accepted.event
    if event is None:
        raise Violation("the first unit is not sold")
    scene.ledger.record({0: 0}, {0: 1}, [event])
    scene.redis.become(before)
    scene.write(scene.fence())
    scene.redis.release("first")
    scene.redis.settle([(accepted.entry, event)])
    scene.record(scene.buy("second"))
    scene.judge()


def the_server_forgets_its_failovers(rules: Rules) -> None:
    """Redis fails over and back, loses a unit, and is without replicas for an hour."""
    scene = Scene(rules, stock=1)
    before = scene.redis.keys.copy()
    first = scene.buy("first")
    scene.redis.become(before, restarted=False)
    scene.buy("meanwhile")
    scene.redis.forget_replication()
    second = scene.buy("second")
    scene.record(second)
    scene.record(first)
    scene.judge()


def redis_is_flushed_while_a_rebuild_waits(rules: Rules) -> None:
    """The second flush deletes the heartbeat of a pod that has an unacknowledged event."""
    scene = Scene(rules, stock=1)
    redis, world = scene.redis, scene.world
    first = scene.buy("first")
    redis.become(Keys(), restarted=False, demoted=False)
    claim, began, sampled_from = scene.fence(), world.now, redis.clock + SETTLED_BEFORE
    world.now += EXPIRY - 1
    redis.keys.heartbeats["api"] = Heartbeat(1, redis.clock, redis.stamp)
    world.now += 0.9
    redis.become(Keys(), restarted=False, demoted=False)
    world.now += 0.2
    goes_on = redis.mark_rebuild(claim, LEASE, again=True)
    if goes_on and not scene.operator.unpublished(began, sampled_from):
        scene.write(claim)
    second = scene.buy("second")
    scene.record(second)
    scene.record(first)
    scene.judge()


def a_standby_lacks_a_restock(rules: Rules) -> None:
    """PostgreSQL fails over without a restock, whose revision a rebuild then takes again."""
    scene = Scene(rules, stock=1)
    scene.declare(2)
    cut_off = scene.buy("cut off", promised=False)
    scene.ledger.rewind(oldest=True)
    scene.redis.become(Keys())
    scene.write(scene.fence())
    scene.declare(2)
    events = [scene.buy("first"), scene.buy("second")]
    scene.record(cut_off)
    scene.record(*events)
    scene.judge()


def an_older_copy_is_republished(rules: Rules) -> None:
    """Redis returns as an older copy. A person closes the sale and publishes its records again."""
    scene = Scene(rules, stock=1)
    scene.buy("cut off", promised=False)
    older = scene.redis.keys.copy()
    scene.redis.become(Keys())
    scene.write(scene.fence())
    first = scene.buy("first")
    scene.redis.become(older)
    scene.declare(1, "closed")
    scene.record(*scene.redis.republish())
    scene.record(first)
    scene.judge()


def a_pod_used_the_clock_of_the_former_server(rules: Rules) -> None:
    """Redis fails over while a pod sends a heartbeat. The former server's clock was ahead."""
    scene = Scene(rules, stock=1)
    redis, world = scene.redis, scene.world
    redis.run_id = CLOCK_AHEAD
    scene.declare(2)
    scene.write(scene.fence())
    before = redis.keys.copy()
    heartbeat = Heartbeat(0, redis.clock, redis.stamp)
    events = [scene.buy("first"), scene.buy("second")]
    redis.become(before)
    redis.run_id = CLOCK_BEHIND
    claim, began, sampled_from = scene.fence(), world.now, redis.clock + SETTLED_BEFORE
    redis.keys.heartbeats["api"] = heartbeat
    world.now += EXPIRY + 0.05
    if scene.operator.unpublished(began, sampled_from):
        scene.record(*events)  # the pod publishes before its next heartbeat says that it holds none
    scene.write(claim)
    later = [scene.buy("third"), scene.buy("fourth")]
    scene.record(*later)
    scene.record(*events)
    scene.judge()


def redis_is_an_older_copy_in_the_same_run(rules: Rules) -> None:
    """The engine returns to a Redis that it has left, which still has its former run."""
    scene = Scene(rules, stock=2)
    scene.record(scene.buy("first"))
    former = scene.redis.keys.copy()
    scene.record(scene.buy("second"))
    scene.redis.keys = former
    scene.operator.begin()
    scene.world.run(30.0)
    scene.record(scene.buy("third"))
    scene.judge()


SCHEDULES: Final[dict[str, Callable[[Rules], None]]] = {
    "settle_matches_version": a_late_settlement_meets_a_release,
    "fence_latched": the_server_forgets_its_failovers,
    "lost_mark_ends_rebuild": redis_is_flushed_while_a_rebuild_waits,
    "operator_commits_kept": a_standby_lacks_a_restock,
    "fenced_not_republished": an_older_copy_is_republished,
    "heartbeats_of_this_run": a_pod_used_the_clock_of_the_former_server,
    "ledger_knows_more": redis_is_an_older_copy_in_the_same_run,
}
"""The schedule of each part that has one."""
