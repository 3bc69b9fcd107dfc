"""Checks every reservation that a crowd was promised against the ledger."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import asyncpg

from dev.journal import Journal
from dev.services import Addresses
from flashsale import events, ledger, redis_client
from flashsale.outbox import Outbox
from flashsale.settings import KafkaSettings
from flashsale_operator.sales import offsets

QUIET_SECONDS: Final = 90.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the check for one sale.

    `sold`, `allocated` and `oversold` are units. Units that were given back are not sold. `lost`
    counts promised reservations without a row. `duplicates` counts users above the sale's limit and
    keys with more than one reservation.
    """

    sold: int
    allocated: int
    oversold: int
    lost: int
    duplicates: int

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not (self.oversold or self.lost or self.duplicates)

    def __str__(self) -> str:
        return (
            f"sold {self.sold} of {self.allocated}, oversold {self.oversold}, "
            f"lost {self.lost}, duplicates {self.duplicates}"
        )


async def quiet(addresses: Addresses, items: Sequence[str]) -> None:
    """Wait until the items' outboxes are empty and the ledger has every event of the topic.

    Raises TimeoutError after `QUIET_SECONDS`.
    """
    client = redis_client.connect(addresses.redis_url)
    pool = await ledger.connect(addresses.database_url)
    kafka = KafkaSettings(kafka_bootstrap=addresses.kafka_bootstrap, engine=addresses.engine)
    try:
        async with asyncio.timeout(QUIET_SECONDS):
            while True:
                waiting = await Outbox(client, addresses.engine).lengths(items)
                partitions = await offsets.spans(kafka)
                stored = await ledger.stored_offsets(pool, events.topic(addresses.engine))
                if not any(waiting.values()) and all(
                    stored.get(number, span.first) >= span.end
                    for number, span in partitions.items()
                ):
                    return
                await asyncio.sleep(0.1)
    finally:
        await pool.close()
        await client.aclose()


async def judge(
    addresses: Addresses, sale_id: str, journal: Journal
) -> tuple[Verdict, dict[str, float]]:
    """Return the verdict on one sale, and the Unix time at which each reservation was recorded.

    Raises LookupError if the ledger has no such sale.
    """
    connection = await asyncpg.connect(addresses.database_url)
    try:
        sale = await connection.fetchrow(
            "SELECT allocated, max_per_user FROM sales WHERE sale_id = $1", sale_id
        )
        rows = await connection.fetch(
            "SELECT reservation_id::text AS id, user_id, recorded_at, "
            "CASE WHEN state IN ('held', 'confirmed') THEN quantity ELSE 0 END AS units "
            "FROM reservations WHERE sale_id = $1 AND state <> 'refused'",
            sale_id,
        )
    finally:
        await connection.close()
    if sale is None:
        raise LookupError(f"the ledger has no sale {sale_id}")
    promised = journal.accepted()
    recorded = {row["id"]: row["recorded_at"].timestamp() for row in rows}
    sold = sum(row["units"] for row in rows)
    taken: Counter[str] = Counter()
    for row in rows:
        taken[row["user_id"]] += row["units"]
    above = sum(units > sale["max_per_user"] for units in taken.values())
    verdict = Verdict(
        sold=sold,
        allocated=sale["allocated"],
        oversold=max(0, sold - sale["allocated"]),
        lost=len(promised.keys() - recorded.keys()),
        duplicates=above + len(journal.broken_keys()),
    )
    return verdict, recorded
