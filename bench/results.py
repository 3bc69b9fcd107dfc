"""What a run of the benchmark found: written as JSON beside the page, which is made from it."""

import msgspec

from bench.load import Tally


class Round(msgspec.Struct, frozen=True):
    """One run of a crowd, and the CPU seconds of each process for 10,000 requests.

    The CPU is taken until the outbox is empty: what was left to publish is paid for too.
    """

    tally: Tally
    cpu: dict[str, float]


class Parts(msgspec.Struct, frozen=True):
    """CPU microseconds of the API for one request.

    `server`, `refused` and `accepted`: from the bytes of a request to those of its answer, of a
    bare app by uvicorn's way, of a sale that is sold out, and of one that accepts. `script`,
    `event` and `settled`: the client's part of a script call, of an event in its batch and of an
    outbox entry's deletion, at 32 a call. `metrics`: what of `accepted` counts and observes.
    `untraced`: what tracing adds to a request that is not sampled.
    """

    server: float
    refused: float
    accepted: float
    script: float
    event: float
    settled: float
    metrics: float = 0.0
    untraced: float = 0.0


class OpenRound(msgspec.Struct, frozen=True):
    """One run at a constant arrival rate, which is `percent` of the capacity."""

    percent: int
    rate: float
    round: Round


class Scripts(msgspec.Struct, frozen=True):
    """Redis alone, called without HTTP: its CPU microseconds for a request, by outcome."""

    batch: int
    accepted_us: float
    rejected_us: float


class Drain(msgspec.Struct, frozen=True):
    """A backlog recorded by one consumer process: events a second, CPU seconds per 10,000."""

    events: int
    seconds: float
    cpu: dict[str, float]

    @property
    def rate(self) -> float:
        return self.events / self.seconds


class Together(msgspec.Struct, frozen=True):
    """API and consumer at a constant arrival rate. `lag` are events not recorded, each second.

    `to_row` are P50, P95 and P99 of the milliseconds from a 202 to its row.
    """

    rate: float
    seconds: float
    lag: list[int]
    to_row: tuple[float, float, float]
    recorded: int


class Phase(msgspec.Struct, frozen=True):
    """A part of the run with outages; latencies in milliseconds of what was answered in it."""

    name: str
    requests: int
    p50: float
    p95: float
    p99: float
    failed: int


class Outages(msgspec.Struct, frozen=True):
    """PostgreSQL and then Kafka away under a constant arrival rate.

    `each_second` is the P95 of the requests due in each second; `spans` are (what, from, to).
    """

    rate: float
    items: int
    phases: list[Phase]
    each_second: list[float]
    spans: list[tuple[str, float, float]]
    unrecorded: int


class Memory(msgspec.Struct, frozen=True):
    """A sale that sold all of its stock: bytes of Redis for a reservation (without its outbox
    entry), and runs of refused requests with keys, each of which Redis looks up in it.
    """

    stock: int
    bytes_each: float
    rounds: list[Round]


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. Lists of rounds are in the order in which they were run."""

    command: str
    when: str
    minutes: float
    rounds: int
    seconds: float
    warm_up_seconds: float
    beside: str
    machine: dict[str, str]
    reserve: dict[str, list[Round]]
    parts: Parts
    open_loop: list[OpenRound]
    scripts: list[Scripts]
    drains: list[Drain]
    together: Together
    outages: Outages
    processes: dict[str, list[Round]]
    memory: list[Memory]
    sales: dict[str, list[Round]]
    apply_seconds: list[float]
