"""Schedules of faults. A seed determines a schedule."""

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

SECONDS: Final = 10.0
"""How long the crowd buys under faults, before everything is repaired."""


class Redis(StrEnum):
    """The kinds of Redis that a schedule can have."""

    ONE = "one"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Kind(StrEnum):
    """The kinds of faults. `tests/faults/world.py` implements them."""

    API_KILL = "kill -9 of an API"
    API_FREEZE = "an API frozen"
    CONSUMER_KILL = "kill -9 of a consumer"
    CONSUMER_FREEZE = "a consumer frozen"
    OPERATOR_KILL = "kill -9 of the operator"
    OPERATOR_FREEZE = "the operator frozen"
    KAFKA_KILL = "kill -9 of Kafka"
    KAFKA_RESTART = "Kafka restarted"
    KAFKA_FREEZE = "Kafka frozen"
    POSTGRES_KILL = "kill -9 of PostgreSQL"
    POSTGRES_RESTART = "PostgreSQL restarted"
    POSTGRES_FREEZE = "PostgreSQL frozen"
    POSTGRES_READ_ONLY = "PostgreSQL read-only"
    REDIS_KILL = "kill -9 of Redis"
    REDIS_RESTART = "Redis restarted"
    REDIS_FREEZE = "Redis frozen"
    REDIS_POWER_CUT = "Redis' machine loses power"
    REDIS_FLUSH = "FLUSHALL"
    REDIS_OLDER_COPY = "an older copy of Redis' files"
    REDIS_FAILOVER = "failover to a replica that lags"
    REDIS_AND_BACK = "failover to a replica that lags, and back"
    REDIS_TWO_LOST = "two of three nodes of Redis killed, and their replicas promoted by hand"
    REDIS_FORCED = "failover by force, while the primary sells"
    REDIS_PARTITION = "a node of Redis cut off from the others, and replaced"
    REDIS_SLOT_MOVED = "the slot of the sale moved to another node"
    CUT_REDIS = "connections cut before Redis' replies"
    CUT_POSTGRES = "connections cut before PostgreSQL's replies"
    CUT_KAFKA = "connections to Kafka cut"
    DUPLICATES = "the topic repeated out of order"
    RESTOCK = "more stock"
    SHORTEN = "less stock"
    PAUSE = "the sale paused"
    DELETE_AND_APPLY = "the sale deleted and applied again"
    END = "the sale ended"
    FLOOD = "a flood of buyers"
    ISSUER_AWAY = "the issuer's keys unreachable"


LOSES_IN_REDIS: Final = frozenset(
    {
        Kind.REDIS_POWER_CUT,
        Kind.REDIS_FLUSH,
        Kind.REDIS_OLDER_COPY,
        Kind.REDIS_FAILOVER,
        Kind.REDIS_AND_BACK,
        Kind.REDIS_TWO_LOST,
        Kind.REDIS_FORCED,
        Kind.REDIS_PARTITION,
    }
)
"""After these faults, Redis may lack reservations that it has answered. A power cut loses the last
second with `everysec`, and nothing with `always`.
"""

