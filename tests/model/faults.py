"""Faults in the model: of which kinds, when, and of which server or process."""

from collections.abc import Callable

from tests.model.consumers import Consumer
from tests.model.kafka import Kafka
from tests.model.ledger import Ledger
from tests.model.operators import Operator
from tests.model.pods import Pod, Servers
from tests.model.records import PARTITIONS, Keys
from tests.model.rules import EXPIRY
from tests.model.world import Process, Steps, World

FAULT_SECONDS = 40.0


class Faults:
    """A few kinds of faults, at random moments and, in half of the runs, at critical ones."""

    def __init__(
        self,
        world: World,
        servers: Servers,
        pods: list[Pod],
        consumers: list[Consumer],
        operators: tuple[Operator, Operator],
    ) -> None:
        self.world = world
        self.servers = servers
        self.pods = pods
        self.consumers = consumers
        self.operators = operators
        self._kinds = self._chosen()
        if world.aimed:
            world.strike = self._strike_a_change
        elif world.chance() < 0.5:
            world.strike = self._strike

    def happen(self) -> Steps:
        """Makes a few faults, often one right after another."""
        world = self.world
        while True:
            if world.aimed:
                yield world.between(8.0, 25.0)
            elif world.chance() < 0.4:
                yield world.between(0.02, 1.0)
            else:
                yield world.between(3.0, 15.0)
            if world.now >= FAULT_SECONDS:
                return
            self._kinds[int(world.chance() * len(self._kinds))]()

    def _strike_a_change(self, process: Process | None) -> Steps:
        """Stops the pod that has just changed a reservation, and takes the change from Redis."""
        world = self.world
        if world.now >= FAULT_SECONDS:
            return
        if not isinstance(process, Pod):
            yield from self._strike(process)
            return
        if world.chance() < 0.7:
            process.suspend(world.between(7.0, 13.0))
        else:
            process.crash(world.between(0.5, 8.0))
        yield world.between(0.0, 0.3)
        if world.now < FAULT_SECONDS:
            self._redis_returns("fails over", self.servers.redis.copy_of(1.5), 0.2)

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
            self.rebalance,
            self._operator_killed,
            self._operator_suspended,
            self._republished,
        ]
        self.world.random.shuffle(every)
        return every[: 2 + int(self.world.chance() * 5)]

    def _pod(self) -> Pod:
        return self.pods[int(self.world.chance() * len(self.pods))]

    def _consumer(self) -> Consumer:
        return self.consumers[int(self.world.chance() * len(self.consumers))]

    def _some_operator(self) -> Operator:
        return self.operators[0 if self.world.chance() < 0.7 else 1]

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
        self.rebalance()

    def _consumer_suspended(self) -> None:
        self._consumer().suspend(self.world.between(0.5, 15.0))
        self.rebalance()

    def _operator_killed(self) -> None:
        self._some_operator().crash(self.world.between(0.5, 5.0))

    def _operator_suspended(self) -> None:
        self._some_operator().suspend(self.world.between(0.5, 20.0))

    def _republished(self) -> None:
        """A person publishes all records again."""
        redis, kafka = self.servers.redis, self.servers.kafka
        if redis.up and kafka.up:
            self.world.log("person", "publishes all records again")
            kafka.append(redis.republish())

    def rebalance(self) -> None:
        """Assigns the partitions to responsive consumers. A suspended one may still record."""
        living = [one for one in self.consumers if not one.suspended] or self.consumers
        for consumer in self.consumers:
            consumer.assign(())
        for number in range(PARTITIONS):
            member = living[int(self.world.chance() * len(living))]
            member.assign({*member.assigned, number})
