"""When each FlashSale is reconciled: one task each, which is what keeps two from being at once."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Final

from flashsale_operator.kubernetes.client import KubeUnavailable
from flashsale_operator.kubernetes.controller import Key, Rounds, Upshot, server_of
from flashsale_operator.kubernetes.metrics import Metrics

log = logging.getLogger(__name__)

EVERY_SECONDS: Final = 5.0
"""Between two reconciles of a quiet FlashSale: drift is healed and stock sampled that often."""
JITTER: Final = 0.2
AT_ONCE: Final = 16
"""Reconciles that run at the same time."""
FIRST_BACKOFF_SECONDS: Final = 0.5
LAST_BACKOFF_SECONDS: Final = 8.0
AFTER_BOUND_SECONDS: Final = 0.2
"""How long after startsAt or endsAt to look: Redis' clock is not the operator's."""


def pause(upshot: Upshot, failures: int, now_ms: int, chance: float) -> float:
    """Seconds until the next reconcile; `chance` is from 0 to 1."""
    jitter = 1 + JITTER * (2 * chance - 1)
    seconds = EVERY_SECONDS * jitter
    for bound_ms in upshot.changes_ms:
        away = (bound_ms - now_ms) / 1000 + AFTER_BOUND_SECONDS
        if away > 0:
            seconds = min(seconds, away)
    if failures:
        backoff = FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 10)
        seconds = min(backoff, LAST_BACKOFF_SECONDS) * jitter
    return seconds


class Tending:
    """Reconciles every FlashSale that was named once, again and again until it is gone."""

    def __init__(self, rounds: Callable[[], Rounds], metrics: Metrics) -> None:
        self._rounds = rounds
        self._metrics = metrics
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._woken: dict[Key, asyncio.Event] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def tends(self, key: Key) -> bool:
        """Whether the FlashSale is reconciled without being named again."""
        return key in self._tasks

    def wake(self, key: Key) -> None:
        """Has a FlashSale reconciled soon, also if it is being reconciled now."""
        self._woken.setdefault(key, asyncio.Event()).set()
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._tend(key), name=f"tending {key.sale_id}")

    async def close(self) -> None:
        """Ends all of them, wherever they are: doing it again continues it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tend(self, key: Key) -> None:
        failures = 0
        woken = self._woken[key]
        while True:
            woken.clear()
            upshot = await self._reconcile(key)
            if upshot.gone and not woken.is_set():
                del self._tasks[key], self._woken[key]
                return
            failures = failures + 1 if upshot.failed else 0
            seconds = pause(upshot, failures, time.time_ns() // 1_000_000, random.random())  # noqa: S311 - no secret
            try:
                async with asyncio.timeout(seconds):
                    await woken.wait()
            except TimeoutError:
                continue

    async def _reconcile(self, key: Key) -> Upshot:
        async with self._turns:
            began = time.monotonic()
            try:
                return await self._rounds().reconcile(key)
            except KubeUnavailable as error:
                self._metrics.failures.labels(server_of(error)).inc()
                log.warning("%s: %s", key.sale_id, error)
            except Exception:
                # A mistake with one FlashSale must not keep the others from being reconciled.
                self._metrics.failures.labels("other").inc()
                log.exception("%s: the reconcile failed", key.sale_id)
            finally:
                self._metrics.reconciles.inc()
                self._metrics.reconcile_seconds.observe(time.monotonic() - began)
            return Upshot(failed=True)
