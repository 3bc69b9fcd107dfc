"""Rebuilds a fenced sale in Redis from the ledger.

In this order: the ledger gives the rebuild a revision, which names it; the sale is fenced for it,
or a marker put where its keys are gone; the outbox that survived is drained, every living pod
holds nothing of it, and the ledger has read the topic to its end (barrier.py); the ledger notes
that it refuses from now on what was accepted before and was not in it; buyers and reservations are
written; the run is stamped last. Until then the API answers 503. What PostgreSQL or Kafka cannot
show now, keeps the sale fenced.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import asyncpg
from redis.asyncio import Redis

from flashsale import events, ledger
from flashsale.errors import ContractViolation, FlashsaleError
from flashsale.inventory import Inventory
from flashsale.ledger import SaleRow
from flashsale.reservations import Record
from flashsale.sale import Predecessor
from flashsale_operator.sales.decision import Kept, spec_of
from flashsale_operator.sales.drain import Barrier, Unsettled
from flashsale_operator.sales.offsets import KafkaUnavailable
from flashsale_operator.sales.recovery import LEASE_MS, PAGE, Fenced, Recovery, Trusted

_CLAIM: Final = """
UPDATE sales SET revision = greatest(revision, $2) + 1, updated_at = now()
WHERE sale_id = $1 RETURNING *
"""
_NOTE: Final = """
UPDATE sales SET rebuilt_revision = $2, lost = lost + greatest(0, $3::bigint - accepted),
  updated_at = now()
WHERE sale_id = $1 AND revision = $2
RETURNING accepted, released
"""
_OFFSETS: Final = "SELECT partition, next_offset FROM kafka_offsets WHERE topic = $1"
_RESERVATIONS: Final = """
SELECT reservation_id::text AS id, state, version, quantity, user_id,
       (extract(epoch FROM occurred_at) * 1000)::bigint AS occurred_ms,
       coalesce(request_key, '') AS request_key
FROM reservations WHERE sale_id = $1 AND state <> 'refused'
"""
_BUYERS: Final = """
SELECT user_id, sum(quantity) AS units
FROM reservations WHERE sale_id = $1 AND state = 'accepted' GROUP BY user_id
"""
_ENDED_OTHERWISE: Final = {
    Fenced.REBUILDING: "another operator or flashsalectl rebuilds it",
    Fenced.SUPERSEDED: "it was changed or rebuilt by another meanwhile: it begins again",
    Fenced.UNDRAINED: "the outbox has events that Kafka has not",
    Fenced.CONFLICT: "Redis has another sale of the item",
    Trusted.SUPERSEDED: "it was changed or rebuilt by another meanwhile: it begins again",
    Trusted.RESTARTED: "Redis restarted meanwhile: it begins again",
    Trusted.INCOMPLETE: "Redis does not hold what was written: it begins again",
}


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A sale that is trusted again; counts are units but for `reservations` and `seconds`.

    `redis_lacked` were in the ledger and not in Redis. `lost` were accepted by the Redis that came
    back and are not in the ledger: their events are nowhere, or were refused. `seconds` is how
    long it took to write, without the wait for what was on its way.
    """

    accepted: int
    reservations: int = 0
    redis_lacked: int = 0
    lost: int = 0
    seconds: float = 0.0

    @property
    def brought(self) -> bool:
        """Whether there was anything to bring back, or to miss."""
        return bool(self.reservations or self.redis_lacked or self.lost)

    def __str__(self) -> str:
        lost = f"; {self.lost} that Redis had accepted are not recorded" if self.lost else ""
        return (
            f"{self.accepted} accepted units in {self.reservations} reservations came from the "
            f"ledger, {self.redis_lacked} of them gone from Redis{lost}"
        )


class _Superseded(FlashsaleError):
    """The rebuild has come to an end that is not its own."""

    def __init__(self, answer: Fenced | Trusted) -> None:
        super().__init__(_ENDED_OTHERWISE[answer])


