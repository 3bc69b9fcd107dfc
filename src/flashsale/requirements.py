"""The requirements of Redis, PostgreSQL and Kafka: one table, with a check for each line.

Every process checks its servers at the start, and `flashsalectl doctor` checks them all.
docs/install.md has the same table.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, Literal, TypeVar

from flashsale.errors import UnmetRequirement

F = TypeVar("F")

SLOTS: Final = 16_384
PARTITIONS: Final = 12
EVENT_RETENTION_MS: Final = 7 * 24 * 60 * 60 * 1000
PARTITION_BYTES: Final = 1024**3
"""Size of a partition from which on Kafka deletes its oldest segment.

With twelve partitions a topic keeps 25 million events of 500 bytes, more than any shop sells within
the retention time. Whatever is sent, its disk stays below 15 GiB per copy.
"""
SEGMENT_BYTES: Final = PARTITION_BYTES // 4
"""Kafka deletes whole segments, so a partition grows to the sum of both sizes."""
TIMESTAMP_TYPE: Final = "LogAppendTime"
"""Kafka dates records by its own clock. It deletes records by their age, and refuses future ones.

A pod whose clock is behind could otherwise have its records deleted unread, and one whose clock is
an hour ahead could publish nothing.
"""
BATCH_BYTES: Final = 256 * 1024
"""The size of a batch of events. A topic with a lower limit gets smaller batches."""


@dataclass(frozen=True)
class Requirement(Generic[F]):
    """A line of the table.

    - `rule` is the requirement in words.
    - `found` returns the server's state that breaks the rule, or None.
    - `remedy` fixes it.
    - A server that breaks a rule that is not `fatal` works, with less safety or speed.
    """

    server: str
    rule: str
    found: Callable[[F], str | None]
    remedy: str
    fatal: bool = True

    def check(self, facts: F, name: str = "") -> "Finding":
        """Returns the result of the check. `name` is that of one server of several."""
        found = self.found(facts)
        if found is None:
            return Finding(self.server, self.rule, "ok")
        server = f"{self.server} at {name}" if name else self.server
        line = f"{server} has {found}, but needs {self.rule}: {self.remedy}"
        return Finding(self.server, line, "failure" if self.fatal else "warning")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    server: str
    text: str
    verdict: Literal["ok", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """A Redis server's answers. None means that the server or the user's rights hide it."""

    version: str | None
    policy: str | None
    backlog_ttl: str | None
    appendonly: bool
    script_error: str
    """The error of INFO in a script, or nothing."""
    node: str = ""
    """The name of a primary of a cluster."""
    cluster: "ClusterFacts | None" = None

    @property
    def unread(self) -> set[str]:
        """The settings that the server or the user's rights hide."""
        found = {"maxmemory-policy": self.policy, "repl-backlog-ttl": self.backlog_ttl}
        if self.cluster:
            found |= {name: self.cluster.config.get(name) for name in _CLUSTER_SETTINGS}
        return {name for name, value in found.items() if value is None}


_CLUSTER_SETTINGS: Final = (
    "cluster-node-timeout",
    "cluster-require-full-coverage",
    "cluster-allow-reads-when-down",
    "min-replicas-to-write",
)


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """The answers of a primary of a cluster. `config` is empty if the user may not read it.

    `covered` counts the slots that have a primary by its view.
    """

    covered: int
    config: Mapping[str, str]
    replicas: int


@dataclass(frozen=True, slots=True)
class LedgerFacts:
    """A database's answers. `lacking` are the rights on its tables that the user does not have."""

    version: int
    encoding: str
    schema: str | None
    may_create: bool
    outdated: bool
    lacking: Sequence[str]


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """The topic of reservation events. `config` is empty if the user may not describe it."""

    partitions: int
    config: Mapping[str, str]


def _differs(setting: str, value: str | None, wanted: str) -> str | None:
    return None if value in (None, wanted) else f"{setting} {value}"


def _old_redis(facts: RedisFacts) -> str | None:
    major = (facts.version or "7").partition(".")[0]
    return f"version {facts.version}" if major.isdigit() and int(major) < 7 else None


def _number_below(config: Mapping[str, str], name: str, least: int) -> str | None:
    value = int(config.get(name, least))
    return f"{name}={value}" if 0 <= value < least else None


