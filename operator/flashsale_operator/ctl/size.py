"""`flashsalectl size`: the pods, memory and disks that a sale needs.

The constants are rounded up from measurements. The tables of "Sizing" in docs/operations.md have
them, too, and name their sources.
"""

from math import ceil
from typing import Final

import click
import msgspec

from flashsale.fields import MAX_HOLD_SECONDS, MAX_STOCK
from flashsale.requirements import PARTITION_BYTES, PARTITIONS, SEGMENT_BYTES
from flashsale_operator.ctl.cli import flashsalectl, output_option
from flashsale_operator.ctl.tables import json_of, table

ACCEPTED: Final = {"API": 0.4, "Redis": 0.25, "consumer": 0.2}
REFUSED: Final = {"API": 0.3, "Redis": 0.05}
CONFIRMED: Final = {"API": 1.4, "Redis": 0.7, "consumer": 0.2}
"""CPU seconds for 10,000 requests, by process: docs/performance.md, "The cost of a request",
"From accepted to recorded" and "Holds"."""

REDIS_EMPTY_BYTES: Final = 16_000_000
"""Memory of a Redis without a sale."""

REDIS_BYTES: Final = 500
REDIS_HOLD_BYTES: Final = 600
"""Memory of Redis for a reservation, without and with a hold."""

WAITING_BYTES: Final = 300
WAITING_EVENTS: Final = 100_000
"""Memory of Redis for an event that waits for Kafka, and how many may wait for an item."""

EVENT_BYTES: Final = 500
ANNOUNCEMENT_BYTES: Final = 800
"""Disk of Kafka for a copy of an event, and of its announcement."""

ROW_BYTES: Final = 200
HOLD_ROW_BYTES: Final = 400
"""Disk of PostgreSQL for a reservation with its index entry, without and with a hold."""

API_LOAD: Final = 0.5
REDIS_LOAD: Final = 0.6
"""Share of a core to plan with, because the buyers of a stampede are not spread evenly.

docs/performance.md, "Scale", plans with the same share of Redis.
"""

HOLDS_PER_UNIT: Final = 2
"""Holds of a unit until one is paid for: every other hold expires or is cancelled."""

COPIES: Final = 3
"""Copies of an event in Kafka, and nodes of a Redis: a primary and two replicas."""

MAX_BUYERS: Final = 100_000_000


class Size(msgspec.Struct, frozen=True, rename="camel"):
    """The need of a sale. Sizes are in bytes, and `redis_memory` is that of one node.

    More than one `redis_primaries` serve the buyers only if the units are split over as many items.
    `kafka_disk` is that of all copies.
    """

    buyers: int
    stock: int
    hold_seconds: int | None
    accepted: int
    refused: int
    api_pods: int
    consumer_pods: int
    redis_primaries: int
    redis_nodes: int
    redis_memory: int
    kafka_disk: int
    postgres_disk: int


def size_of(buyers: int, stock: int, hold_seconds: int | None) -> Size:
    """Returns the need of a sale of `stock` units with `buyers` requests in its first second.

    Each buyer reserves one unit, and the confirmations are spread evenly over the time of a hold.
    """
    accepted = min(buyers, stock)
    refused = buyers - accepted
    confirmed = accepted / hold_seconds if hold_seconds else 0

    def tenths(process: str) -> int:
        """Returns the CPU time of the first second, or of a later one that needs more.

        It is in tenths of a second, because the figures are no more exact.
        """
        first = accepted * ACCEPTED[process] + refused * REFUSED.get(process, 0)
        return round(max(first, confirmed * CONFIRMED[process]) / 1000)

    api, redis, consumer = map(tenths, ("API", "Redis", "consumer"))
    reservations = stock * (HOLDS_PER_UNIT if hold_seconds else 1)
    events = reservations * (2 if hold_seconds else 1)  # a hold also ends
    primaries = max(1, ceil(redis / (10 * REDIS_LOAD)))
    waiting = min(events, WAITING_EVENTS) * WAITING_BYTES
    kept = reservations * (REDIS_HOLD_BYTES if hold_seconds else REDIS_BYTES)
    topic = PARTITIONS * (PARTITION_BYTES + SEGMENT_BYTES)
    logs = min(events * EVENT_BYTES, topic) + min(events * ANNOUNCEMENT_BYTES, topic)
    return Size(
        buyers=buyers,
        stock=stock,
        hold_seconds=hold_seconds,
        accepted=accepted,
        refused=refused,
        api_pods=max(1, ceil(api / (10 * API_LOAD))) + 1,
        consumer_pods=max(2, ceil(consumer / 10)),
        redis_primaries=primaries,
        redis_nodes=primaries * COPIES,
        # Twice the data, because Redis may need as much again while it rewrites its file.
        redis_memory=REDIS_EMPTY_BYTES + 2 * ceil(kept / primaries + waiting),
        kafka_disk=COPIES * logs,
        postgres_disk=reservations * (HOLD_ROW_BYTES if hold_seconds else ROW_BYTES),
    )


def text_of(size: Size) -> str:
    """Returns a table with a line per server, and a line about a Redis that is too slow."""
    rows = [
        ("API", f"{size.api_pods} pods", "1 core each, one of them spare"),
        ("consumer", f"{size.consumer_pods} pods", "1 core each"),
        ("Redis", f"{size.redis_nodes} nodes", f"1 core and {_bytes(size.redis_memory)} each"),
        ("Kafka", "3 brokers", f"{_bytes(size.kafka_disk)} of disk in all"),
        ("PostgreSQL", "1 database", f"{_bytes(size.postgres_disk)} of disk"),
    ]
    lines = [
        f"First second: {size.accepted:,} requests accepted, {size.refused:,} refused",
        table("PART NUMBER SIZE", rows),
    ]
    if size.redis_primaries > 1:
        lines.append(
            f"One sale uses one core of Redis. Split the units over {size.redis_primaries} items, "
            "each on a Redis of its own: in a release of its own, or on another primary of a Redis "
            "Cluster. Otherwise buyers can get 503 in the first second."
        )
    return "\n".join(lines)


def _bytes(number: int) -> str:
    """Returns a size in MB, or in GB from 1 GB on, rounded up."""
    if number < 1_000_000_000:
        return f"{ceil(number / 1_000_000):,} MB"
    return f"{ceil(number / 100_000_000) / 10:,.1f} GB"


@flashsalectl.command(
    epilog="\b\nExamples:\n  flashsalectl size --buyers 100000 --stock 100\n"
    "  flashsalectl size --buyers 10000 --stock 10000 --hold 600 -o json"
)
@click.option(
    "--buyers",
    required=True,
    type=click.IntRange(1, MAX_BUYERS),
    help="Requests in the first second.",
)
@click.option(
    "--stock",
    required=True,
    type=click.IntRange(1, MAX_STOCK),
    help="Units of the sale.",
)
@click.option(
    "--hold",
    "hold_seconds",
    metavar="SECONDS",
    type=click.IntRange(1, MAX_HOLD_SECONDS),
    help="The sale's holdSeconds. [no holds]",
)
@output_option("table", "json")
def size(buyers: int, stock: int, hold_seconds: int | None, output: str) -> int:
    """Compute the pods, memory and disks that a sale needs. Needs no server.

    The figures behind it are in docs/operations.md, "Sizing".
    """
    needed = size_of(buyers, stock, hold_seconds)
    if output == "json":
        print(json_of(needed))
    else:
        print(text_of(needed))
    return 0
