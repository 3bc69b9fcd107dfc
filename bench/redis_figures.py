"""The figures of Redis on the page: its scripts, a cluster, and the number of primaries."""

from math import ceil
from statistics import mean, median
from typing import Final

from bench.cluster import NODE, ONE, SALES, SINGLE, THIRD, THREE
from bench.results import Calls, Cluster, Findings
from bench.tables import cpu, middle_cpu, spread, table

REPLICA: Final = 1.22
"""The CPU of a primary with a replica, as a multiple of one without. Measured were up to 22 %."""
BUSY: Final = 0.6
"""The share of the time for which a primary may work."""


def redis(found: Findings) -> str:
    rows = []
    for batch in sorted({one.batch for one in found.scripts}):
        ones = [one for one in found.scripts if one.batch == batch]
        accepted, rejected = [one.accepted_us for one in ones], [one.rejected_us for one in ones]
        rows.append(
            (
                f"{batch} requests per call",
                spread(accepted, 1),
                f"{1e6 / median(accepted):,.0f}",
                spread(rejected, 1),
                f"{1e6 / median(rejected):,.0f}",
            )
        )
    head = "|µs per reservation|reservations/s per core|µs per rejection|rejections/s per core"
    ways = [found.reserve[name] for name in ("accepted", "sold out, with keys")]
    costs = _redis_us(found)
    cores = [middle_cpu(way) * 100 / spent for way, spent in zip(ways, costs, strict=True)]
    return (
        table(head.split("|"), rows)
        + "\nBehind the API, which has smaller batches and also settles, Redis needs "
        + f"{costs[0]:.0f} µs per reservation and {costs[1]:.0f} µs per rejection. "
        + f"One Redis core is enough for {cores[0]:.1f} API cores that only accept, or for "
        + f"{cores[1]:.1f} API cores that only reject requests with keys.\n"
    )


def cluster(found: Cluster) -> str:
    rows = [
        (
            name,
            f"{rounds[0].tally.rps:,.0f}",
            spread((one.tally.p95 for one in rounds), 1),
            *cpu(rounds, ("API", "Redis", "replicas", "Kafka")),
        )
        for name, rounds in found.rounds.items()
    ]
    nodes = [
        (
            f"{number}",
            f"{sales}",
            f"{sales / SALES:.0%}",
            spread(
                one.cpu[f"node {number}"] / one.cpu["Redis"] * 100 for one in found.rounds[THREE]
            ),
        )
        for number, sales in enumerate(found.sales, 1)
    ]
    api, redis, third = (
        spread(share * 100 for share in shares(found, THREE, other, name))
        for other, name in ((ONE, "API"), (ONE, "Redis"), (THIRD, "Redis"))
    )
    return (
        table(("accepted", "requests/s", "P95 ms", "API", "Redis", "replicas", "Kafka"), rows)
        + f"\nPer request, the API takes {api} % of its CPU with one node. The primaries take "
        + f"{redis} % of the CPU of one node with all of the load, and {third} % of the CPU of one "
        + "node with a third of it.\n\n"
        + table(("node", "sales", "% of the requests", "% of the primaries' CPU"), nodes)
        + f"\nRun: {found.run}.\n"
    )


def calls(found: Calls) -> str:
    rows = []
    ratios = []
    for kind, sides in found.costs.items():
        single, node = sides[SINGLE], sides[NODE]
        ratio = [ours / others for ours, others in zip(node, single, strict=True)]
        ratios.append(median(ratio))
        rows.append((kind, spread(single, 1), spread(node, 1), spread(ratio, 2)))
    return (
        table(("µs per request", SINGLE, NODE, "ratio"), rows)
        + f"\nThe ratios are those of each round. The mean of their medians is {mean(ratios):.2f}."
        + f"\n\nRun: {found.run}.\n"
    )


def shares(found: Cluster, name: str, other: str, process: str) -> list[float]:
    """Return a process' CPU as a multiple of that in the other rounds, round by round."""
    pairs = zip(found.rounds[name], found.rounds[other], strict=True)
    return [one.cpu[process] / beside.cpu[process] for one, beside in pairs]


def scale(found: Findings) -> str:
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
        + table(("requests per second", "accepted", "primaries"), rows)
    )


def _redis_us(found: Findings) -> list[float]:
    """Return the CPU of Redis behind the API, in µs per reservation and per rejection."""
    ways = [found.reserve[name] for name in ("accepted", "sold out, with keys")]
    return [median(one.cpu["Redis"] for one in rounds) * 100 for rounds in ways]
