"""Rebuilds a fenced sale in Redis from the ledger.

In this order: the sale is fenced, or a marker put where its keys are gone; the outbox that
survived is drained and every living pod holds nothing of it; the ledger has read the topic to its
end (the barrier); buyers and reservations are written; the run id is stamped last. Until then the
API answers 503. What PostgreSQL or Kafka cannot show now, keeps the sale fenced.
"""

import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import asyncpg
from redis.asyncio import Redis

from flashsale import ledger
from flashsale.errors import ContractViolation
from flashsale.inventory import Inventory
from flashsale.ledger import SaleRow
from flashsale.recovery import PAGE, Fenced, Recovery, Trusted
from flashsale.reservations import Record
from flashsale_operator.reconcile import Differs, spec_of
from flashsale_operator.verification import Barrier

_RESERVATIONS = """
SELECT reservation_id::text AS id, state, version, quantity, user_id,
       (extract(epoch FROM occurred_at) * 1000)::bigint AS occurred_ms,
       coalesce(request_key, '') AS request_key
FROM reservations WHERE sale_id = $1 AND state <> 'refused'
"""
_COUNTS = "SELECT accepted, released FROM sales WHERE sale_id = $1"
_BUYERS = """
SELECT user_id, sum(quantity) AS units
FROM reservations WHERE sale_id = $1 AND state = 'accepted' GROUP BY user_id
"""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A sale that is trusted again; counts are units but for `reservations` and `seconds`.

    `redis_lacked` were in the ledger and not in Redis. `lost` were accepted by the Redis that came
    back and are not in the ledger: their events are nowhere, or were refused.
    """

    accepted: int
    reservations: int
    redis_lacked: int
    lost: int
    seconds: float


class Rebuild:
    """Rebuilds sales; any number may work at once, also on the same sale: one of them ends it."""

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

    async def rebuild(self, row: SaleRow) -> Rebuilt | Differs:
        """Brings a sale back, or says what keeps it fenced.

        Raises `RedisUnavailable` and `LedgerUnavailable`; doing it again begins anew.
        """
        spec, finished = spec_of(row), "closed" if row.closed else None
        fenced = await self._recovery.fence(spec, row.revision, finished=finished)
        if fenced is Fenced.TRUSTED:
            return Rebuilt(row.accepted, 0, 0, 0, 0.0)
        if fenced is not Fenced.FENCED:
            return _kept(row, fenced)
        if found := await self._barrier.settled(row.sale_id, row.item_id):
            return Differs(found)
        began = time.monotonic()
        run_id = (await self._inventory.server()).run_id
        had = (await self._inventory.sales([row.item_id])).get(row.item_id)
        token = uuid.uuid4().hex
        fenced = await self._recovery.fence(spec, row.revision, finished=finished, token=token)
        if fenced is not Fenced.BEGUN:
            return _kept(row, fenced)
        written = await self._write(row, token)
        ended = await self._recovery.trust(
            row.item_id,
            token,
            run_id,
            accepted=written.accepted,
            released=written.released,
            reservations=written.reservations,
            buyers=written.buyers,
        )
        if ended is not Trusted.TRUSTED:
            return Differs((f"the rebuild was {ended}: it begins again",))
        redis_had = 0 if had is None else had.accepted
        return Rebuilt(
            accepted=written.accepted,
            reservations=written.reservations,
            redis_lacked=max(0, written.accepted - redis_had),
            lost=max(0, redis_had - written.accepted),
            seconds=time.monotonic() - began,
        )

    async def _write(self, row: SaleRow, token: str) -> "_Written":
        """Writes buyers and reservations, as the ledger has them at one moment."""
        async with (
            ledger.translated(),
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            counts = await connection.fetchrow(_COUNTS, row.sale_id)
            if counts is None:
                raise ContractViolation(f"{row.sale_id}: the ledger has no row of it any more")
            buyers = reservations = 0
            async for page in _pages(connection, _BUYERS, row.sale_id):
                held = {record["user_id"]: int(record["units"]) for record in page}
                await self._recovery.restore(row.item_id, token, buyers=held)
                buyers += len(page)
            async for page in _pages(connection, _RESERVATIONS, row.sale_id):
                records = [(record["id"], _record(record)) for record in page]
                await self._recovery.restore(row.item_id, token, records=records)
                reservations += len(page)
                self._progress(f"{row.sale_id}: rebuilding: {reservations} reservations written")
        return _Written(counts["accepted"], counts["released"], reservations, buyers)


@dataclass(frozen=True, slots=True)
class _Written:
    accepted: int
    released: int
    reservations: int
    buyers: int


def _kept(row: SaleRow, fenced: Fenced) -> Differs:
    """Why a rebuild could not begin."""
    match fenced:
        case Fenced.UNSUPPORTED:
            raise ContractViolation(f"{row.item_id}: Redis has a sale this version cannot read")
        case Fenced.CONFLICT:
            return Differs((f"Redis has another sale of {row.item_id}",))
        case Fenced.UNDRAINED:
            return Differs(("the outbox has events that Kafka has not",))
        case _:
            return Differs(("somebody else has rebuilt it meanwhile",))


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
