"""Writes the figures into docs/performance.md, into two charts, and into a JSON file.

The text of the page is written by hand. The figures of a section stand between
`<!-- figures NAME -->` and `<!-- end -->`. Only they are replaced.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import mean, median
from typing import Final

import msgspec

from bench.chart import Line, chart
from bench.cluster import NODE, ONE, SALES, SINGLE, THIRD, THREE
from bench.holds import CONFIRMATIONS, FASTEST, HELD, PLAIN, STEADY
from bench.requests import PERCENTS
from bench.results import Backlogs, Bounds, Calls, Cluster, Findings, Phase, Round

PAGE = "performance.md"
REPLICA: Final = 1.22
"""The CPU of a primary with a replica, as a multiple of one without. Measured were up to 22 %."""
BUSY: Final = 0.6
"""The share of the time for which a primary may work."""


def write(findings: Findings, docs: Path) -> None:
    """Write the page, the charts and the JSON file into the folder `docs`."""
    sections = _sections(findings)
    page = docs / PAGE
    text = page.read_text()
    for name, figures in sections.items():
        marked = re.compile(rf"(<!-- figures {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not (place := marked.search(text)):
            raise SystemExit(f"{page} has no markers for the figures of {name}")
        text = text[: place.end(1)] + figures + text[place.start(2) :]
    page.write_text(text)
    made = msgspec.json.format(msgspec.json.encode(findings), indent=1)
    (docs / "performance.json").write_bytes(made + b"\n")
    (docs / "performance-open-loop.svg").write_text(_open_loop_chart(findings))
    (docs / "performance-outages.svg").write_text(_outage_chart(findings))
    if findings.backlogs.found:
        (docs / "performance-backlogs.svg").write_text(_backlog_chart(findings))
        (docs / "performance-backlogs-left.svg").write_text(_left_chart(findings))


def summary(findings: Findings) -> str:
    """Return the figures for a terminal."""
    return "\n".join(_sections(findings).values())


def _sections(found: Findings) -> dict[str, str]:
    return {
        "run": _run(found),
        "goals": _goals(found),
        "reserve": _reserve(found.reserve),
        "bounds": bounds(found.bounds),
        "parts": _parts(found),
        "open-loop": _open_loop(found),
        "redis": _redis(found),
        "cluster": _cluster(found.cluster),
        "calls": _calls(found.cluster.calls),
        "scale": _scale(found),
        "recording": _recording(found),
        "outages": _outages(found),
        "backlogs": backlogs(found.backlogs),
        "holds": _holds(found),
        "growth": _growth(found),
    }


def _run(found: Findings) -> str:
    lines = [f"- {name}: {description}" for name, description in found.machine.items()]
    lines.append(
        f"- run: `{found.command}`, {found.when}, {found.minutes:.0f} min, rounds: "
        f"{found.rounds} of {found.seconds:g} s, after a warm-up of {found.warm_up_seconds:g} s"
    )
    lines.append(f"- other load: {found.background}")
    return "\n".join(lines) + "\n"


def _goals(found: Findings) -> str:
    ways = found.reserve
    baseline = _middle_rps(ways["baseline"])
    accepted, sold_out = _middle_rps(ways["accepted"]), _middle_rps(ways["sold out"])
    p95 = median(one.tally.p95 for one in ways["accepted"])
    cpu = median(one.cpu["API"] for one in ways["accepted"])
    rates = median(one.rate for one in found.drains) if found.drains else 0.0
    half = len(found.together.lag) // 2
    cost = _hold_cost(found)
    bounded = found.parts.bounds / (100 * cpu)
    confirmed = _middle_rps(found.holds.confirmed[FASTEST])
    confirmed_p95 = median(one.tally.p95 for one in found.holds.confirmed[STEADY])
    expiring = next(one for one in found.holds.expiry.phases if one.name == "expiring")
    on_three = _shares(found.cluster, THREE, ONE, "API")
    early, late = max(found.together.lag[:half], default=0), max(found.together.lag[half:])
    rows = (
        (
            "accepted requests per second, share of the baseline",
            "60 %",
            f"{accepted / baseline:.0%}",
            accepted >= 0.6 * baseline,
        ),
        (
            "sold-out answers per second, share of the baseline",
            "80 %",
            f"{sold_out / baseline:.0%}",
            sold_out >= 0.8 * baseline,
        ),
        ("P95 of accepted requests", "< 30 ms", f"{p95:.1f} ms", p95 < 30),
        (
            "CPU of the API per 10,000 accepted requests",
            "at most 0.5 s",
            f"{cpu:.2f} s",
            cpu <= 0.5,
        ),
        (
            "CPU of the bounds on clients, share of the API's for an accepted request",
            "at most 5 %",
            f"{bounded:.1%}",
            bounded <= 0.05,
        ),
        (
            "events recorded per second by one consumer",
            "20,000/s",
            f"{rates:,.0f}/s",
            rates >= 20_000,
        ),
        (
            "lag of the consumer while the API sells",
            "bounded",
            f"at most {early:,} events in the first half, {late:,} in the second",
            late <= max(2 * early, found.together.rate * 2),
        ),
        (
            "CPU of API and Redis for an accepted hold, share of an accepted reservation",
            "at most 115 %",
            f"{cost:.0%}",
            cost <= 1.15,
        ),
        (
            "confirmations per second and core",
            f"{CONFIRMATIONS:,}/s",
            f"{confirmed:,.0f}/s",
            confirmed >= CONFIRMATIONS,
        ),
        (
            f"P95 of {CONFIRMATIONS:,} confirmations per second",
            "< 50 ms",
            f"{confirmed_p95:.1f} ms",
            confirmed_p95 < 50,
        ),
        (
            f"P95 of accepted requests while {found.holds.expiry.holds:,} holds expire",
            "< 30 ms",
            f"{expiring.p95:.1f} ms",
            expiring.p95 < 30,
        ),
        (
            "CPU of the API for an accepted request on three nodes of Redis, share of one node",
            "at most 110 %",
            f"{median(on_three):.0%}",
            median(on_three) <= 1.1,
        ),
    )
    return _table(
        ("", "goal", "measured", ""),
        [(name, goal, got, "met" if met else "**missed**") for name, goal, got, met in rows],
    )


def _reserve(ways: dict[str, list[Round]]) -> str:
    baseline = _middle_rps(ways["baseline"])
    rows = []
    for name, rounds in ways.items():
        rows.append(
            (
                name,
                _spread(one.tally.rps for one in rounds),
                f"{_middle_rps(rounds) / baseline:.0%}",
                f"{_middle_cpu(ways['baseline']) / _middle_cpu(rounds):.0%}",
                _spread((one.tally.p95 for one in rounds), 1),
                *_cpu(rounds, ("API", "Redis", "Kafka", "crowd")),
            )
        )
    head = "answer|requests/s|of the baseline|by CPU|P95 ms|API|Redis|Kafka|crowd"
    return _table(head.split("|"), rows)


def bounds(one: Bounds) -> str:
    """Return the cost of the bounds on clients."""
    rows = [
        (
            answer,
            *_cpu(rounds, ("API",)),
            *_cpu(one.unbounded[answer], ("API",)),
            _spread((100 * cost for cost in one.costs(answer)), 1) + " %",
        )
        for answer, rounds in one.shipped.items()
    ]
    return (
        _table(("answer", "API", "API without bounds", "cost of the bounds"), rows)
        + f"\nEach figure is of {len(next(iter(one.shipped.values())))} rounds. Run: {one.run}.\n"
    )


def _parts(found: Findings) -> str:
    """Return the cost of each part, and of everything else: the whole minus the parts."""
    parts = found.parts
    baseline, sold_out, accepted = (
        _middle_cpu(found.reserve[name]) * 100 for name in ("baseline", "sold out", "accepted")
    )
    publishing = parts.event + parts.settled
    rows = {
        "from the bytes of the request to the bytes of the answer": (
            parts.server,
            parts.refused,
            parts.accepted,
        ),
        "of this, metrics": (0.0, parts.metrics, parts.metrics),
        "the client's part of a script call": (0.0, 0.0, parts.script),
        "adding an event to its batch, and settling it": (0.0, 0.0, publishing),
        "everything else: sockets, event loop, batches for Kafka": (
            baseline - parts.server,
            sold_out - parts.refused,
            accepted - parts.accepted - parts.script - publishing,
        ),
        "total, as measured above": (baseline, sold_out, accepted),
        "of an accepted request, bounds on clients": (0.0, 0.0, parts.bounds),
        "additional if tracing is on and the request is not sampled": (
            0.0,
            parts.untraced,
            parts.untraced,
        ),
        # A sale that is known to be sold out is answered before the user is verified.
        **{
            f"additional if {name} names the user": (0.0, 0.0, spent)
            for name, spent in parts.identity.items()
        },
    }
    return _table(
        ("CPU µs per request", "baseline", "sold out", "accepted"),
        [(name, *(f"{value:.1f}" for value in values)) for name, values in rows.items()],
    )


def _open_loop(found: Findings) -> str:
    rows = []
    for percent in PERCENTS:
        rounds = [one for one in found.open_loop if one.percent == percent]
        tallies = [one.round.tally for one in rounds]
        rows.append(
            (
                f"{percent} %",
                f"{rounds[0].rate:,.0f}",
                *(
                    _spread((getattr(tally, name) for tally in tallies), 1)
                    for name in ("p50", "p95", "p99")
                ),
                *_cpu([one.round for one in rounds], ("API",)),
                f"{sum(_failed(one.round) for one in rounds)}",
            )
        )
    head = ("of capacity", "requests/s", "P50 ms", "P95 ms", "P99 ms", "API", "not accepted")
    return _table(head, rows)


def _redis(found: Findings) -> str:
    rows = []
    for batch in sorted({one.batch for one in found.scripts}):
        ones = [one for one in found.scripts if one.batch == batch]
        accepted, rejected = [one.accepted_us for one in ones], [one.rejected_us for one in ones]
        rows.append(
            (
                f"{batch} requests per call",
                _spread(accepted, 1),
                f"{1e6 / median(accepted):,.0f}",
                _spread(rejected, 1),
                f"{1e6 / median(rejected):,.0f}",
            )
        )
    head = "|µs per reservation|reservations/s per core|µs per rejection|rejections/s per core"
    ways = [found.reserve[name] for name in ("accepted", "sold out, with keys")]
    redis = _redis_us(found)
    cores = [_middle_cpu(way) * 100 / spent for way, spent in zip(ways, redis, strict=True)]
    return (
        _table(head.split("|"), rows)
        + "\nBehind the API, which has smaller batches and also settles, Redis needs "
        + f"{redis[0]:.0f} µs per reservation and {redis[1]:.0f} µs per rejection. "
        + f"One Redis core is enough for {cores[0]:.1f} API cores that only accept, or for "
        + f"{cores[1]:.1f} API cores that only reject requests with keys.\n"
    )


def _cluster(found: Cluster) -> str:
    rows = [
        (
            name,
            f"{rounds[0].tally.rps:,.0f}",
            _spread((one.tally.p95 for one in rounds), 1),
            *_cpu(rounds, ("API", "Redis", "replicas", "Kafka")),
        )
        for name, rounds in found.rounds.items()
    ]
    nodes = [
        (
            f"{number}",
            f"{sales}",
            f"{sales / SALES:.0%}",
            _spread(
                one.cpu[f"node {number}"] / one.cpu["Redis"] * 100 for one in found.rounds[THREE]
            ),
        )
        for number, sales in enumerate(found.sales, 1)
    ]
    api, redis, third = (
        _spread(share * 100 for share in _shares(found, THREE, other, name))
        for other, name in ((ONE, "API"), (ONE, "Redis"), (THIRD, "Redis"))
    )
    return (
        _table(("accepted", "requests/s", "P95 ms", "API", "Redis", "replicas", "Kafka"), rows)
        + f"\nPer request, the API takes {api} % of its CPU with one node. The primaries take "
        + f"{redis} % of the CPU of one node with all of the load, and {third} % of the CPU of one "
        + "node with a third of it.\n\n"
        + _table(("node", "sales", "% of the requests", "% of the primaries' CPU"), nodes)
        + f"\nRun: {found.run}.\n"
    )


def _calls(found: Calls) -> str:
    rows = []
    ratios = []
    for kind, sides in found.costs.items():
        single, node = sides[SINGLE], sides[NODE]
        ratio = [ours / others for ours, others in zip(node, single, strict=True)]
        ratios.append(median(ratio))
        rows.append((kind, _spread(single, 1), _spread(node, 1), _spread(ratio, 2)))
    return (
        _table(("µs per request", SINGLE, NODE, "ratio"), rows)
        + f"\nThe ratios are those of each round. The mean of their medians is {mean(ratios):.2f}."
        + f"\n\nRun: {found.run}.\n"
    )


def _shares(found: Cluster, name: str, other: str, process: str) -> list[float]:
    """Return a process' CPU as a multiple of that in the other rounds, round by round."""
    pairs = zip(found.rounds[name], found.rounds[other], strict=True)
    return [one.cpu[process] / beside.cpu[process] for one, beside in pairs]


