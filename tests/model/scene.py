"""A scene for short schedules: a sale of few units, in which a schedule makes each call."""

from dataclasses import dataclass
from typing import Final

from tests.model.kafka import Kafka
from tests.model.ledger import Ledger
from tests.model.operators import Operator
from tests.model.pods import Asked, Ordered, Pod, Servers
from tests.model.records import Event, Request, Stamp, units_by_user
from tests.model.redis import Redis
from tests.model.rules import EXPIRY, SETTLED_BEFORE, Rules
from tests.model.verdict import judge_counts
from tests.model.world import Violation, World

LEASE: Final = 60.0


@dataclass(frozen=True, slots=True)
class Fence:
    """A rebuild that has begun."""

    claim: int
    stamp: Stamp
    began: float
    sampled_from: float


class Scene:
    """Servers without consumers, and with pods only if a schedule starts them.

    Each random choice is the middle: no fault happens unless the schedule makes it.
    """

    def __init__(
        self,
        rules: Rules,
        stock: int,
        *,
        hold: float | None = None,
        outbox_limit: int = 1000,
    ) -> None:
        self.world = World(1, rules)
        self.world.chance = lambda: 0.5
        self.redis = Redis(self.world, always=True, outbox_limit=outbox_limit)
        self.kafka = Kafka(self.world)
        self.ledger = Ledger(self.world)
        self.servers = Servers(self.redis, self.kafka, self.ledger, stock, hold=hold)
        self.operator = Operator(self.world, "operator", self.servers, every=(0.5, 2.0))
        self.promised: list[str] = []
        self.declare(stock)

    def declare(self, stock: int, state: str = "open") -> None:
        """Writes the manifest to the ledger and then to Redis."""
        servers, oracle = self.servers, self.world.oracle
        servers.stock, servers.state = stock, state
        oracle.highest_stock = max(oracle.highest_stock, stock)
        sale = self.redis.keys.sale
        above = 0 if sale is None else sale.revision
        row, inserted = self.ledger.write_row(stock, state, servers.hold, above)
        if state == "closed":
            self.redis.close(row.revision)
        else:
            self.redis.apply(row, seed=inserted)

    def pod(self) -> Pod:
        """Starts a pod."""
        pod = Pod(self.world, "api", self.servers)
        pod.begin()
        return pod

    def wait(self, seconds: float) -> None:
        self.world.run(self.world.now + seconds)

    # Calls of a pod that is killed before Kafka has its events.

    def buy(self, name: str, *, user: str = "", promised: bool = True) -> Event | None:
        """Reserves a unit. The pod is lost before Kafka has the event unless it is `promised`."""
        [answer] = self.redis.reserve([Request(name, user or f"user of {name}", 1)])
        if answer.outcome == "accepted" and promised:
            self.promised.append(name)
        return answer.event if answer.outcome == "accepted" else None

    def confirm(self, name: str, order: str = "order") -> tuple[int, Event]:
        """Confirms a hold, and returns the outbox entry and the event."""
        answer = self.redis.confirm(name, order)
        if answer.event is None:
            raise Violation(f"a confirmation of {name} is answered {answer.outcome}")
        return answer.entry, answer.event

    def cancel(self, name: str, order: str | None = None) -> tuple[int, Event]:
        """Cancels a reservation, and returns the outbox entry and the event."""
        answer = self.redis.cancel(name, order)
        if answer.event is None:
            raise Violation(f"a cancellation of {name} is answered {answer.outcome}")
        return answer.entry, answer.event

    def expire(self, seconds: float) -> list[Event]:
        """Waits until holds of `seconds` are due, and expires them."""
        self.world.now += 2 * seconds
        return [answer.event for answer in self.redis.expire(3) if answer.event is not None]

    # Kafka, the ledger and a rebuild.

    def record(self, *events: Event | None) -> None:
        """Lets Kafka and the ledger have the events in one batch, and settles them."""
        found = [event for event in events if event is not None]
        self.ledger.record({}, {}, found)
        self.kafka.announce(self.ledger.news({event.reservation_id for event in found}))
        entries = [(entry, event) for entry, (event, _) in self.redis.keys.outbox.items()]
        self.redis.settle(held for held in entries if held[1] in found)

    def sweep(self) -> None:
        """Lets Kafka and the ledger have every event in the outbox, and settles them."""
        self.record(*[event for event, _ in self.redis.keys.outbox.values()])

    def read_kafka(self) -> None:
        """Lets the ledger read every event that Kafka has."""
        offsets = self.ledger.tables.offsets
        for number, partition in enumerate(self.kafka.partitions):
            self.ledger.record({}, {number: len(partition)}, partition[offsets[number] :])

    def fence(self) -> Fence:
        """Begins a rebuild."""
        sale, redis = self.redis.keys.sale, self.redis
        claim = self.ledger.claim(0 if sale is None else sale.revision)
        redis.mark_rebuild(claim, redis.stamp, LEASE, recorded=self.ledger.progress())
        return Fence(claim, redis.stamp, self.world.now, redis.clock + SETTLED_BEFORE)

    def finish(self, fence: Fence) -> None:
        """Ends a rebuild whose wait is over."""
        read = self.ledger.read_for_rebuild(fence.claim, self.ledger.tables.offsets)
        if read is None:
            raise Violation("the ledger refuses the rebuild")
        row, reservations = read
        self.redis.fill_rebuild(fence.claim, reservations)
        self.redis.finish_rebuild(fence.claim, row, fence.stamp, len(reservations))

    def rebuild(self) -> None:
        """Rebuilds the sale, without any pod that is heard of."""
        fence = self.fence()
        self.wait(EXPIRY + 1.0)
        if self.operator.unpublished(fence.began, fence.sampled_from):
            raise Violation("the rebuild has a reason to wait")
        self.read_kafka()
        self.finish(fence)

    def judge(self) -> None:
        """Raises `Violation` if a promise is broken or the ledger has too many units."""
        oracle, recorded = self.world.oracle, self.ledger.tables.reservations
        for name in self.promised:
            if name not in recorded:
                raise Violation(f"{name} was promised, and the ledger refused it")
        for name in oracle.cancelled:
            if not recorded[name].final:
                raise Violation(f"{name} was cancelled, but is {recorded[name]}")
        if sum(units_by_user(recorded.values()).values()) > oracle.highest_stock:
            raise Violation(f"more than {oracle.highest_stock} units are recorded and not released")
        if self.ledger.tables.row is not None:
            judge_counts(self.ledger.tables.row, self.ledger.tables)
        for news in self.ledger.news({*recorded, *self.ledger.tables.refused}):
            received = self.kafka.received.get(news.reservation_id, news)
            if received != news:
                raise Violation(f"the ledger has {news}, but the receiver {received}")


def ask_again(pod: Pod, name: str) -> None:
    """Repeats the request of a reservation at a pod."""
    pod.ask(Asked(Request(name, f"user of {name}", 1)))


def order(pod: Pod, verb: str, name: str) -> Ordered:
    """Starts a call of the order service at a pod."""
    ordered = Ordered(verb, name, "order")
    pod.order(ordered)
    return ordered
