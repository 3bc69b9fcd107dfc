"""When a FlashSale is reconciled."""

import asyncio
from collections.abc import Callable
from typing import cast

from flashsale_operator.kubernetes.client import KubeUnavailable
from flashsale_operator.kubernetes.controller import Key, Rounds, Upshot
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import (
    EVERY_SECONDS,
    FIRST_BACKOFF_SECONDS,
    JITTER,
    LAST_BACKOFF_SECONDS,
    Tending,
    pause,
)

NOW_MS = 1_795_770_000_000
ONE, TWO = Key("shop", "one"), Key("shop", "two")


def test_a_quiet_sale_is_looked_at_every_few_seconds_and_not_all_at_the_same_time() -> None:
    pauses = [pause(Upshot(), 0, NOW_MS, chance) for chance in (0, 0.5, 1)]
    assert pauses == [EVERY_SECONDS * factor for factor in (1 - JITTER, 1, 1 + JITTER)]


def test_a_bound_of_the_window_is_waited_for() -> None:
    for bounds in (
        (NOW_MS + 1000,),
        (NOW_MS - 1000, NOW_MS + 1000),
        (NOW_MS + 1000, NOW_MS + 9000),
    ):
        assert 1 < pause(Upshot(changes_ms=bounds), 0, NOW_MS, 0.5) < 2
    for bounds in ((NOW_MS - 1000,), (NOW_MS + 60_000,)):
        assert pause(Upshot(changes_ms=bounds), 0, NOW_MS, 0.5) == EVERY_SECONDS


def test_failures_are_tried_again_after_longer_and_longer() -> None:
    pauses = [pause(Upshot(failed=True), failures, NOW_MS, 0.5) for failures in range(1, 2000)]
    assert pauses[0] == FIRST_BACKOFF_SECONDS
    assert pauses == sorted(pauses)
    assert pauses[-1] == LAST_BACKOFF_SECONDS


class Fake:
    """Rounds that do what a test says."""

    def __init__(self, does: Callable[[Key, int], Upshot]) -> None:
        self._does = does
        self.calls: list[Key] = []
        self.running: set[Key] = set()
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def reconcile(self, key: Key) -> Upshot:
        assert key not in self.running
        self.running.add(key)
        self.calls.append(key)
        try:
            await asyncio.sleep(0.001)
            await self.may_end.wait()
            return self._does(key, self.calls.count(key))
        finally:
            self.running.discard(key)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def tending(fake: Fake) -> Tending:
    return Tending(lambda: cast("Rounds", fake), Metrics())


async def test_a_flashsale_is_tended_until_it_is_gone() -> None:
    fake = Fake(lambda _, count: Upshot(gone=count == 2))
    own = tending(fake)
    own.wake(ONE)
    await until(lambda: len(fake.calls) == 1)
    assert own.tends(ONE)
    own.wake(ONE)
    await until(lambda: not own.tends(ONE))
    own.wake(ONE)
    await until(lambda: len(fake.calls) == 3)
    await own.close()


async def test_waking_while_it_is_reconciled_has_it_reconciled_again_after_that() -> None:
    fake = Fake(lambda _, __: Upshot())
    own = tending(fake)
    fake.may_end.clear()
    for _ in range(100):
        own.wake(ONE)
    await until(lambda: ONE in fake.running)
    for _ in range(100):
        own.wake(ONE)
    assert len(fake.calls) == 1
    fake.may_end.set()
    await until(lambda: len(fake.calls) == 2)
    await own.close()


async def test_one_that_fails_does_not_keep_another_from_its_turn() -> None:
    def does(key: Key, count: int) -> Upshot:
        if key == ONE:
            raise KubeUnavailable("away") if count == 1 else ZeroDivisionError
        return Upshot(gone=True)

    fake = Fake(does)
    own = tending(fake)
    own.wake(ONE)
    own.wake(TWO)
    await until(lambda: fake.calls.count(ONE) >= 3)
    assert TWO in fake.calls
    assert own.tends(ONE)
    await own.close()