def _other_timestamps(facts: TopicFacts) -> str | None:
    found = facts.config.get("message.timestamp.type", TIMESTAMP_TYPE)
    return None if found == TIMESTAMP_TYPE else f"message.timestamp.type={found}"


def _of_cluster(
    found: Callable[[ClusterFacts], str | None],
) -> Callable[[RedisFacts], str | None]:
    """Makes a check of a cluster's node, which a single server meets."""
    return lambda facts: found(facts.cluster) if facts.cluster else None


def _cluster_setting(name: str, wanted: str) -> Callable[[RedisFacts], str | None]:
    return _of_cluster(lambda facts: _differs(name, facts.config.get(name), wanted))


def _slow_failover(facts: ClusterFacts) -> str | None:
    timeout = facts.config.get("cluster-node-timeout", "5000")
    return f"cluster-node-timeout {timeout}" if int(timeout) > 5000 else None


def _replicas(facts: ClusterFacts) -> str | None:
    least = facts.config.get("min-replicas-to-write")
    if least is None or int(least) == (facts.replicas >= 2):
        return None
    return f"min-replicas-to-write {least} with {facts.replicas} connected replicas"


_redis = partial(Requirement[RedisFacts], "Redis")
_redis_cluster = partial(Requirement[RedisFacts], "Redis Cluster")
_postgresql = partial(Requirement[LedgerFacts], "PostgreSQL")
_kafka = partial(Requirement[TopicFacts], "Kafka", fatal=False)

REDIS: Final = (
    _redis("version 7.0 or newer (Valkey 7.2 or newer)", _old_redis, "upgrade the server"),
    _redis(
        "INFO in scripts",
        lambda facts: f"no INFO in scripts ({facts.script_error})" if facts.script_error else None,
        "allow the user the command INFO, or use another server: Redis Enterprise, Redis Cloud and "
        "Azure Managed Redis refuse it",
    ),
    _redis(
        "maxmemory-policy noeviction",
        lambda facts: _differs("maxmemory-policy", facts.policy, "noeviction"),
        "run CONFIG SET maxmemory-policy noeviction, because a full Redis would drop sales",
    ),
    _redis(
        "repl-backlog-ttl 0",
        lambda facts: _differs("repl-backlog-ttl", facts.backlog_ttl, "0"),
        "run CONFIG SET repl-backlog-ttl 0, because a server that was without replicas for that "
        "time forgets its failovers",
    ),
    _redis(
        "appendonly yes",
        lambda facts: None if facts.appendonly else "appendonly no",
        "run CONFIG SET appendonly yes, because a restart would lose the events that Kafka has not "
        "acknowledged",
        fatal=False,
    ),
    _redis_cluster(
        "all slots assigned on every node",
        _of_cluster(
            lambda facts: f"{facts.covered} of {SLOTS} slots" if facts.covered < SLOTS else None
        ),
        "assign the slots, because the sales in the others cannot be served",
    ),
    _redis_cluster(
        "cluster-node-timeout of 5000 or less",
        _of_cluster(_slow_failover),
        "run CONFIG SET cluster-node-timeout 5000, because a primary that was cut off could accept "
        "for longer than a rebuild waits",
    ),
    _redis_cluster(
        "cluster-require-full-coverage no",
        _cluster_setting("cluster-require-full-coverage", "no"),
        "run CONFIG SET cluster-require-full-coverage no, because the loss of one shard would stop "
        "all sales",
    ),
    _redis_cluster(
        "cluster-allow-reads-when-down no",
        _cluster_setting("cluster-allow-reads-when-down", "no"),
        "run CONFIG SET cluster-allow-reads-when-down no, because scripts would fail when they "
        "first write",
    ),
    _redis_cluster(
        "min-replicas-to-write 0 with one replica, 1 with two or more",
        _of_cluster(_replicas),
        "set it, because a shard with one replica must go on without it, and one with two must not "
        "accept what no replica has",
        fatal=False,
    ),
)
LEDGER: Final = (
    _postgresql(
        "version 14 or newer",
        lambda facts: f"version {facts.version // 10_000}" if facts.version < 140_000 else None,
        "upgrade the server",
    ),
    _postgresql(
        "a database with encoding UTF8",
        lambda facts: f"encoding {facts.encoding}" if facts.encoding != "UTF8" else None,
        "create another database with ENCODING 'UTF8' TEMPLATE template0",
    ),
    _postgresql(
        "the right CREATE on a schema for migrations",
        lambda facts: (
            f"no such right for this user on the schema {facts.schema}"
            if facts.outdated and not facts.may_create
            else None
        ),
        "run GRANT USAGE, CREATE ON SCHEMA ... TO this user, or migrate as another user first",
    ),
    _postgresql(
        "the rights SELECT, INSERT, UPDATE and DELETE on the ledger's tables",
        lambda facts: f"no right for {', '.join(facts.lacking)}" if facts.lacking else None,
        "grant them to this user",
    ),
)