def _scale(found: Findings) -> str:
    """Return the numbers of primaries by the formula of the page."""
    accepted, refused = _redis_us(found)
    cost = [us * REPLICA / BUSY for us in (accepted, refused)]
    rows = []
    for requests, share in ((100_000, 0.1), (1_000_000, 0.05), (1_000_000, 0.2), (1_000_000, 1.0)):
        cores = requests * (share * cost[0] + (1 - share) * cost[1]) / 1e6
        rows.append((f"{requests:,}", f"{share:.0%}", f"{ceil(cores)}"))
    return (
        f"With {accepted:.0f} µs per reservation and {refused:.0f} µs per rejection, a primary "
        f"accepts {1e6 / cost[0]:,.0f} requests per second, or refuses {1e6 / cost[1]:,.0f}.\n\n"
        + _table(("requests per second", "accepted", "primaries"), rows)
    )


def _redis_us(found: Findings) -> list[float]:
    """Return the CPU of Redis behind the API, in µs per reservation and per rejection."""
    ways = [found.reserve[name] for name in ("accepted", "sold out, with keys")]
    return [median(one.cpu["Redis"] for one in rounds) * 100 for rounds in ways]


def _recording(found: Findings) -> str:
    drains = [
        (
            "a backlog, one consumer on one core",
            _spread(one.rate for one in found.drains),
            *(
                _spread((one.cpu[name] for one in found.drains), 2)
                for name in ("consumer", "PostgreSQL", "Kafka")
            ),
        )
    ]
    one = found.together
    p50, p95, p99 = one.to_row
    half = len(one.lag) // 2
    return (
        _table(("", "events/s", "consumer", "PostgreSQL", "Kafka"), drains)
        + f"\nAPI and consumer at once, {one.rate:,.0f} reservations per second for "
        + f"{one.seconds:.0f} s: the lag was at most {max(one.lag[:half], default=0):,} events in "
        + f"the first half and {max(one.lag[half:]):,} in the second. The time from the 202 to the "
        + f"row was P50 {p50:.0f}, P95 {p95:.0f}, P99 {p99:.0f} ms. "
        + f"All {one.recorded:,} reservations were recorded.\n"
    )


