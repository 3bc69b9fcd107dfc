"""The results of a benchmark run. The page is generated from them."""

import msgspec

from bench.load import Tally


class Round(msgspec.Struct, frozen=True):
    """One run of a crowd, and the CPU seconds of each process per 10,000 requests.

    The CPU time counts until the outbox is empty, so that it includes all publishing.
    """

    tally: Tally
    cpu: dict[str, float]


class Parts(msgspec.Struct, frozen=True):
    """CPU microseconds of the API per request.

    - `server`, `refused`, `accepted`: from the bytes of a request to the bytes of its answer, for a
      bare app in uvicorn, for a sold-out sale, and for a sale that accepts.
    - `script`, `event`, `settled`: the client's part of a script call, an event in its batch, and
      the deletion of an outbox entry, at 32 requests per call.
    - `metrics`: the part of `accepted` that updates metrics.
    - `untraced`: the addition if tracing is on but the request is not sampled.
    - `bounds`: the bounds on clients.
    - `identity`: the additions to `accepted` if a header or a token names the user.
    """

    server: float
    refused: float
    accepted: float
    script: float
    event: float
    settled: float
    metrics: float = 0.0
    untraced: float = 0.0
    bounds: float = 0.0
    identity: dict[str, float] = msgspec.field(default_factory=dict)


class OpenRound(msgspec.Struct, frozen=True):
    """One run at a constant arrival rate of `percent` of the capacity."""

    percent: int
    rate: float
    round: Round


class Scripts(msgspec.Struct, frozen=True):
    """CPU microseconds of Redis per request, called without HTTP, by outcome."""

    batch: int
    accepted_us: float
    rejected_us: float


class Drain(msgspec.Struct, frozen=True):
    """A backlog recorded by one consumer. `cpu` is in seconds per 10,000 events by process."""

    events: int
    seconds: float
    cpu: dict[str, float]

    @property
    def rate(self) -> float:
        return self.events / self.seconds


class Together(msgspec.Struct, frozen=True):
    """API and consumer at a constant arrival rate.

    `lag` is the number of unrecorded events in each second. `to_row` has P50, P95 and P99 of the
    milliseconds from a 202 to its row.
    """

    rate: float
    seconds: float
    lag: list[int]
    to_row: tuple[float, float, float]
    recorded: int


class Phase(msgspec.Struct, frozen=True):
    """A part of the run with outages. Latencies are in milliseconds."""

    name: str
    requests: int
    p50: float
    p95: float
    p99: float
    failed: int


class Outages(msgspec.Struct, frozen=True):
    """Outages of PostgreSQL and then of Kafka at a constant arrival rate.

    `each_second` has the P95 of the requests due in each second. `spans` are (name, begin, end) in
    seconds since the start. `unrecorded` counts accepted reservations without a row.
    """

    rate: float
    items: int
    phases: list[Phase]
    each_second: list[float]
    spans: list[tuple[str, float, float]]
    unrecorded: int


class Backlog(msgspec.Struct, frozen=True):
    """A backlog that was worked off while buyers sent `rate` requests per second.

    - `calm` is the P95 before, and `p95` the P95 until the backlog was gone.
    - `each_second` has the P95 of each second, and `left` the backlog then.
    - `seconds` is the time until the backlog was gone, or None if it was not gone in the end.
    - `failed` counts the requests that were not accepted.

    Latencies are in milliseconds.
    """

    name: str
    rate: float
    calm: float
    seconds: float | None
    p95: float
    each_second: list[float]
    left: list[int]
    requests: int
    failed: int


class Backlogs(msgspec.Struct, frozen=True):
    """Backlogs of each kind. `run` says when they were measured, and under which other load."""

    run: str = ""
    found: list[Backlog] = msgspec.field(default_factory=list)


class Memory(msgspec.Struct, frozen=True):
    """A sale that has sold all of its stock.

    `bytes_each` is the memory of Redis per reservation, without its outbox entry. The rounds are
    refused requests with keys, which Redis looks up in the sale.
    """

    stock: int
    bytes_each: float
    rounds: list[Round]


class Expiry(msgspec.Struct, frozen=True):
    """Holds that were due at once while buyers sent `rate` requests per second.

    `expired` and `sold_again` are the seconds until the last one was expired, and until all their
    units were for sale again.
    """

    holds: int
    rate: float
    expired: float
    sold_again: float
    phases: list[Phase]


class Holds(msgspec.Struct, frozen=True):
    """The cost of holds. `run` says when and under which other load they were measured.

    `accepted` has rounds without and with a hold. `confirmed` has rounds as fast as possible and at
    a constant rate.
    """

    run: str
    accepted: dict[str, list[Round]]
    confirmed: dict[str, list[Round]]
    expiry: Expiry


class Calls(msgspec.Struct, frozen=True):
    """CPU microseconds of Redis per request in script calls of equal size.

    `costs` has the figure of each round, by the kind of request with their number per call, and by
    the side: a single server, and a node of a cluster. Both have a replica.
    """

    run: str
    costs: dict[str, dict[str, list[float]]]


class Cluster(msgspec.Struct, frozen=True):
    """One node and three nodes of Redis, each with a replica, at a constant arrival rate.

    `run` is as in `Holds`. `sales` has the number of sales on each of the three nodes. The CPU time
    of `Redis` is that of all primaries. `node 1` and so on are the single ones.
    """

    run: str
    rate: float
    sales: list[int]
    rounds: dict[str, list[Round]]
    calls: Calls


class Bounds(msgspec.Struct, frozen=True):
    """The cost of the bounds on clients. `run` says when and under which other load.

    `shipped` and `unbounded` have the rounds of the API with and without its bounds, by answer.
    Rounds at the same place in both lists ran one after the other.
    """

    run: str
    shipped: dict[str, list[Round]]
    unbounded: dict[str, list[Round]]

    def costs(self, answer: str) -> list[float]:
        """The additional CPU of the API in each pair of rounds, as a share of the shipped API's."""
        pairs = zip(self.shipped[answer], self.unbounded[answer], strict=True)
        return [1 - without.cpu["API"] / shipped.cpu["API"] for shipped, without in pairs]


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """All results of a run. Lists of rounds are in the order of the rounds."""

    command: str
    when: str
    minutes: float
    rounds: int
    seconds: float
    warm_up_seconds: float
    background: str
    machine: dict[str, str]
    reserve: dict[str, list[Round]]
    bounds: Bounds
    parts: Parts
    open_loop: list[OpenRound]
    scripts: list[Scripts]
    drains: list[Drain]
    together: Together
    outages: Outages
    holds: Holds
    processes: dict[str, list[Round]]
    memory: list[Memory]
    sales: dict[str, list[Round]]
    apply_seconds: list[float]
    cluster: Cluster
    backlogs: Backlogs = msgspec.field(default_factory=Backlogs)
