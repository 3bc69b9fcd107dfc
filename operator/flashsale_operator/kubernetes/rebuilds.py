"""Run rebuilds in the background, so that a fenced sale does not delay other reconciles."""

import asyncio
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from flashsale import ledger
from flashsale.errors import FlashsaleError
from flashsale.inventory import Inventory
from flashsale.ledger import SaleRow
from flashsale.sale import Predecessor
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import Key, Queue
from flashsale_operator.sales.decision import StillFenced
from flashsale_operator.sales.drain import Drain, Patience
from flashsale_operator.sales.offsets import SharedSpans, Spans
from flashsale_operator.sales.rebuild import Rebuilder, Rebuilt

log = logging.getLogger(__name__)

REBUILDS_AT_ONCE: Final = 32
"""Rebuilds that run at the same time. A restart of Redis fences every sale."""
FINISHED_AT_ONCE: Final = 16
"""Rebuilds of finished sales that run at the same time. They delay no sale that sells or holds."""
PATIENCE: Final = Patience(between=0.5)
REBUILD_RETRY_SECONDS: Final = 10.0
"""Delay before the retry of a rebuild that could not finish."""


@dataclass(slots=True)
class _Case:
    """The last rebuild of a sale.

    `status` is reported until the rebuild has a `result`. A retry keeps the cause that stopped the
    rebuild before. `begun` tells whether it has had its turn. `ended` is on the monotonic clock. A
    case that `wakes` has a FlashSale, which is woken when the rebuild ends.
    """

    task: "asyncio.Task[None]"
    status: StillFenced
    wakes: bool
    retry: bool
    begun: bool = False
    result: Rebuilt | StillFenced | FlashsaleError | None = None
    ended: float = 0.0


class Rebuilds:
    """The rebuilds of all sales."""

    def __init__(  # noqa: PLR0913 - the parts of the process that it works with
        self,
        inventory: Inventory,
        pool: ledger.Pool,
        spans: Spans,
        queue: Queue,
        metrics: Metrics,
        *,
        patience: Patience = PATIENCE,
    ) -> None:
        drain = Drain(inventory, pool, SharedSpans(spans), patience=patience)
        self._rebuilder = Rebuilder(inventory, pool, drain, self._progress)
        self._queue = queue
        self._metrics = metrics
        self._turns = asyncio.Semaphore(REBUILDS_AT_ONCE)
        self._finished_turns = asyncio.Semaphore(FINISHED_AT_ONCE)
        self._cases: dict[str, _Case] = {}
        self._unreported: dict[str, Rebuilt] = {}

    async def rebuild(
        self, row: SaleRow, replaces: Predecessor | None = None, *, wakes: bool = True
    ) -> StillFenced:
        """Starts a rebuild unless one runs, and returns why the sale is still fenced.

        The sale's FlashSale is woken when the rebuild ends, unless `wakes` is false. Raises the
        error of the last rebuild, once.
        """
        case = self._cases.get(row.sale_id)
        if case is not None and wakes and not case.wakes:
            # The FlashSale of a finished sale was applied again.
            case.wakes = True
            if not case.begun:
                self._cancel(row.sale_id)
                case = None
        if case is None:
            case = self._begin(row, replaces, wakes=wakes)
        match case.result:
            case None:
                return case.status
            case StillFenced():
                if time.monotonic() - case.ended >= REBUILD_RETRY_SECONDS:
                    self._begin(row, replaces, case.result, wakes=wakes)
                return case.result
            case Rebuilt():  # The sale was fenced again since, or it was read before that rebuild.
                return self._begin(row, replaces, wakes=wakes).status
            case error:
                del self._cases[row.sale_id]
                raise error

    def outcome(self, sale_id: str, *, wakes: bool | None = None) -> Rebuilt | None:
        """Returns the outcome of a sale's rebuilds once the sale needs none any more.

        It is returned until it is `reported`. A rebuild that waits for its turn is cancelled. A
        rebuild that runs is left alone, because it may have just made the sale trusted. It wakes
        the FlashSale when it has its outcome. With `wakes`, a rebuild that was started with another
        value is left alone, too.
        """
        case = self._cases.get(sale_id)
        if case is not None:
            if wakes not in (None, case.wakes) or (case.begun and case.result is None):
                return None
            self._cancel(sale_id)
        return self._unreported.get(sale_id)

    def reported(self, sale_id: str, outcome: Rebuilt) -> None:
        """Forgets an outcome, unless another rebuild has ended since."""
        if self._unreported.get(sale_id) is outcome:
            del self._unreported[sale_id]

    def forget(self, sale_id: str) -> None:
        """Cancels the rebuild of a sale that is closed, or that another engine has."""
        self._cancel(sale_id)
        self._unreported.pop(sale_id, None)

    async def close(self) -> None:
        """Cancels all rebuilds."""
        tasks = [case.task for case in self._cases.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _cancel(self, sale_id: str) -> None:
        if (case := self._cases.pop(sale_id, None)) is not None:
            case.task.cancel()

    def _begin(
        self,
        row: SaleRow,
        replaces: Predecessor | None,
        before: StillFenced | None = None,
        *,
        wakes: bool,
    ) -> _Case:
        task = asyncio.create_task(self._rebuild(row, replaces))
        status = before or _rebuilding("waiting for its turn")
        case = self._cases[row.sale_id] = _Case(task, status, wakes, retry=before is not None)
        return case

    def _progress(self, sale_id: str, step: str) -> None:
        case = self._cases.get(sale_id)
        if case is not None and not case.retry:
            case.status = _rebuilding(step)

    async def _rebuild(self, row: SaleRow, replaces: Predecessor | None) -> None:
        sale_id = row.sale_id
        case = self._cases[sale_id]
        result: Rebuilt | StillFenced | FlashsaleError
        finished = row.finished(datetime.now(UTC)) and not row.held
        turns = self._finished_turns if finished else self._turns
        try:
            async with turns:
                case.begun = True
                result = await self._rebuilder.rebuild(row, replaces)
        except FlashsaleError as error:
            result = error
        except Exception:
            # Without a result, a programming error would leave the sale waiting forever.
            log.exception("%s: the rebuild failed", sale_id)
            result = StillFenced(("the rebuild failed: see the operator's log",))
        if result != case.status:
            log.info("%s: rebuild: %s", sale_id, result)
        case.result, case.ended = result, time.monotonic()
        if isinstance(result, Rebuilt):
            self._metrics.lost.inc(result.lost)
            self._unreported[sale_id] = result.after(self._unreported.get(sale_id))
        if case.wakes:
            self._queue.wake(Key.of(sale_id))


def _rebuilding(step: str) -> StillFenced:
    return StillFenced((f"being rebuilt from the ledger: {step}",))
