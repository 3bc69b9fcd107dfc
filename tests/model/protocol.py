"""The whole protocol as a discrete-event model: what every process does, step by step, with any
of them killed, suspended or cut off between any two steps, and any server down, back as an older
copy, or empty.

What stands for what:

    servers.Redis      src/flashsale/lua: reserve, settle, apply, close; release and the rebuild's
                       scripts as DESIGN.md and issue 6 describe them; a server's durability
    servers.Ledger     flashsale_consumer/recording.py, the row of flashsale_operator/sales/reconciler.py
    servers.Kafka      the topic: partitions, duplicates, no order between them
    processes.Pod      flashsale_api/batching.py, publishing.py, sweeping.py
    processes.Consumer flashsale_consumer/worker.py
    processes.Operator flashsale_operator/sales: decision.py, reconciler.py, rebuild.py, drain.py
    rules.Rules        the parts that can be left out

One sale of few units, few users and thirty seconds of faults; then everything comes back and the
system must come to rest and agree. One seed is one run, always the same. A violation shows what
happened, moment by moment.
"""

from collections.abc import Callable

from tests.model.processes import Consumer, Operator, Pod, Servers, buy
from tests.model.rules import EXPIRY, Rules
from tests.model.servers import (
    MAX_PER_USER,
    PARTITIONS,
    Kafka,
    Keys,
    Ledger,
    Redis,
    Request,
    held_by,
)
from tests.model.world import Process, Steps, Violation, World

FAULT_SECONDS = 30.0
REST_SECONDS = 200.0
USERS = 12