class Rebuild:
    """Rebuilds sales; any number may work at once, also on the same sale: one of them does it."""

    def __init__(
        self,
        redis: "Redis",
        pool: "asyncpg.Pool[asyncpg.Record]",
        barrier: Barrier,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._inventory = Inventory(redis)
        self._recovery = Recovery(redis)
        self._pool = pool
        self._barrier = barrier
        self._progress = progress

    async def rebuild(self, row: SaleRow, replaces: Predecessor | None = None) -> Rebuilt | Kept:
        """Brings a sale back, or says what keeps it fenced.

        `replaces`: the finished sale that Redis has for the item, whose rows are recorded, and its
        accepted units. Raises `RedisUnavailable`, `LedgerUnavailable` and `ContractViolation`;
        doing it again begins anew.
        """
        try:
            return await self._rebuild(row.sale_id, row.item_id, replaces)
        except Unsettled as error:
            return Kept(error.why)
        except KafkaUnavailable as error:
            return Kept((str(error),), without_kafka=True)
        except _Superseded as error:
            return Kept((str(error),))

    async def _rebuild(self, sale_id: str, item_id: str, replaces: Predecessor | None) -> Rebuilt:
        run_id = (await self._inventory.server()).run_id
        had = (await self._inventory.sales([item_id])).get(item_id)
        if had is not None and had.sale_id != sale_id:
            had = None
        if had is None:
            # Another operator may have written a new sale's row just now and be about to seed.
            await asyncio.sleep(self._barrier.patience.seeding)
        if await self._recovery.rebuilding(item_id):
            raise _Superseded(Fenced.REBUILDING)
        row = await self._claim(sale_id, above=0 if had is None else had.revision)
        spec, claim = spec_of(row), row.revision

        async def fence(*, begin: bool = False, lease_ms: int = LEASE_MS) -> Fenced:
            answer = await self._recovery.fence(
                spec,
                claim,
                closed=row.closed,
                replaces=replaces,
                begin=begin,
                lease_ms=lease_ms,
            )
            if answer is Fenced.UNSUPPORTED:
                raise ContractViolation(f"{item_id}: Redis has a sale this version cannot read")
            if answer in _ENDED_OTHERWISE:
                raise _Superseded(answer)
            return answer

        async def look_after() -> None:
            if await fence() is Fenced.TRUSTED:
                raise _Superseded(Fenced.SUPERSEDED)

        if await fence() is Fenced.TRUSTED:
            return Rebuilt(row.accepted)
        try:
            offsets = await self._barrier.settled(sale_id, item_id, look_after)
        except (Unsettled, KafkaUnavailable):
            await fence(lease_ms=0)  # the next one need not wait for this one
            raise
        began = time.monotonic()
        redis_had = 0 if had is None else had.accepted
        accepted, released = await self._note(sale_id, claim, offsets, redis_had)
        await fence(begin=True)
        reservations, buyers = await self._write(row, claim)
        ended = await self._recovery.trust(
            item_id,
            claim,
            run_id,
            accepted=accepted,
            released=released,
            reservations=reservations,
            buyers=buyers,
        )
        if ended is not Trusted.TRUSTED:
            raise _Superseded(ended)
        return Rebuilt(
            accepted=accepted,
            reservations=reservations,
            redis_lacked=max(0, accepted - redis_had),
            lost=max(0, redis_had - accepted),
            seconds=time.monotonic() - began,
        )

    async def _claim(self, sale_id: str, *, above: int) -> SaleRow:
        """Takes the next revision of the sale for this rebuild."""
        async with ledger.translated():
            record = await self._pool.fetchrow(_CLAIM, sale_id, above)
        if record is None:
            raise ContractViolation(f"{sale_id}: the ledger has no row of it any more")
        return SaleRow.of(record)

    async def _note(
        self, sale_id: str, claim: int, offsets: Mapping[int, int], redis_had: int
    ) -> tuple[int, int]:
        """Has the ledger refuse from now on what the rebuild will not have seen; returns the units
        that it has accepted and released, which stay what they are.

        Not if the sale was changed or claimed since, or the ledger is an older copy by now.
        """
        async with (
            ledger.translated(),
            self._pool.acquire() as connection,
            connection.transaction(),
        ):
            counts = await connection.fetchrow(_NOTE, sale_id, claim, redis_had)
            stored = {
                record["partition"]: record["next_offset"]
                for record in await connection.fetch(_OFFSETS, events.TOPIC)
            }
            if counts is None or any(
                stored.get(number, 0) < offset for number, offset in offsets.items()
            ):
                raise _Superseded(Fenced.SUPERSEDED)
            return counts["accepted"], counts["released"]

    async def _write(self, row: SaleRow, claim: int) -> tuple[int, int]:
        """Writes what the ledger has; returns the number of reservations and of buyers."""
        buyers = reservations = 0
        async with (
            ledger.translated(),
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            async for page in _pages(connection, _BUYERS, row.sale_id):
                held = {record["user_id"]: int(record["units"]) for record in page}
                _expect_restored(await self._recovery.restore(row.item_id, claim, buyers=held))
                buyers += len(page)
            async for page in _pages(connection, _RESERVATIONS, row.sale_id):
                records = [(record["id"], _record(record)) for record in page]
                _expect_restored(await self._recovery.restore(row.item_id, claim, records=records))
                reservations += len(page)
                self._progress(f"{row.sale_id}: {reservations} reservations written")
        return reservations, buyers


def _expect_restored(answer: Trusted) -> None:
    if answer is not Trusted.RESTORED:
        raise _Superseded(answer)


async def _pages(
    connection: "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]", query: str, sale_id: str
) -> AsyncIterator[list[asyncpg.Record]]:
    page: list[asyncpg.Record] = []
    async for record in connection.cursor(query, sale_id, prefetch=PAGE):
        page.append(record)
        if len(page) == PAGE:
            yield page
            page = []
    if page:
        yield page


def _record(record: asyncpg.Record) -> Record:
    return Record(
        state=record["state"],
        version=record["version"],
        quantity=record["quantity"],
        occurred_ms=record["occurred_ms"],
        user_id=record["user_id"],
        request_key=record["request_key"],
    )
