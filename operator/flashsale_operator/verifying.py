"""Verifications beside the reconciles: a fenced sale waits for its own, no other sale does."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import asyncpg
from redis.asyncio import Redis

from flashsale.errors import FlashsaleError
from flashsale_operator.reconcile import Differs, Verification, Verified
from flashsale_operator.topic import KafkaUnavailable, Span
from flashsale_operator.verification import Barrier, Patience, Spans

log = logging.getLogger(__name__)

AT_ONCE: Final = 32
"""Verifications that run at the same time; a restarted Redis fences every sale."""
PATIENCE: Final = Patience(between=0.5)
AGAIN_SECONDS: Final = 10.0
"""After a verification that found differences, until the next one of the sale."""


@dataclass(slots=True)
class _Case:
    """A sale that is being verified, or was. `ended` is of the monotonic clock; what the
    verification before it found is told until this one has found something.
    """

    task: "asyncio.Task[None]"
    told: Differs
    without_kafka: bool = False
    result: Verification | FlashsaleError | None = None
    ended: float = 0.0


class Verifications:
    """The verifications of all sales.

    `verify` never waits: it gives the result of a verification that has ended, once, or says that
    one is running. `wake` is called with a sale's id when there is a result.
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

    async def verify(self, sale_id: str, item_id: str) -> Verification:
        """The seam to a rebuild: what is done about a fenced sale begins here.

        Raises `RedisUnavailable` or `LedgerUnavailable` if the verification met them.
        """
        case = self._cases.get(sale_id)
        if case is None:
            case = self._begin(sale_id, item_id)
        match case.result:
            case None:
                return case.told
            case Differs():
                if time.monotonic() - case.ended >= AGAIN_SECONDS:
                    self._begin(sale_id, item_id, case)
                return case.result
            case Verified():
                del self._cases[sale_id]
                return case.result
            case error:
                del self._cases[sale_id]
                raise error

    def without_kafka(self, sale_id: str) -> bool:
        """Whether the sale's verification could not read the topic."""
        case = self._cases.get(sale_id)
        return case is not None and case.without_kafka

    def forget(self, sale_id: str) -> None:
        """Ends what is done about a sale that needs no verification any more."""
        case = self._cases.pop(sale_id, None)
        if case is not None:
            case.task.cancel()

    async def close(self) -> None:
        """Ends all of them."""
        tasks = [case.task for case in self._cases.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, sale_id: str, item_id: str, before: _Case | None = None) -> _Case:
        task = asyncio.create_task(self._verify(sale_id, item_id, first=before is None))
        case = self._cases[sale_id] = _Case(task, _verifying("waiting for its turn"))
        if before is not None and isinstance(before.result, Differs):
            case.told, case.without_kafka = before.result, before.without_kafka
        return case

    async def _verify(self, sale_id: str, item_id: str, *, first: bool) -> None:
        case = self._cases[sale_id]
        without_kafka = False

        def progress(line: str) -> None:
            if first:
                case.told = _verifying(line.removeprefix(f"{sale_id}: verifying: "))

        async def spans() -> Mapping[int, Span]:
            nonlocal without_kafka
            try:
                return await self._spans()
            except KafkaUnavailable:
                without_kafka = True
                raise

        result: Verification | FlashsaleError
        try:
            async with self._turns:
                barrier = Barrier(
                    self._redis, self._pool, spans, patience=self._patience, progress=progress
                )
                result = await barrier.verify(sale_id, item_id)
        except FlashsaleError as error:
            result = error
        except Exception:
            # A mistake here must not leave the sale waiting for a result without end.
            log.exception("%s: the verification failed", sale_id)
            result = Differs(("the verification failed: see the operator's log",))
        if result != case.told:
            log.info("%s: verification: %s", sale_id, result)
        case.result, case.ended, case.without_kafka = result, time.monotonic(), without_kafka
        self._wake(sale_id)


def _verifying(doing: str) -> Differs:
    return Differs((f"verifying that nothing is missing: {doing}",))


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
