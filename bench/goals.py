"""Compares the figures with the goals of the engine."""

from statistics import median

from bench.cluster import ONE, THREE
from bench.figures import hold_cost
from bench.holds import CONFIRMATIONS, FASTEST, STEADY
from bench.redis_figures import shares
from bench.results import Findings
from bench.tables import middle_rps, table


def goals(found: Findings) -> str:
    """Return the table of the goals, with the figures and whether each goal is met."""
    ways = found.reserve
    baseline = middle_rps(ways["baseline"])
    accepted, sold_out = middle_rps(ways["accepted"]), middle_rps(ways["sold out"])
    p95 = median(one.tally.p95 for one in ways["accepted"])
    cpu = median(one.cpu["API"] for one in ways["accepted"])
    rates = median(one.rate for one in found.drains) if found.drains else 0.0
    half = len(found.together.lag) // 2
    cost = hold_cost(found)
    bounded = found.parts.bounds / (100 * cpu)
    confirmed = middle_rps(found.holds.confirmed[FASTEST])
    confirmed_p95 = median(one.tally.p95 for one in found.holds.confirmed[STEADY])
    expiring = next(one for one in found.holds.expiry.phases if one.name == "expiring")
    on_three = shares(found.cluster, THREE, ONE, "API")
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
    return table(
        ("", "goal", "measured", ""),
        [(name, goal, got, "met" if met else "**missed**") for name, goal, got, met in rows],
    )
