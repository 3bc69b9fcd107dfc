"""Rebuilds beside the reconciles: a fenced sale waits for its own, no other sale does."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import asyncpg
from redis.asyncio import Redis

from flashsale.errors import FlashsaleError
from flashsale.ledger import SaleRow
from flashsale.sale import Predecessor
from flashsale_operator.sales.decision import Kept
from flashsale_operator.sales.drain import Barrier, Patience, Spans
from flashsale_operator.sales.offsets import Span
from flashsale_operator.sales.rebuild import Rebuild, Rebuilt

log = logging.getLogger(__name__)

AT_ONCE: Final = 32
"""Rebuilds that run at the same time; a restarted Redis fences every sale."""
PATIENCE: Final = Patience(between=0.5)
AGAIN_SECONDS: Final = 10.0
"""After a rebuild that was kept from its end, until the next one of the sale."""


@dataclass(slots=True)
class _Case:
    """A sale that is being rebuilt, or was. `ended` is of the monotonic clock; what kept the
    rebuild before it is told until this one has come to something.
    """

    task: "asyncio.Task[None]"
    told: Kept
    result: Rebuilt | Kept | FlashsaleError | None = None
    ended: float = 0.0


class Rebuilds:
    """The rebuilds of all sales.

    `rebuild` never waits: it says what keeps the sale, if only that it is being rebuilt. `wake` is
    called with a sale's id when there is news.
    """

    def __init__(
        self,
        redis: "Redis",
        pool: "asyncpg.Pool[asyncpg.Record]",
        spans: Spans,
        wake: Callable[[str], None],
        *,
        patience: Patience = PATIENCE,
    ) -> None:
        self._redis = redis
        self._pool = pool
        self._spans = Shared(spans)
        self._wake = wake
        self._patience = patience
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._cases: dict[str, _Case] = {}

    async def rebuild(self, row: SaleRow, replaces: Predecessor | None = None) -> Kept:
        """As `Rebuild.rebuild`, beside the caller."""
        case = self._cases.get(row.sale_id)
        if case is None:
            case = self._begin(row, replaces)
        match case.result:
            case None:
                return case.told
            case Kept():
                if time.monotonic() - case.ended >= AGAIN_SECONDS:
                    self._begin(row, replaces, case.result)
                return case.result
            case Rebuilt():  # and fenced again since
                return self._begin(row, replaces).told
            case error:
                del self._cases[row.sale_id]
                raise error

    def forget(self, sale_id: str) -> Rebuilt | None:
        """Ends what is done about a sale that needs no rebuild any more; says what came of it."""
        case = self._cases.pop(sale_id, None)
        if case is None:
            return None
        case.task.cancel()
        return case.result if isinstance(case.result, Rebuilt) else None

    async def close(self) -> None:
        """Ends all of them."""
        tasks = [case.task for case in self._cases.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(
        self, row: SaleRow, replaces: Predecessor | None, before: Kept | None = None
    ) -> _Case:
        task = asyncio.create_task(self._rebuild(row, replaces, first=before is None))
        told = before or _rebuilding("waiting for its turn")
        case = self._cases[row.sale_id] = _Case(task, told)
        return case

    async def _rebuild(self, row: SaleRow, replaces: Predecessor | None, *, first: bool) -> None:
        sale_id = row.sale_id
        case = self._cases[sale_id]

        def progress(line: str) -> None:
            if first:
                case.told = _rebuilding(line.removeprefix(f"{sale_id}: "))

        result: Rebuilt | Kept | FlashsaleError
        try:
            async with self._turns:
                barrier = Barrier(
                    self._redis, self._pool, self._spans, patience=self._patience, progress=progress
                )
                rebuild = Rebuild(self._redis, self._pool, barrier, progress)
                result = await rebuild.rebuild(row, replaces)
        except FlashsaleError as error:
            result = error
        except Exception:
            # A mistake here must not leave the sale waiting for a result without end.
            log.exception("%s: the rebuild failed", sale_id)
            result = Kept(("the rebuild failed: see the operator's log",))
        if result != case.told:
            log.info("%s: rebuild: %s", sale_id, result)
        case.result, case.ended = result, time.monotonic()
        self._wake(sale_id)


def _rebuilding(doing: str) -> Kept:
    return Kept((f"being rebuilt from the ledger: {doing}",))


class Shared:
    """One call for all who ask at the same time: each gets one that began after it asked."""

    def __init__(self, call: Spans) -> None:
        self._call = call
        self._running: asyncio.Task[Mapping[int, Span]] | None = None
        self._next: asyncio.Task[Mapping[int, Span]] | None = None

    async def __call__(self) -> Mapping[int, Span]:
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._running))
        # Who asked may be cancelled; the others go on waiting.
        return await asyncio.shield(self._next)

    async def _after(self, running: Awaitable[object] | None) -> Mapping[int, Span]:
        if running is not None:
            await asyncio.wait([asyncio.ensure_future(running)])
        self._running, self._next = self._next, None
        return await self._call()
