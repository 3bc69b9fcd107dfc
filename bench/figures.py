"""The figures of the API, of the consumer and of holds on the page."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from bench.holds import HELD, PLAIN
from bench.requests import PERCENTS
from bench.results import Backlogs, Bounds, Findings, Phase, Round
from bench.tables import cpu, middle_cpu, middle_rps, spread, table


def reserve(ways: dict[str, list[Round]]) -> str:
    baseline = middle_rps(ways["baseline"])
    rows = []
    for name, rounds in ways.items():
        rows.append(
            (
                name,
                spread(one.tally.rps for one in rounds),
                f"{middle_rps(rounds) / baseline:.0%}",
                f"{middle_cpu(ways['baseline']) / middle_cpu(rounds):.0%}",
                spread((one.tally.p95 for one in rounds), 1),
                *cpu(rounds, ("API", "Redis", "Kafka", "crowd")),
            )
        )
    head = "answer|requests/s|of the baseline|by CPU|P95 ms|API|Redis|Kafka|crowd"
    return table(head.split("|"), rows)


def bounds(one: Bounds) -> str:
    """Return the cost of the bounds on clients."""
    rows = [
        (
            answer,
            *cpu(rounds, ("API",)),
            *cpu(one.unbounded[answer], ("API",)),
            spread((100 * cost for cost in one.costs(answer)), 1) + " %",
        )
        for answer, rounds in one.shipped.items()
    ]
    return (
        table(("answer", "API", "API without bounds", "cost of the bounds"), rows)
        + f"\nEach figure is of {len(next(iter(one.shipped.values())))} rounds. Run: {one.run}.\n"
    )


def parts(found: Findings) -> str:
    """Return the cost of each part, and of everything else: the whole minus the parts."""
    one = found.parts
    baseline, sold_out, accepted = (
        middle_cpu(found.reserve[name]) * 100 for name in ("baseline", "sold out", "accepted")
    )
    publishing = one.event + one.settled
    rows = {
        "from the bytes of the request to the bytes of the answer": (
            one.server,
            one.refused,
            one.accepted,
        ),
        "of this, metrics": (0.0, one.metrics, one.metrics),
        "the client's part of a script call": (0.0, 0.0, one.script),
        "adding an event to its batch, and settling it": (0.0, 0.0, publishing),
        "everything else: sockets, event loop, batches for Kafka": (
            baseline - one.server,
            sold_out - one.refused,
            accepted - one.accepted - one.script - publishing,
        ),
        "total, as measured above": (baseline, sold_out, accepted),
        "of an accepted request, bounds on clients": (0.0, 0.0, one.bounds),
        "additional if tracing is on and the request is not sampled": (
            0.0,
            one.untraced,
            one.untraced,
        ),
        # A sale that is known to be sold out is answered before the user is verified.
        **{
            f"additional if {name} names the user": (0.0, 0.0, spent)
            for name, spent in one.identity.items()
        },
    }
    return table(
        ("CPU µs per request", "baseline", "sold out", "accepted"),
        [(name, *(f"{value:.1f}" for value in values)) for name, values in rows.items()],
    )


def open_loop(found: Findings) -> str:
    rows = []
    for percent in PERCENTS:
        rounds = [one for one in found.open_loop if one.percent == percent]
        tallies = [one.round.tally for one in rounds]
        rows.append(
            (
                f"{percent} %",
                f"{rounds[0].rate:,.0f}",
                *(
                    spread((getattr(tally, name) for tally in tallies), 1)
                    for name in ("p50", "p95", "p99")
                ),
                *cpu([one.round for one in rounds], ("API",)),
                f"{sum(_failed(one.round) for one in rounds)}",
            )
        )
    head = ("of capacity", "requests/s", "P50 ms", "P95 ms", "P99 ms", "API", "not accepted")
    return table(head, rows)


def recording(found: Findings) -> str:
    drains = [
        (
            "a backlog, one consumer on one core",
            spread(one.rate for one in found.drains),
            *(
                spread((one.cpu[name] for one in found.drains), 2)
                for name in ("consumer", "PostgreSQL", "Kafka")
            ),
        )
    ]
    one = found.together
    p50, p95, p99 = one.to_row
    half = len(one.lag) // 2
    return (
        table(("", "events/s", "consumer", "PostgreSQL", "Kafka"), drains)
        + f"\nAPI and consumer at once, {one.rate:,.0f} reservations per second for "
        + f"{one.seconds:.0f} s: the lag was at most {max(one.lag[:half], default=0):,} events in "
        + f"the first half and {max(one.lag[half:]):,} in the second. The time from the 202 to the "
        + f"row was P50 {p50:.0f}, P95 {p95:.0f}, P99 {p99:.0f} ms. "
        + f"All {one.recorded:,} reservations were recorded.\n"
    )


def outages(found: Findings) -> str:
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
        table((*head, "in the slowest second", "not accepted"), rows)
        + f"\nRun: {found.run}.\n\n"
        + "![P95 of each second while a backlog is worked off](performance-backlogs.svg)\n\n"
        + "![The remaining part of the backlog](performance-backlogs-left.svg)\n"
    )


def holds(found: Findings) -> str:
    measured, one = found.holds, found.holds.expiry
    rows = [
        (
            name,
            spread(each.tally.rps for each in rounds),
            *(spread((getattr(each.tally, p) for each in rounds), 1) for p in ("p50", "p95")),
            *cpu(rounds, ("API", "Redis", "Kafka")),
        )
        for name, rounds in (measured.accepted | measured.confirmed).items()
    ]
    return (
        table(["answer", "requests/s", "P50 ms", "P95 ms", "API", "Redis", "Kafka"], rows)
        + f"\nAn accepted hold costs API and Redis {hold_cost(found):.0%} of the CPU of a "
        + "reservation that is confirmed at once.\n\n"
        + _phases(one.phases)
        + f"\nThe rate of the buyers was {one.rate:,.0f} requests per second. {one.holds:,} holds "
        + f"expired in {one.expired:.1f} s, and their units were for sale again after "
        + f"{one.sold_again:.1f} s. Run: {measured.run}.\n"
    )


def hold_cost(found: Findings) -> float:
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
    return table(("", "requests", "P50 ms", "P95 ms", "P99 ms", "not accepted"), rows)


def of_rounds(found: Mapping[str, Sequence[Round]]) -> str:
    """Return the table of accepted requests in several conditions."""
    rows = [
        (
            name,
            spread(one.tally.rps for one in rounds),
            spread((one.tally.p95 for one in rounds), 1),
            *cpu(rounds, ("API", "Redis")),
        )
        for name, rounds in found.items()
    ]
    return table(("accepted", "requests/s", "P95 ms", "API", "Redis"), rows)


def growth(found: Findings) -> str:
    stocks = [
        (
            f"{one.stock:,}",
            f"{one.bytes_each:,.0f}",
            spread(each.tally.rps for each in one.rounds),
            spread((each.tally.p95 for each in one.rounds), 1),
            *cpu(one.rounds, ("Redis",)),
        )
        for one in found.memory
    ]
    applied = spread(found.apply_seconds, 1)
    return (
        of_rounds(found.processes | found.sales)
        + f"\n`flashsalectl apply` of 1,000 sales took {applied} s.\n\n"
        + table(("stock, sold", "bytes per reservation", "refused/s", "P95 ms", "Redis"), stocks)
    )


def _failed(one: Round) -> int:
    return sum(count for status, count in one.tally.statuses.items() if status != "202")
