"""Rebuild a fenced sale in Redis from the ledger.

The steps, in this order:

1. The ledger gives the rebuild a revision, which is its name.
2. The sale is fenced for the rebuild. If its keys are lost, a marker takes their place.
3. The rebuild waits until no event of the sale is in flight (drain.py).
4. The ledger notes the rebuild. From then on it refuses events that were accepted before and are
   not in it yet.
5. Buyers and reservations are written to Redis.
6. The sale is stamped with Redis' run, and the API accepts reservations again.

If PostgreSQL or Kafka cannot confirm a step, the sale stays fenced.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple

import asyncpg

from flashsale import events, ledger
from flashsale.errors import ContractViolation, FlashsaleError
from flashsale.inventory import Inventory
from flashsale.ledger import Connection, SaleRow
from flashsale.reservations import Record, State
from flashsale.sale import Predecessor, Sale
from flashsale_operator.sales import engine
from flashsale_operator.sales.decision import StillFenced, counted, spec_of
from flashsale_operator.sales.drain import Drain, NotDrained
from flashsale_operator.sales.offsets import KafkaUnavailable
from flashsale_operator.sales.recovery import (
    LEASE_MS,
    RESTORE_PAGE,
    Fenced,
    Recovery,
    Step,
    Trusted,
)

_CLAIM: Final = """
UPDATE sales SET revision = greatest(revision, $2) + 1, updated_at = now()
WHERE sale_id = $1 RETURNING *
"""
# If the keys are older than the last noted rebuild, that rebuild has counted their lost units.
_NOTE: Final = """
UPDATE sales SET rebuilt_revision = $2, updated_at = now(),
  lost = lost + CASE WHEN rebuilt_revision > $4::bigint THEN 0
                     ELSE greatest(0, $3::bigint - accepted) END
WHERE sale_id = $1 AND revision = $2
RETURNING accepted, released, held, lost
"""
HOLD_MS: Final = 60_000
"""The shortest time until the end of a restored hold, in milliseconds. A hold that was shorter gets
its whole time again."""
_RESERVATIONS: Final = """
SELECT id, state, version, quantity, accepted_ms, user_id, request_key,
       CASE WHEN state <> 'held' THEN expires_ms
            ELSE greatest(expires_ms, $2::bigint + least($3::bigint, expires_ms - accepted_ms))
       END AS expires_ms,
       confirmed_ms, order_ref
FROM (
  SELECT reservation_id::text AS id, state, version, quantity, user_id,
         (extract(epoch FROM accepted_at) * 1000)::bigint AS accepted_ms,
         (extract(epoch FROM expires_at) * 1000)::bigint AS expires_ms,
         (extract(epoch FROM confirmed_at) * 1000)::bigint AS confirmed_ms,
         coalesce(request_key, '') AS request_key, coalesce(order_ref, '') AS order_ref
  FROM reservations WHERE sale_id = $1 AND state <> 'refused'
) r
"""
# A buyer without units stays, because a sale without the key of its buyers counts as torn.
_BUYERS: Final = """
SELECT user_id,
       coalesce(sum(quantity) FILTER (WHERE state IN ('held', 'confirmed')), 0)::bigint AS units,
       count(*) FILTER (WHERE state = 'expired') AS expired
FROM reservations WHERE sale_id = $1 AND state <> 'refused' GROUP BY user_id
"""
WRITES_AT_ONCE: Final = 4
"""Rebuilds that write to Redis at the same time. Each keeps a connection to the ledger meanwhile,
and reconciles need some, too."""
_INTERRUPTED: Final = {
    Fenced.REBUILDING: "another operator or flashsalectl is rebuilding it",
    Fenced.SUPERSEDED: "another process changed or rebuilt it: the rebuild starts again",
    Fenced.UNDRAINED: "the outbox has events that Kafka has not acknowledged",
    Fenced.CONFLICT: "Redis has another sale of the item",
    Trusted.SUPERSEDED: "another process changed or rebuilt it: the rebuild starts again",
    Trusted.RESTARTED: "Redis restarted during the rebuild: it starts again",
    Trusted.INCOMPLETE: "Redis lost a part of the rebuild: it starts again",
}


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A sale that is trusted again. `accepted`, `redis_lacked` and `lost` are units.

    - `redis_lacked` were in the ledger and missing in Redis.
    - `lost` had been accepted by Redis and are not in the ledger: their events are lost, or the
      ledger refused them.
    - `seconds` is the time of the writing, without the wait for events in flight. It is 0 if the
      sale was trusted already, so that nothing was written.
    - `revision` is the ledger revision that this rebuild took. It identifies the rebuild.
    """

    accepted: int
    reservations: int = 0
    redis_lacked: int = 0
    lost: int = 0
    seconds: float = 0.0
    revision: int = 0

    @property
    def changed(self) -> bool:
        """Whether the rebuild restored or missed anything."""
        return bool(self.reservations or self.redis_lacked or self.lost)

    def after(self, former: "Rebuilt | None") -> "Rebuilt":
        """Returns the outcome of this rebuild and of a former one that was not reported yet."""
        if former is None or not former.changed:
            return self
        if not self.changed:
            return former
        redis_lacked = former.redis_lacked + self.redis_lacked
        return replace(self, redis_lacked=redis_lacked, lost=former.lost + self.lost)

    def __str__(self) -> str:
        return (
            f"restored {counted(self.accepted, 'accepted unit')} in "
            f"{counted(self.reservations, 'reservation')} from the ledger; "
            f"missing in Redis: {self.redis_lacked}; lost: {self.lost}"
        )