class Run:
    """One seed's world, its faults and its verdict."""

    def __init__(self, seed: int, rules: Rules, *, tracing: bool = False) -> None:
        world = self.world = World(seed, rules, tracing=tracing)
        redis = Redis(world, always=world.chance() < 0.3)
        self.servers = Servers(redis, Kafka(world), Ledger(world), 2 + int(world.chance() * 5))
        world.onlooker.highest_stock = self.servers.stock
        self.pods = [Pod(world, f"api-{n}", self.servers) for n in range(2)]
        self.consumers = [Consumer(world, f"consumer-{n}", self.servers) for n in range(2)]
        self.operator = Operator(world, "operator", self.servers, every=(0.5, 2.0))
        # A person with flashsalectl.
        self.person = Operator(world, "person", self.servers, every=(5.0, 20.0))
        self._kinds = self._chosen()
        if world.chance() < 0.5:
            world.strike = self._strike

    def check(self) -> dict[str, int]:
        """Runs it; raises `Violation`. Returns what was seen, to know that runs are not empty."""
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
        return world.onlooker.counts

    # What happens.

    def _crowd(self) -> Steps:
        world = self.world
        number = 0
        while world.now < FAULT_SECONDS:
            # Now a crowd, now nobody.
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
        if keyed and world.chance() < 0.1:  # the same key for another quantity
            other = request._replace(quantity=3 - request.quantity)
            world.later(world.between(0, 3), buy(world, self.pods, other, keyed=True))

    def _trouble(self) -> Steps:
        """A few faults, often one right after another."""
        world = self.world
        while True:
            yield world.between(0.02, 1.0) if world.chance() < 0.4 else world.between(3.0, 15.0)
            if world.now >= FAULT_SECONDS:
                return
            self._kinds[int(world.chance() * len(self._kinds))]()

    def _strike(self, process: Process | None) -> Steps:
        """Hits a process, or all pods, at that moment, and often Redis right after it."""
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
                yield seconds - 0.05  # so that it does not know yet
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
        """A restock, a lower stock, or a close and the same manifest applied again."""
        world, servers = self.world, self.servers
        for _ in range(int(world.chance() * 4)):
            yield world.between(1.0, 10.0)
            if world.chance() < 0.3:
                servers.state = "closed"
                world.tell("owner", "closes")
                yield world.between(0.1, 3.0)
                servers.state = "open"
            else:
                servers.stock = 2 + int(world.chance() * 7)
            world.onlooker.highest_stock = max(world.onlooker.highest_stock, servers.stock)
            world.tell("owner", "wants", servers.stock, servers.state)

    def _chosen(self) -> list[Callable[[], None]]:
        """The faults of this run: few kinds, so that each kind meets each other kind often."""
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
        """Well below what a heartbeat lives, or well above."""
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
            self.world.tell("redis", "is flushed")
            redis.become(Keys(), restarted=False)
        else:
            self._redis_returns("is new and empty", Keys(), self.world.between(0.5, 3.0))

    def _redis_failed_over(self) -> None:
        keys = self.servers.redis.copy_of(3.0)
        self._redis_returns("fails over", keys, self.world.between(0.1, 3.0))

    def _redis_promoted_again(self) -> None:
        """Demoted, synchronised with a replica that had lagged, promoted again: the same run."""
        redis = self.servers.redis
        self.world.tell("redis", "was away, and is the primary again")
        redis.become(redis.copy_of(3.0), restarted=False)

    def _redis_returns(self, what: str, keys: Keys, seconds: float) -> None:
        redis = self.servers.redis
        if not redis.up:
            return
        self.world.tell("redis", what, f"{seconds:.1f} s")
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
        self.world.tell(name, "is down for", f"{seconds:.1f} s")
        server.up = False

        def comes_back() -> Steps:
            server.up = True
            yield from ()

        self.world.later(seconds, comes_back())

    def _ledger_rewound(self) -> None:
        self.world.tell("ledger", "is an older copy")
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
        """Shares the partitions out to those that answer; another may be recording still."""
        living = [one for one in self.consumers if not one.suspended] or self.consumers
        for consumer in self.consumers:
            consumer.assign(())
        for number in range(PARTITIONS):
            member = living[int(self.world.chance() * len(living))]
            member.assign({*member.assigned, number})

    def _heal(self) -> None:
        self.world.tell("everything", "comes back")
        servers = self.servers
        servers.redis.up = servers.kafka.up = servers.ledger.up = True
        for process in (*self.pods, *self.consumers, self.operator, self.person):
            process.resume()
        for pod in self.pods:
            pod.connected = True
        self._rebalance()

    # What must be true in the end.

    def _unrest(self) -> list[str]:
        ledger, kafka = self.servers.ledger, self.servers.kafka
        found = {
            "a pod works": not all(pod.idle for pod in self.pods),
            "the outbox has entries": bool(self.servers.redis.keys.outbox),
            "the ledger has not read all": ledger.tables.offsets != kafka.ends(),
            "the operator has work": not self.operator.settled,
        }
        return [what for what, is_so in found.items() if is_so]

    def _at_rest(self) -> bool:
        # Buyers may still be on their way.
        return self.world.now > FAULT_SECONDS + 20.0 and not self._unrest()

    def _judge(self) -> None:
        onlooker, tables, keys = self.world.onlooker, self.servers.ledger.tables, self._keys()
        row, recorded = tables.row, tables.reservations
        if row is None or keys.sale is None:
            raise Violation("no sale is left")
        held = sum(held_by(recorded.values()).values())
        _must(
            held <= onlooker.highest_stock,
            f"{held} units are recorded and not released, {onlooker.highest_stock} were for sale",
        )
        for user, units in held_by(recorded.values()).items():
            _must(units <= MAX_PER_USER, f"{user} has {units} units in the ledger")
        for (reservation_id, version), quantity in onlooker.promised.items():
            found = recorded.get(reservation_id)
            kept = found is not None and found.version >= version and found.quantity == quantity
            if not kept:
                where = "refused" if reservation_id in tables.refused else "not in the ledger"
                _must(
                    onlooker.excused((reservation_id, version)),
                    f"{reservation_id} (version {version}, {quantity} units) was promised, and is "
                    f"{found or where}; lost by Redis: "
                    f"{(reservation_id, version) in onlooker.lost}, its pod cut off: "
                    f"{(reservation_id, version) in onlooker.orphaned}",
                )
                onlooker.counts["excused"] += 1
        units = sum(event.quantity for event in recorded.values())
        _must(row.accepted == units, f"the ledger counts {row.accepted} of {units} units")
        sale = keys.sale
        _must(
            (sale.accepted, sale.released) == (row.accepted, row.released),
            f"Redis has accepted and released {sale.accepted}, {sale.released}, "
            f"the ledger {row.accepted}, {row.released}",
        )
        _must(keys.reservations == recorded, "Redis and the ledger have other reservations")
        _must(
            {user: units for user, units in keys.buyers.items() if units}
            == {user: units for user, units in held_by(recorded.values()).items() if units},
            "Redis and the ledger have other buyers",
        )
        _must(
            sale.state == "closed"  # which a close does not touch
            or sale.allocated == max(row.allocated, sale.accepted - sale.released),
            f"{sale.allocated} units are allocated of {row.allocated} declared",
        )

    def _keys(self) -> Keys:
        return self.servers.redis.keys


def check(seed: int, rules: Rules) -> dict[str, int]:
    """Runs a seed; a `Violation` carries the run's trace."""
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


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Violation(otherwise)


def _quantity(world: World) -> int:
    return 1 if world.chance() < 0.7 else 2
