"""Waits until the consumer has announced recorded reservations."""

from tests.support.consumer import Log
from tests.support.eventually import until
from tests.support.ledgers import Ledger
from tests.support.recorded import Receiver, received


async def until_announced(ledger: Ledger, log: Log, count: int) -> Receiver:
    """Wait until the receiver knows exactly the ledger's reservations, and return its view."""
    found = Receiver()

    async def look() -> bool:
        nonlocal found
        found = await received(log.bootstrap, log.engine)
        return len(found.reservations) == count and await found.agrees(ledger.pool)

    await until(look, lambda: f"{len(found.reservations)} reservations are announced")
    return found


async def offsets(ledger: Ledger) -> tuple[int, int]:
    """Return how many events are recorded, and how many of them are announced."""
    row = await ledger.pool.fetchrow(
        "SELECT sum(next_offset)::int, sum(announced_offset)::int FROM kafka_offsets"
    )
    assert row is not None
    return row[0] or 0, row[1] or 0


async def until_offsets(ledger: Ledger, recorded: int, announced: int) -> None:
    found = (0, 0)

    async def look() -> bool:
        nonlocal found
        found = await offsets(ledger)
        return found == (recorded, announced)

    await until(look, lambda: f"recorded and announced are {found}")
