"""A discrete-event model of the whole protocol, with faults between any two steps.

Every process can be killed, suspended or disconnected. Every server can be down, return as an older
copy, or be empty. The model's modules stand for these parts of the code:

    redis       src/flashsale/lua: reserve, confirm, cancel, expire, settle, apply, close, free,
                and a rebuild's scripts in short
    server      a Redis server: its run, its clock, its durability; src/flashsale/lua/sale.lua
    ledger      flashsale_consumer/recorder.py, the writes of
                flashsale_operator/sales/reconciler.py and rebuild.py
    kafka       the topics: partitions with duplicates and without a common order
    pods        flashsale_api/batcher.py, publisher.py, sweeper.py, heartbeat.py, the order port
    consumers   flashsale_consumer/worker.py
    operators   flashsale_operator/sales: decision.py, reconciler.py, rebuild.py, drain.py
    callers     buyers, and the order service of the shop
    rules       the parts that a run can leave out
    faults      the kinds of faults
    verdict     the statements that hold in the end
    schedules, hold_schedules
                short schedules, for parts that random runs need too rarely

A run has one sale of few units, few users and forty seconds of faults. Then everything comes back,
and the system must come to rest and agree. A seed always gives the same run. A violation carries
the trace of its run.
"""

from tests.model.callers import buy
from tests.model.consumers import Consumer
from tests.model.faults import FAULT_SECONDS, Faults
from tests.model.kafka import Kafka
from tests.model.ledger import Ledger
from tests.model.operators import Operator
from tests.model.pods import Pod, Servers
from tests.model.records import Request
from tests.model.redis import Redis
from tests.model.rules import Rules
from tests.model.verdict import judge
from tests.model.world import Steps, Violation, World

REST_SECONDS = 300.0
PATIENCE_SECONDS = 25.0
"""How long after the faults most callers still repeat their calls."""
USERS = 12
HOLDS = (None, 2.0, 4.0, 8.0, 20.0)
"""Lengths of holds, in seconds. Without a length there are no holds."""


class Run:
    """The world of a seed, its faults and its verdict."""

    def __init__(self, seed: int, rules: Rules, *, tracing: bool = False) -> None:
        world = self.world = World(seed, rules, tracing=tracing)
        world.aimed = world.chance() < 0.4
        limit = 3 if world.chance() < 0.15 else 1000
        redis = Redis(world, always=world.chance() < 0.3, outbox_limit=limit)
        redis.strict = rules.fence and rules.release_when_acknowledged and world.chance() < 0.2
        stock = 2 + int(world.chance() * (5 if world.chance() < 0.5 else 12))
        hold = HOLDS[int(world.chance() * len(HOLDS))]
        if world.aimed and hold is None:
            hold = 4.0
        self.servers = Servers(redis, Kafka(world), Ledger(world), stock, hold=hold)
        world.oracle.highest_stock = stock
        self.pods = [Pod(world, f"api-{n}", self.servers) for n in range(2)]
        self.consumers = [Consumer(world, f"consumer-{n}", self.servers) for n in range(2)]
        self.operator = Operator(world, "operator", self.servers, every=(0.5, 2.0))
        # A person who uses flashsalectl.
        self.person = Operator(world, "person", self.servers, every=(5.0, 20.0))
        operators = (self.operator, self.person)
        self.faults = Faults(world, self.servers, self.pods, self.consumers, operators)

    def check(self) -> dict[str, int]:
        """Runs the seed and returns counts of what happened. Raises `Violation`."""
        world = self.world
        for process in (*self.pods, *self.consumers, self.operator, self.person):
            process.begin()
        self.faults.rebalance()
        world.later(0.0, self._crowd())
        world.later(0.0, self._owner())
        world.later(0.0, self.faults.happen())
        world.run(FAULT_SECONDS)
        self._heal()
        if not world.run(FAULT_SECONDS + REST_SECONDS, self._at_rest):
            raise Violation(f"does not come to rest: {self._unrest()}")
        judge(world.oracle, self.servers)
        return world.oracle.counts

    def _crowd(self) -> Steps:
        world = self.world
        number = 0
        while world.now < FAULT_SECONDS:
            # Crowds alternate with pauses.
            for _ in range(1 + int(world.chance() * 8)):
                number += 1
                self._buyer(number)
                yield world.between(0.0, 0.1)
            yield world.between(0.2, 5.0)

    def _buyer(self, number: int) -> None:
        world = self.world
        user, order = f"u{int(world.chance() * USERS)}", f"order {number}"
        request = Request(f"r{number}", user, 1 if world.chance() < 0.7 else 2)
        keyed, hold = world.chance() < 0.6, self.servers.hold or 5.0
        world.later(0, buy(world, self.pods, request, keyed=keyed, order=order, hold=hold))
        if keyed and world.chance() < 0.1:  # the same key with another quantity
            other = request._replace(quantity=3 - request.quantity)
            again = buy(world, self.pods, other, keyed=True, order=order, hold=hold)
            world.later(world.between(0, 3), again)

    def _owner(self) -> Steps:
        """Changes the stock or the holds, or closes the sale and applies the manifest again."""
        world, servers = self.world, self.servers
        closes = world.chance() < 0.25
        for _ in range(int(world.chance() * 4)):
            yield world.between(1.0, 10.0)
            if world.chance() < 0.3:
                servers.state = "closed"
                world.log("owner", "closes the sale")
                yield world.between(0.1, 3.0)
                servers.state = "open"
            elif world.chance() < 0.15:
                servers.hold = None if servers.hold else 5.0
            else:
                servers.stock = 2 + int(world.chance() * 7)
            world.oracle.highest_stock = max(world.oracle.highest_stock, servers.stock)
            world.log("owner", "wants", servers.stock, servers.state, servers.hold)
        if closes:
            yield world.between(0.0, 15.0)
            servers.state = "closed"
            world.log("owner", "closes the sale for good")

    def _heal(self) -> None:
        self.world.log("everything", "recovers")
        servers = self.servers
        servers.redis.up = servers.kafka.up = servers.ledger.up = True
        for process in (*self.pods, *self.consumers, self.operator, self.person):
            process.resume()
        for pod in self.pods:
            pod.connected = True
        self.faults.rebalance()

    def _unrest(self) -> list[str]:
        redis, ledger, kafka = self.servers.redis, self.servers.ledger, self.servers.kafka
        tables = ledger.tables
        found = {
            "a pod has work": not all(pod.idle for pod in self.pods),
            "the outbox has entries": bool(redis.keys.outbox),
            "a hold is open": bool(redis.keys.holds or (tables.row and tables.row.held)),
            "the ledger has not read the topic to its ends": tables.offsets != kafka.ends(),
            "recorded events are not announced": tables.announced != kafka.ends(),
            "the operator has work": not self.operator.settled,
        }
        return [name for name, is_so in found.items() if is_so]

    def _at_rest(self) -> bool:
        return self.world.now > FAULT_SECONDS + PATIENCE_SECONDS and not self._unrest()


def check(seed: int, rules: Rules) -> dict[str, int]:
    """Runs a seed. A `Violation` carries the trace of the run."""
    try:
        return Run(seed, rules).check()
    except Violation:
        run = Run(seed, rules, tracing=True)
        try:
            run.check()
        except Violation as violation:
            trace = "\n".join(run.world.trace or ())
            raise Violation(f"seed {seed}: {violation}\n\n{trace}") from None
        raise
