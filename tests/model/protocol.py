"""A discrete-event model of the whole protocol, with faults between any two steps.

Every process can be killed, suspended or disconnected. Every server can be down, return as an older
copy, or be empty. The model's classes stand for these modules:

    redis.Redis        src/flashsale/lua: reserve, settle, apply, close, and a rebuild's scripts in
                       short; a server's durability. `release` exists only in the model.
    ledger.Ledger      flashsale_consumer/recorder.py, the writes of
                       flashsale_operator/sales/reconciler.py and rebuild.py
    kafka.Kafka        the topic: partitions with duplicates and without a common order
    pods.Pod           flashsale_api/batcher.py, publisher.py, sweeper.py, heartbeat.py
    consumers.Consumer flashsale_consumer/worker.py
    operators.Operator flashsale_operator/sales: decision.py, reconciler.py, rebuild.py, drain.py
    rules.Rules        the parts that a run can leave out
    schedules          short schedules, for parts that random runs need too rarely

A run has one sale of few units, few users and thirty seconds of faults. Then everything comes back,
and the system must come to rest and agree. A seed always gives the same run. A violation carries
the trace of its run.
"""

from collections.abc import Callable

from tests.model.consumers import Consumer
from tests.model.kafka import PARTITIONS, Kafka
from tests.model.ledger import Ledger
from tests.model.operators import Operator
from tests.model.pods import Pod, Servers, buy
from tests.model.redis import MAX_PER_USER, Keys, Redis, Request, held_by
from tests.model.rules import EXPIRY, Rules
from tests.model.world import Process, Steps, Violation, World

FAULT_SECONDS = 30.0
REST_SECONDS = 200.0
USERS = 12