class _Written(NamedTuple):
    """The numbers of records that a rebuild has written."""

    reservations: int
    buyers: int
    holds: int


class _Interrupted(FlashsaleError):
    """Another process or a restart of Redis ended the rebuild."""

    def __init__(self, answer: Fenced | Trusted) -> None:
        super().__init__(_INTERRUPTED[answer])


class Rebuilder:
    """Rebuilds sales. Any number may work at once: one of them rebuilds a sale.

    It calls `progress` with a sale's id and each new step. It remembers the lost units that an
    interrupted rebuild has noted, because the next one cannot see them any more.
    """

    def __init__(
        self,
        inventory: Inventory,
        pool: ledger.Pool,
        drain: Drain,
        progress: Callable[[str, str], None] = lambda _sale_id, _step: None,
    ) -> None:
        self._inventory = inventory
        self._recovery = Recovery(inventory.redis, inventory.engine)
        self._topic = events.topic(inventory.engine)
        self._pool = pool
        self._drain = drain
        self._progress = progress
        self._writes = asyncio.Semaphore(WRITES_AT_ONCE)
        self._lost: dict[str, int] = {}
        self._noting: dict[str, SaleRow] = {}
        """Rows of rebuilds whose last note may be committed or not."""

    async def rebuild(
        self, row: SaleRow, replaces: Predecessor | None = None
    ) -> Rebuilt | StillFenced:
        """Restores a sale, or returns why it stays fenced.

        `replaces` is the finished sale that has the item in Redis. Raises `RedisUnavailable`,
        `LedgerUnavailable` and `ContractViolation`. Another call starts from the beginning.
        """
        try:
            return await self._rebuild(row.sale_id, row.item_id, replaces)
        except NotDrained as error:
            return StillFenced(error.why)
        except KafkaUnavailable as error:
            return StillFenced((str(error),), without_kafka=True)
        except _Interrupted as error:
            return StillFenced((str(error),))

    async def _rebuild(self, sale_id: str, item_id: str, replaces: Predecessor | None) -> Rebuilt:
        engine_id = await engine.claimed_id(self._inventory, self._pool)
        run_id = (await self._inventory.server(item_id)).run_id
        had = (await self._inventory.sales([item_id])).get(item_id)
        if had is not None and had.sale_id != sale_id:
            had = None
        if had is None:
            # Another process may have inserted the row of a new sale and be about to seed it.
            await asyncio.sleep(self._drain.patience.seeding)
        if await self._recovery.rebuilding(item_id):
            raise _Interrupted(Fenced.REBUILDING)
        row = await self._claim(sale_id, above=0 if had is None else had.revision)
        spec, claim = spec_of(row), row.revision

        async def fence(step: Step, lease_ms: int = LEASE_MS) -> Fenced:
            answer = await self._recovery.fence(
                spec,
                claim,
                step=step,
                recorded=row.accepted,
                held=row.held,
                rebuilt=row.rebuilt_revision,
                engine_id=engine_id,
                run_id=run_id,
                closed=row.closed,
                replaces=replaces,
                lease_ms=lease_ms,
            )
            engine.require_own_sale(answer, item_id)
            if answer in _INTERRUPTED:
                raise _Interrupted(answer)
            return answer

        async def keep_fenced() -> None:
            await fence("wait")

        await self._inventory.index.add([item_id])
        if await fence("fence") is Fenced.TRUSTED:
            if row.closed:  # Redis may have missed it
                await self._inventory.close(item_id, sale_id, claim, engine_id)
            return Rebuilt(row.accepted, lost=self._lost.pop(sale_id, 0), revision=claim)
        try:
            offsets = await self._drain.wait(item_id, keep_fenced, partial(self._progress, sale_id))
        except (NotDrained, KafkaUnavailable):
            await fence("wait", lease_ms=0)  # so that the next rebuild need not wait for this one
            raise
        async with self._turn_to_write(keep_fenced):
            began = time.monotonic()
            accepted, released, held = await self._note(row, offsets, had)
            await fence("begin")
            now_ms = (await self._inventory.server(item_id)).now_ms
            written = await self._write(
                row, now_ms if had is None else max(now_ms, had.last_now_ms)
            )
            ended = await self._recovery.trust(
                item_id,
                claim,
                run_id,
                accepted=accepted,
                released=released,
                held=held,
                **written._asdict(),
            )
        if ended is not Trusted.TRUSTED:
            raise _Interrupted(ended)
        return Rebuilt(
            accepted=accepted,
            reservations=written.reservations,
            redis_lacked=max(0, accepted - (0 if had is None else had.accepted)),
            lost=self._lost.pop(sale_id, 0),
            seconds=time.monotonic() - began,
            revision=claim,
        )

    @asynccontextmanager
    async def _turn_to_write(
        self, keep_fenced: Callable[[], Awaitable[None]]
    ) -> AsyncIterator[None]:
        while self._writes.locked():
            await keep_fenced()
            await asyncio.sleep(self._drain.patience.between)
        async with self._writes:
            yield

    async def _claim(self, sale_id: str, *, above: int) -> SaleRow:
        """Takes the sale's next revision for this rebuild."""
        async with ledger.transaction(self._pool) as connection:
            record = await connection.fetchrow(_CLAIM, sale_id, above)
        if record is None:
            raise ContractViolation(
                f"{sale_id}: the ledger has lost its row: apply its manifest again"
            )
        self._noted(sale_id, record["rebuilt_revision"], record["lost"])
        return SaleRow.of(record)

    async def _note(
        self, row: SaleRow, offsets: Mapping[int, int], had: Sale | None
    ) -> tuple[int, int, int]:
        """Makes the ledger refuse events from before the rebuild that it does not have yet.

        The ledger also counts the units that it lacks of `had`, which is the sale in Redis.
        Returns the accepted, released and held units, which are now final for the rebuild. Raises
        `_Interrupted` if the sale was changed or claimed since, or if the ledger was replaced by an
        older copy.
        """
        self._noting[row.sale_id] = row
        async with ledger.transaction(self._pool) as connection:
            # In the order of the tables' locks in schema.py.
            stored = await ledger.stored_offsets(connection, self._topic)
            accepted, rebuilt = (0, None) if had is None else (had.accepted, had.rebuilt)
            counts = await connection.fetchrow(_NOTE, row.sale_id, row.revision, accepted, rebuilt)
            if counts is None or any(
                stored.get(number, 0) < offset for number, offset in offsets.items()
            ):
                raise _Interrupted(Fenced.SUPERSEDED)
        self._noted(row.sale_id, row.revision, counts["lost"])
        return counts["accepted"], counts["released"], counts["held"]

    def _noted(self, sale_id: str, revision: int, lost: int) -> None:
        """Remembers the units that the last note added, if the ledger has it.

        `revision` is that of the ledger's last note, and `lost` are the units of all notes. If the
        reply to a commit is lost, only the next rebuild sees them.
        """
        row = self._noting.pop(sale_id, None)
        if row is not None and row.revision == revision:
            self._lost[sale_id] = self._lost.get(sale_id, 0) + lost - row.lost

    async def _write(self, row: SaleRow, now_ms: int) -> _Written:
        """Writes the ledger's records. `now_ms` is the time of the sale by Redis' clock."""
        buyers = reservations = holds = 0
        async with ledger.transaction(self._pool, snapshot=True) as connection:
            async for page in _pages(connection, _BUYERS, row.sale_id):
                found = {record["user_id"]: (record["units"], record["expired"]) for record in page}
                _expect_restored(
                    await self._recovery.restore(row.item_id, row.revision, buyers=found)
                )
                buyers += len(page)
            async for page in _pages(connection, _RESERVATIONS, row.sale_id, now_ms, HOLD_MS):
                records = [
                    (record["id"], Record._make(record[name] for name in Record._fields))
                    for record in page
                ]
                _expect_restored(
                    await self._recovery.restore(row.item_id, row.revision, records=records)
                )
                reservations += len(page)
                holds += sum(record.state == State.HELD for _, record in records)
                self._progress(row.sale_id, f"{counted(reservations, 'reservation')} written")
        return _Written(reservations, buyers, holds)


def _expect_restored(answer: Trusted) -> None:
    if answer is not Trusted.RESTORED:
        raise _Interrupted(answer)


async def _pages(
    connection: Connection, query: str, *arguments: object
) -> AsyncIterator[list[asyncpg.Record]]:
    page: list[asyncpg.Record] = []
    rows = connection.cursor(query, *arguments, prefetch=RESTORE_PAGE, timeout=ledger.SUM_SECONDS)
    async for record in rows:
        page.append(record)
        if len(page) == RESTORE_PAGE:
            yield page
            page = []
    if page:
        yield page