def _outages(found: Findings) -> str:
    one = found.outages
    return (
        _phases(one.phases)
        + f"\nThe rate was {one.rate:,.0f} requests per second over {one.items} sales. Accepted "
        + f"reservations without a row afterwards: {one.unrecorded}.\n"
    )


def backlogs(found: Backlogs) -> str:
    """Return the table of backlogs, and the links to their charts."""
    if not found.found:
        return "There are no figures of a quiet machine yet.\n"
    rows = [
        (
            one.name,
            f"{one.rate:,.0f}",
            f"{max(one.left):,}",
            f"{one.left[-1]:,} left" if one.seconds is None else f"{one.seconds:.1f}",
            f"{one.calm:.1f}",
            f"{one.p95:.1f}",
            f"{max(one.each_second):.1f}",
            f"{one.failed:,} of {one.requests:,}",
        )
        for one in found.found
    ]
    head = ("", "requests/s", "backlog", "gone after s", "P95 ms before", "P95 ms until then")
    return (
        _table((*head, "in the slowest second", "not accepted"), rows)
        + f"\nRun: {found.run}.\n\n"
        + "![P95 of each second while a backlog is worked off](performance-backlogs.svg)\n\n"
        + "![The remaining part of the backlog](performance-backlogs-left.svg)\n"
    )