class Run:
    """The world of a seed, its faults and its verdict."""

    def __init__(self, seed: int, rules: Rules, *, tracing: bool = False) -> None:
        world = self.world = World(seed, rules, tracing=tracing)
        redis = Redis(world, always=world.chance() < 0.3)
        self.servers = Servers(redis, Kafka(world), Ledger(world), 2 + int(world.chance() * 5))
        world.oracle.highest_stock = self.servers.stock
        self.pods = [Pod(world, f"api-{n}", self.servers) for n in range(2)]
        self.consumers = [Consumer(world, f"consumer-{n}", self.servers) for n in range(2)]
        self.operator = Operator(world, "operator", self.servers, every=(0.5, 2.0))
        # A person who uses flashsalectl.
        self.person = Operator(world, "person", self.servers, every=(5.0, 20.0))
        self._kinds = self._chosen()
        if world.chance() < 0.5:
            world.strike = self._strike

    def check(self) -> dict[str, int]:
        """Runs the seed and returns counts of what happened. Raises `Violation`."""
        world = self.world
        for process in (*self.pods, *self.consumers, self.operator, self.person):
            process.begin()
        self._rebalance()
        world.later(0.0, self._crowd())
        world.later(0.0, self._owner())
        world.later(0.0, self._trouble())
        world.run(FAULT_SECONDS)
        self._heal()
        if not world.run(FAULT_SECONDS + REST_SECONDS, self._at_rest):
            raise Violation(f"does not come to rest: {self._unrest()}")
        self._judge()
        return world.oracle.counts

    # Buyers, the owner and faults.

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
        request = Request(f"r{number}", f"u{int(world.chance() * USERS)}", _quantity(world))
        keyed = world.chance() < 0.6
        world.later(0, buy(world, self.pods, request, keyed=keyed))
        if keyed and world.chance() < 0.1:  # the same key with another quantity
            other = request._replace(quantity=3 - request.quantity)
            world.later(world.between(0, 3), buy(world, self.pods, other, keyed=True))

    def _trouble(self) -> Steps:
        """Makes a few faults, often one right after another."""
        world = self.world
        while True:
            yield world.between(0.02, 1.0) if world.chance() < 0.4 else world.between(3.0, 15.0)
            if world.now >= FAULT_SECONDS:
                return
            self._kinds[int(world.chance() * len(self._kinds))]()

    def _strike(self, process: Process | None) -> Steps:
        """Kills or suspends a process, or kills all pods, and often hits Redis right after that."""
        world = self.world
        if world.now >= FAULT_SECONDS:
            return
        if process is None:
            for pod in self.pods:
                pod.crash(world.between(0.5, 8.0))
            return
        seconds = self._short_or_long()
        if world.chance() < 0.4:
            process.crash(world.between(0.5, 8.0))
        else:
            process.suspend(seconds)
            if isinstance(process, Operator) and world.chance() < 0.4:
                yield seconds - 0.05  # just before it resumes, so that it has not noticed
                if world.now < FAULT_SECONDS:
                    self._redis_emptied()
                return
        if world.chance() < 0.7:
            yield world.between(0.0, 0.6)
            if world.now < FAULT_SECONDS:
                lossy = (
                    self._redis_killed,
                    self._redis_older,
                    self._redis_emptied,
                    self._redis_failed_over,
                )
                lossy[int(world.chance() * len(lossy))]()

    def _owner(self) -> Steps:
        """Changes the stock, or closes the sale and applies the manifest again."""
        world, servers = self.world, self.servers
        for _ in range(int(world.chance() * 4)):
            yield world.between(1.0, 10.0)
            if world.chance() < 0.3:
                servers.state = "closed"
                world.log("owner", "closes the sale")
                yield world.between(0.1, 3.0)
                servers.state = "open"
            else:
                servers.stock = 2 + int(world.chance() * 7)
            world.oracle.highest_stock = max(world.oracle.highest_stock, servers.stock)
            world.log("owner", "wants", servers.stock, servers.state)

    def _chosen(self) -> list[Callable[[], None]]:
        """Chooses the faults of this run. Few kinds make each combination of two kinds frequent."""
        every = [
            self._pod_killed,
            self._pod_suspended,
            self._pod_cut_off,
            self._redis_killed,
            self._redis_killed,
            self._redis_older,
            self._redis_emptied,
            self._redis_failed_over,
            self._redis_promoted_again,
            self._kafka_stopped,
            self._ledger_stopped,
            self._ledger_rewound,
            self._consumer_killed,
            self._consumer_suspended,
            self._rebalanced,
            self._operator_killed,
            self._operator_suspended,
        ]
        self.world.random.shuffle(every)
        return every[: 2 + int(self.world.chance() * 5)]

    def _pod(self) -> Pod:
        return self.pods[int(self.world.chance() * len(self.pods))]

    def _consumer(self) -> Consumer:
        return self.consumers[int(self.world.chance() * len(self.consumers))]

    def _some_operator(self) -> Operator:
        return self.operator if self.world.chance() < 0.7 else self.person

    def _short_or_long(self) -> float:
        """Returns a duration well below or well above the lifetime of a heartbeat."""
        short = self.world.chance() < 0.5
        return self.world.between(0.3, EXPIRY / 2) if short else self.world.between(6.0, 20.0)

    def _pod_killed(self) -> None:
        self._pod().crash(self.world.between(0.5, 8.0))

    def _pod_suspended(self) -> None:
        self._pod().suspend(self._short_or_long())

    def _pod_cut_off(self) -> None:
        pod = self._pod()
        if pod.connected:
            pod.cut_off(self._short_or_long())

    def _redis_killed(self) -> None:
        redis = self.servers.redis
        keys = redis.keys if redis.always else redis.copy_of(1.0)
        self._redis_returns("is killed", keys, self.world.between(0.2, 3.0))

    def _redis_older(self) -> None:
        keys = self.servers.redis.copy_of(self.world.now)
        self._redis_returns("is an older copy", keys, self.world.between(0.5, 3.0))

    def _redis_emptied(self) -> None:
        redis = self.servers.redis
        if self.world.chance() < 0.5:
            self.world.log("redis", "is flushed")
            redis.become(Keys(), restarted=False, demoted=False)
        else:
            self._redis_returns("is new and empty", Keys(), self.world.between(0.5, 3.0))

    def _redis_failed_over(self) -> None:
        keys = self.servers.redis.copy_of(3.0)
        self._redis_returns("fails over", keys, self.world.between(0.1, 3.0))

    def _redis_promoted_again(self) -> None:
        """Demotes Redis, synchronises it with a replica that lagged, and promotes it again."""
        redis = self.servers.redis
        self.world.log("redis", "was demoted and is the primary again")
        redis.become(redis.copy_of(3.0), restarted=False)

        def forgets() -> Steps:
            """Has no replica for long enough. Some call always comes before."""
            redis.reserve(())
            self.world.log("redis", "forgets its replication id")
            redis.forget_replication()
            yield from ()

        if self.world.chance() < 0.5:
            self.world.later(self.world.between(0.5, 6.0), forgets())

    def _redis_returns(self, message: str, keys: Keys, seconds: float) -> None:
        redis = self.servers.redis
        if not redis.up:
            return
        self.world.log("redis", message, f"{seconds:.1f} s")
        redis.become(keys)
        redis.up = False

        def comes_back() -> Steps:
            redis.up = True
            yield from ()

        self.world.later(seconds, comes_back())

    def _kafka_stopped(self) -> None:
        self._down(self.servers.kafka, "kafka")

    def _ledger_stopped(self) -> None:
        self._down(self.servers.ledger, "ledger")

    def _down(self, server: Kafka | Ledger, name: str) -> None:
        seconds = self.world.between(0.5, 8.0)
        self.world.log(name, "is down for", f"{seconds:.1f} s")
        server.up = False

        def comes_back() -> Steps:
            server.up = True
            yield from ()

        self.world.later(seconds, comes_back())

    def _ledger_rewound(self) -> None:
        self.world.log("ledger", "is an older copy")
        self.servers.ledger.rewind()

    def _consumer_killed(self) -> None:
        self._consumer().crash(self.world.between(0.5, 8.0))
        self._rebalance()

    def _consumer_suspended(self) -> None:
        self._consumer().suspend(self.world.between(0.5, 15.0))
        self._rebalance()

    def _rebalanced(self) -> None:
        self._rebalance()

    def _operator_killed(self) -> None:
        self._some_operator().crash(self.world.between(0.5, 5.0))

    def _operator_suspended(self) -> None:
        self._some_operator().suspend(self.world.between(0.5, 20.0))

    def _rebalance(self) -> None:
        """Assigns the partitions to responsive consumers. A suspended one may still record."""
        living = [one for one in self.consumers if not one.suspended] or self.consumers
        for consumer in self.consumers:
            consumer.assign(())
        for number in range(PARTITIONS):
            member = living[int(self.world.chance() * len(living))]
            member.assign({*member.assigned, number})

    def _heal(self) -> None:
        self.world.log("everything", "recovers")
        servers = self.servers
        servers.redis.up = servers.kafka.up = servers.ledger.up = True
        for process in (*self.pods, *self.consumers, self.operator, self.person):
            process.resume()
        for pod in self.pods:
            pod.connected = True
        self._rebalance()

    # The verdict.

    def _unrest(self) -> list[str]:
        ledger, kafka = self.servers.ledger, self.servers.kafka
        found = {
            "a pod has work": not all(pod.idle for pod in self.pods),
            "the outbox has entries": bool(self.servers.redis.keys.outbox),
            "the ledger has not read the topic to its ends": ledger.tables.offsets != kafka.ends(),
            "the operator has work": not self.operator.settled,
        }
        return [name for name, is_so in found.items() if is_so]

    def _at_rest(self) -> bool:
        # Some buyers are still retrying before then.
        return self.world.now > FAULT_SECONDS + 20.0 and not self._unrest()

    def _judge(self) -> None:
        oracle, tables, keys = self.world.oracle, self.servers.ledger.tables, self._keys()
        row, recorded = tables.row, tables.reservations
        if row is None or keys.sale is None:
            raise Violation("the sale is gone")
        held = sum(held_by(recorded.values()).values())
        _must(
            held <= oracle.highest_stock,
            f"{held} units are recorded and not released, of {oracle.highest_stock} for sale",
        )
        for user, units in held_by(recorded.values()).items():
            _must(units <= MAX_PER_USER, f"{user} has {units} units in the ledger")
        for (reservation_id, version), quantity in oracle.promised.items():
            found = recorded.get(reservation_id)
            kept = found is not None and found.version >= version and found.quantity == quantity
            if not kept:
                where = "refused" if reservation_id in tables.refused else "not in the ledger"
                _must(
                    oracle.excused((reservation_id, version)),
                    f"{reservation_id} (version {version}, {quantity} units) was promised, but is "
                    f"{found or where}. Lost by Redis: "
                    f"{(reservation_id, version) in oracle.lost}, its pod killed or disconnected: "
                    f"{(reservation_id, version) in oracle.orphaned}",
                )
                oracle.counts["excused"] += 1
        units = sum(event.quantity for event in recorded.values())
        _must(
            row.accepted == units,
            f"the ledger counts {row.accepted} of {units} recorded units",
        )
        sale = keys.sale
        _must(
            (sale.accepted, sale.released) == (row.accepted, row.released),
            f"accepted and released are {sale.accepted} and {sale.released} in Redis, "
            f"but {row.accepted} and {row.released} in the ledger",
        )
        _must(keys.reservations == recorded, "the reservations of Redis and the ledger differ")
        _must(
            {user: units for user, units in keys.buyers.items() if units}
            == {user: units for user, units in held_by(recorded.values()).items() if units},
            "the buyers of Redis and the ledger differ",
        )
        _must(
            sale.state == "closed"  # closing does not change the allocation
            or sale.allocated == max(row.allocated, sale.accepted - sale.released),
            f"{sale.allocated} units are allocated, but {row.allocated} are declared",
        )

    def _keys(self) -> Keys:
        return self.servers.redis.keys


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


def _must(holds: bool, violation: str) -> None:
    if not holds:
        raise Violation(violation)


def _quantity(world: World) -> int:
    return 1 if world.chance() < 0.7 else 2