def topic(partitions: int = PARTITIONS) -> tuple[Requirement[TopicFacts], ...]:
    """Returns the rules of the topic of reservations. It needs this number of partitions."""
    enough = _kafka(
        f"{partitions} or more partitions of the topic",
        lambda facts: (
            f"only {facts.partitions} of the topic" if facts.partitions < partitions else None
        ),
        "add partitions, because each is read by one consumer",
    )
    return (enough, *_TOPIC)


_TOPIC: Final = (
    _kafka(
        "retention.ms of 7 days or more",
        lambda facts: _number_below(facts.config, "retention.ms", EVENT_RETENTION_MS),
        "raise the topic's retention.ms, because older events that are not recorded are lost",
    ),
    _kafka(
        "retention.bytes of 1 GiB or more",
        lambda facts: _number_below(facts.config, "retention.bytes", PARTITION_BYTES),
        "raise the topic's retention.bytes, because older events that are not recorded are lost",
    ),
    _kafka(
        "a limit of the topic's size",
        lambda facts: "retention.bytes=-1" if facts.config.get("retention.bytes") == "-1" else None,
        "set the topic's retention.bytes to 1073741824, because a broker with a full disk "
        "acknowledges nothing",
    ),
    _kafka(
        "cleanup.policy=delete",
        lambda facts: (
            None
            if "delete" in facts.config.get("cleanup.policy", "delete")
            else f"cleanup.policy={facts.config['cleanup.policy']}"
        ),
        "set the topic's cleanup.policy, because a compacted topic keeps every reservation",
    ),
    _kafka(
        "message.timestamp.type=LogAppendTime",
        _other_timestamps,
        "set the topic's message.timestamp.type, because Kafka would refuse or delete the events "
        "of a pod whose clock is wrong",
    ),
    _kafka(
        "max.message.bytes of 256 KiB or more",
        lambda facts: _number_below(facts.config, "max.message.bytes", BATCH_BYTES),
        "raise the topic's max.message.bytes, because smaller batches cost more",
    ),
)
RECORDED: Final = (
    _kafka(
        "retention.ms of 7 days or more for recorded reservations",
        lambda facts: _number_below(facts.config, "retention.ms", EVENT_RETENTION_MS),
        "raise the topic's retention.ms, because an order service misses older messages",
    ),
    _kafka(
        "message.timestamp.type=LogAppendTime for recorded reservations",
        _other_timestamps,
        "set the topic's message.timestamp.type, because Kafka would refuse or delete the messages "
        "of a consumer whose clock is wrong",
    ),
    _kafka(
        "max.message.bytes of 256 KiB or more for recorded reservations",
        lambda facts: _number_below(facts.config, "max.message.bytes", BATCH_BYTES),
        "raise the topic's max.message.bytes, because smaller batches cost more",
    ),
)


def findings(table: Iterable[Requirement[F]], *servers: F) -> list[Finding]:
    """Checks each line of a table. A line that several servers break gives several findings."""
    found = []
    for requirement in table:
        checked = [requirement.check(facts, getattr(facts, "node", "")) for facts in servers]
        found += [each for each in checked if each.verdict != "ok"] or checked[:1]
    return found


class Checks:
    """The checks of one process. It logs each warning once, if it has a log."""

    def __init__(self, log: logging.Logger | None = None) -> None:
        self._log = log
        self._warned: set[str] = set()

    def require(self, table: Iterable[Requirement[F]], *servers: F) -> None:
        """Raises `UnmetRequirement` if a server breaks a rule that is fatal."""
        for finding in findings(table, *servers):
            if finding.verdict == "failure":
                raise UnmetRequirement(finding.text)
            if finding.verdict == "warning" and self._log and finding.text not in self._warned:
                self._warned.add(finding.text)
                self._log.warning("%s", finding.text)