def _holds(found: Findings) -> str:
    holds, one = found.holds, found.holds.expiry
    rows = [
        (
            name,
            _spread(each.tally.rps for each in rounds),
            *(_spread((getattr(each.tally, p) for each in rounds), 1) for p in ("p50", "p95")),
            *_cpu(rounds, ("API", "Redis", "Kafka")),
        )
        for name, rounds in (holds.accepted | holds.confirmed).items()
    ]
    return (
        _table(["answer", "requests/s", "P50 ms", "P95 ms", "API", "Redis", "Kafka"], rows)
        + f"\nAn accepted hold costs API and Redis {_hold_cost(found):.0%} of the CPU of a "
        + "reservation that is confirmed at once.\n\n"
        + _phases(one.phases)
        + f"\nThe rate of the buyers was {one.rate:,.0f} requests per second. {one.holds:,} holds "
        + f"expired in {one.expired:.1f} s, and their units were for sale again after "
        + f"{one.sold_again:.1f} s. Run: {holds.run}.\n"
    )


def _hold_cost(found: Findings) -> float:
    """Return the CPU of an accepted hold, as a multiple of that of an accepted reservation."""
    held, plain = (
        median(one.cpu["API"] + one.cpu["Redis"] for one in found.holds.accepted[name])
        for name in (HELD, PLAIN)
    )
    return held / plain