CLUSTER_ONLY: Final = frozenset(
    {Kind.REDIS_TWO_LOST, Kind.REDIS_FORCED, Kind.REDIS_PARTITION, Kind.REDIS_SLOT_MOVED}
)
"""These faults need a Redis Cluster."""
REPLICA_ONLY: Final = frozenset({Kind.REDIS_FAILOVER, Kind.REDIS_AND_BACK})
"""These faults need a replica."""
ON_TOP: Final = frozenset({Kind.FLOOD, Kind.ISSUER_AWAY, Kind.END})
"""These faults come on top of the others. A second sequence of random numbers selects them."""
_FREEZES: Final = {
    # Some are longer than the life of a heartbeat (5 s), so that a rebuild must go on without the
    # pod.
    Kind.API_FREEZE: (0.3, 8.0),
    Kind.CONSUMER_FREEZE: (0.3, 8.0),
    Kind.OPERATOR_FREEZE: (1.0, 12.0),
    Kind.KAFKA_FREEZE: (0.5, 6.0),
    Kind.POSTGRES_FREEZE: (0.5, 6.0),
    # Sentinel promotes the replica after 1.5 s.
    Kind.REDIS_FREEZE: (0.2, 2.5),
}


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """One fault, `at` seconds after the start of the crowd, for `seconds`.

    `which` selects one of two processes. The unit of `amount` depends on the kind: units of stock,
    records, connections or buyers.
    """

    at: float
    kind: Kind
    seconds: float = 0.0
    which: int = 0
    amount: int = 0

    def __str__(self) -> str:
        words = [f"{self.at:5.2f} s  {self.kind}"]
        if self.kind.name.startswith(("API_", "CONSUMER_")):
            words.append(f"number {self.which + 1}")
        if self.amount:
            words.append(f"of {self.amount}")
        if self.seconds:
            words.append(f"for {self.seconds:.2f} s")
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A sale and its faults. `always` is the appendfsync of Redis, otherwise it is everysec.

    `hold_seconds` is None for a sale whose reservations are confirmed at once. If `tokens`, the
    API takes the buyers from tokens of an issuer, and otherwise from the body.
    """

    seed: int
    redis: Redis
    tokens: bool
    always: bool
    stock: int
    max_per_user: int
    users: int
    steps: tuple[Step, ...]
    hold_seconds: int | None = None

    def __str__(self) -> str:
        head = (
            f"seed {self.seed}, {self.name}: {self.stock} units, {self.max_per_user} per user, "
            f"{self.users} users, appendfsync {'always' if self.always else 'everysec'}"
            + (f", held for {self.hold_seconds} s" if self.hold_seconds else "")
        )
        return "\n".join([head, *(f"  {step}" for step in self.steps)])

    @property
    def name(self) -> str:
        """The kind of Redis, and `tokens` or `userId`."""
        return f"{self.redis}, {'tokens' if self.tokens else 'userId'}"

    @property
    def deletes(self) -> bool:
        """Whether the sale is deleted and applied again."""
        return any(step.kind is Kind.DELETE_AND_APPLY for step in self.steps)


def kinds(redis: Redis) -> list[Kind]:
    """Return the kinds of faults, which depend on the kind of Redis."""
    impossible = {
        Redis.ONE: CLUSTER_ONLY | REPLICA_ONLY,
        Redis.SENTINEL: CLUSTER_ONLY,
        Redis.CLUSTER: frozenset[Kind](),
    }[redis]
    return [kind for kind in Kind if kind not in impossible]


def schedule(seed: int, redis: Redis | None = None) -> Schedule:
    """Return the schedule of a seed, which also selects the kind of Redis unless it is given."""
    chance, on_top = random.Random(seed), random.Random(f"buyers {seed}")
    selected = on_top.choices(list(Redis), weights=(1, 2, 2))[0]
    redis = redis or selected
    tokens = on_top.random() < 0.5
    every = [kind for kind in kinds(redis) if kind not in ON_TOP]
    of_redis = [kind for kind in every if kind.name.startswith("REDIS_")]
    steps = [_step(chance, kind) for kind in chance.sample(every, chance.randint(2, 5))]
    if not any(step.kind in of_redis for step in steps) and chance.random() < 0.5:
        steps.append(_step(chance, chance.choice(of_redis)))
    if on_top.random() < 0.4:
        steps.append(_step(on_top, Kind.FLOOD))
    if tokens and on_top.random() < 0.4:
        steps.append(_step(on_top, Kind.ISSUER_AWAY))
    if on_top.random() < 0.2 and all(step.kind is not Kind.DELETE_AND_APPLY for step in steps):
        steps.append(_step(on_top, Kind.END))
    return Schedule(
        seed=seed,
        redis=redis,
        tokens=tokens,
        always=chance.random() < 0.4,
        stock=chance.choice((60, 300, 1_000, 5_000)),
        max_per_user=chance.choice((1, 2, 5)),
        users=chance.choice((50, 400, 3_000)),
        steps=tuple(sorted(steps)),
        hold_seconds=chance.choice((None, 1, 2, 4)),
    )


def _step(chance: random.Random, kind: Kind) -> Step:
    amount = 0
    match kind:
        case Kind.RESTOCK:
            amount = chance.randint(10, 500)
        case Kind.SHORTEN:
            amount = chance.randint(10, 200)
        case Kind.DUPLICATES:
            amount = chance.randint(10, 400)
        case Kind.CUT_REDIS | Kind.CUT_POSTGRES:
            amount = chance.randint(1, 20)
        case Kind.FLOOD:
            amount = chance.randint(100, 400)
    low, high = _FREEZES.get(kind, (0.1, 3.0))
    return Step(
        at=round(chance.uniform(0.5, SECONDS - 1), 2),
        kind=kind,
        seconds=round(chance.uniform(low, high), 2),
        which=chance.randrange(2),
        amount=amount,
    )