def _phases(phases: Iterable[Phase]) -> str:
    rows = [
        (
            phase.name,
            f"{phase.requests:,}",
            *(f"{value:.1f}" for value in (phase.p50, phase.p95, phase.p99)),
            f"{phase.failed:,}",
        )
        for phase in phases
    ]
    return _table(("", "requests", "P50 ms", "P95 ms", "P99 ms", "not accepted"), rows)


def of_rounds(found: Mapping[str, Sequence[Round]]) -> str:
    """Return the table of accepted requests in several conditions."""
    rows = [
        (
            name,
            _spread(one.tally.rps for one in rounds),
            _spread((one.tally.p95 for one in rounds), 1),
            *_cpu(rounds, ("API", "Redis")),
        )
        for name, rounds in found.items()
    ]
    return _table(("accepted", "requests/s", "P95 ms", "API", "Redis"), rows)


def _growth(found: Findings) -> str:
    stocks = [
        (
            f"{one.stock:,}",
            f"{one.bytes_each:,.0f}",
            _spread(each.tally.rps for each in one.rounds),
            _spread((each.tally.p95 for each in one.rounds), 1),
            *_cpu(one.rounds, ("Redis",)),
        )
        for one in found.memory
    ]
    applied = _spread(found.apply_seconds, 1)
    return (
        of_rounds(found.processes | found.sales)
        + f"\n`flashsalectl apply` of 1,000 sales took {applied} s.\n\n"
        + _table(("stock, sold", "bytes per reservation", "refused/s", "P95 ms", "Redis"), stocks)
    )


def _open_loop_chart(found: Findings) -> str:
    lines = []
    for name in ("p99", "p95", "p50"):
        points = []
        for percent in PERCENTS:
            rounds = [one for one in found.open_loop if one.percent == percent]
            value = median(getattr(one.round.tally, name) for one in rounds)
            points.append((rounds[0].rate, value))
        lines.append(Line(name.upper(), points))
    return chart("POST /reserve at a constant arrival rate", "requests/s", "ms", lines)


def _outage_chart(found: Findings) -> str:
    points = list(enumerate(found.outages.each_second))
    return chart(
        f"P95 of each second at {found.outages.rate:,.0f} requests/s",
        "seconds",
        "ms",
        [Line("P95", points)],
        found.outages.spans,
    )


def _backlog_chart(found: Findings) -> str:
    lines = [Line(one.name, list(enumerate(one.each_second))) for one in found.backlogs.found]
    return chart("P95 of each second while a backlog is worked off", "seconds", "ms", lines)


def _left_chart(found: Findings) -> str:
    lines = [
        Line(one.name, [(at, size / max(one.left) * 100) for at, size in enumerate(one.left)])
        for one in found.backlogs.found
    ]
    return chart("The remaining part of the backlog", "seconds", "%", lines)


def _middle_rps(rounds: Sequence[Round]) -> float:
    return median(one.tally.rps for one in rounds)


def _middle_cpu(rounds: Sequence[Round]) -> float:
    return median(one.cpu["API"] for one in rounds)


def _failed(one: Round) -> int:
    return sum(count for status, count in one.tally.statuses.items() if status != "202")


def _cpu(rounds: Sequence[Round], names: Sequence[str]) -> list[str]:
    return [_spread((one.cpu[name] for one in rounds), 2) for name in names]


def _spread(values: Iterable[float], digits: int = 0) -> str:
    """Return the median, with the least and the most in brackets."""
    ordered = sorted(values)
    least, middle, most = (
        f"{value:,.{digits}f}" for value in (ordered[0], median(ordered), ordered[-1])
    )
    return middle if least == most else f"{middle} ({least} to {most})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
