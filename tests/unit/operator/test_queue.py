"""The work queue: order, back-off, and one worker per FlashSale."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from flashsale_operator.kubernetes.client import KubeUnavailable
from flashsale_operator.kubernetes.controller import Controller
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import (
    FIRST_BACKOFF_SECONDS,
    JITTER,
    LAST_BACKOFF_SECONDS,
    RECONCILE_SECONDS,
    Key,
    Queue,
    Requeue,
    Urgency,
    pause,
)
from tests.support.eventually import until

NOW_MS = 1_795_770_000_000
CHANGED, NEW, DUE = Urgency.CHANGED, Urgency.NEW, Urgency.DUE
ONE, TWO = Key("shop", "one"), Key("shop", "two")


def test_a_quiet_sale_is_reconciled_every_few_seconds_with_jitter() -> None:
    pauses = [pause(Requeue(), 0, NOW_MS, chance) for chance in (0, 0.5, 1)]
    assert pauses == [RECONCILE_SECONDS * factor for factor in (1 - JITTER, 1, 1 + JITTER)]


def test_a_sale_is_reconciled_soon_after_its_window_opens_or_closes() -> None:
    for bounds in (
        (NOW_MS + 1000,),
        (NOW_MS - 1000, NOW_MS + 1000),
        (NOW_MS + 1000, NOW_MS + 9000),
    ):
        assert 1 < pause(Requeue(changes_ms=bounds), 0, NOW_MS, 0.5) < 2
    for bounds in ((NOW_MS - 1000,), (NOW_MS + 60_000,)):
        assert pause(Requeue(changes_ms=bounds), 0, NOW_MS, 0.5) == RECONCILE_SECONDS


def test_the_back_off_grows_with_each_failure_up_to_a_limit() -> None:
    pauses = [pause(Requeue(failed=True), failures, NOW_MS, 0.5) for failures in range(1, 2000)]
    assert pauses[0] == FIRST_BACKOFF_SECONDS
    assert pauses == sorted(pauses)
    assert pauses[-1] == LAST_BACKOFF_SECONDS


class FakeController(Controller):
    """A controller whose `reconcile` does what a test says, by key and number of the call."""

    def __init__(self, queue: Queue, does: Callable[[Key, int], Requeue]) -> None:
        self._queue = queue
        self._metrics = Metrics()
        self._does = does
        self.calls: list[Key] = []
        self.running: set[Key] = set()
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def reconcile(self, key: Key) -> Requeue:
        assert key not in self.running
        self.running.add(key)
        self.calls.append(key)
        try:
            await asyncio.sleep(0.001)
            await self.may_end.wait()
            return self._does(key, self.calls.count(key))
        finally:
            self.running.discard(key)


@asynccontextmanager
async def running(
    queue: Queue, does: Callable[[Key, int], Requeue]
) -> AsyncIterator[FakeController]:
    controller = FakeController(queue, does)
    task = asyncio.create_task(controller.run())
    yield controller
    task.cancel()
    await asyncio.wait([task])


async def test_a_flashsale_is_reconciled_until_it_is_gone() -> None:
    queue = Queue()
    async with running(queue, lambda _, count: Requeue(gone=count == 2)) as controller:
        queue.wake(ONE)
        await until(lambda: len(controller.calls) == 1, pause=0.005)
        assert ONE in queue
        queue.wake(ONE)
        await until(lambda: ONE not in queue, pause=0.005)
        queue.wake(ONE)
        await until(lambda: len(controller.calls) == 3, pause=0.005)


async def test_a_wake_during_a_reconcile_causes_exactly_one_more() -> None:
    queue = Queue()
    async with running(queue, lambda *_: Requeue()) as controller:
        controller.may_end.clear()
        for _ in range(100):
            queue.wake(ONE)
        await until(lambda: ONE in controller.running, pause=0.005)
        for _ in range(100):
            queue.wake(ONE)
        assert len(controller.calls) == 1
        controller.may_end.set()
        await until(lambda: len(controller.calls) == 2, pause=0.005)


async def test_a_wake_during_the_last_reconcile_is_not_lost() -> None:
    queue = Queue()
    async with running(queue, lambda _, count: Requeue(gone=count == 1)) as controller:
        controller.may_end.clear()
        queue.wake(ONE)
        await until(lambda: ONE in controller.running, pause=0.005)
        queue.wake(ONE)
        controller.may_end.set()
        await until(lambda: len(controller.calls) == 2, pause=0.005)
        assert ONE in queue


async def test_changed_flashsales_go_before_new_ones_and_new_ones_before_those_that_are_due() -> (
    None
):
    queue = Queue()
    crowd = [Key("crowd", f"sale-{number}") for number in range(9)]
    for urgency, keys in zip((DUE, NEW, CHANGED), (crowd[:3], crowd[3:6], crowd[6:]), strict=True):
        for key in keys:
            queue.wake(key, urgency)
    # One that is due and then changes is taken once. One that has changed stays a change.
    queue.wake(crowd[1], CHANGED)
    queue.wake(crowd[7], DUE)
    taken = [await queue.take() for _ in crowd]
    assert taken == [*crowd[6:], crowd[1], *crowd[3:6], crowd[0], crowd[2]]
    # A change during a reconcile counts too.
    for key in crowd[:3]:
        queue.give_back(key, Requeue())
        queue.wake(key)
    queue.wake(crowd[8], CHANGED)
    queue.give_back(crowd[8], Requeue())
    assert await queue.take() == crowd[8]
    assert await queue.take() == crowd[0]


@pytest.mark.parametrize("urgency", Urgency)
async def test_a_thousand_flashsales_of_one_namespace_do_not_delay_another(
    urgency: Urgency,
) -> None:
    queue = Queue()
    crowd = [Key("crowd", f"sale-{number}") for number in range(1000)]
    for key in (*crowd, ONE, TWO):
        queue.wake(key, urgency)
    taken = [await queue.take() for _ in range(6)]
    assert taken == [crowd[0], ONE, crowd[1], TWO, crowd[2], crowd[3]]
    # One that waits is taken once, also if its urgency changes.
    queue.wake(crowd[500], CHANGED)
    rest = [await queue.take() for _ in crowd[4:]]
    assert sorted(rest) == sorted(crowd[4:])
    assert (rest[0] == crowd[500]) is (urgency is not CHANGED)


async def test_a_failing_flashsale_is_retried_and_does_not_block_another() -> None:
    def does(key: Key, count: int) -> Requeue:
        if key == ONE:
            raise KubeUnavailable("away") if count == 1 else ZeroDivisionError
        return Requeue(gone=True)

    queue = Queue()
    async with running(queue, does) as controller:
        queue.wake(ONE)
        queue.wake(TWO)
        await until(lambda: controller.calls.count(ONE) >= 3, pause=0.005)
        assert TWO in controller.calls
        assert ONE in queue


async def test_a_second_look_does_not_wait_for_the_back_off_of_earlier_failures() -> None:
    """After a long outage the keys are gone. The rebuild begins at the second look."""
    queue = Queue()
    queue.wake(ONE)
    for _ in range(10):
        assert await queue.take() == ONE
        queue.give_back(ONE, Requeue(failed=True))
        queue.wake(ONE)
    assert await queue.take() == ONE
    queue.give_back(ONE, Requeue(again=True))
    timer = queue._entries[ONE].timer
    assert timer is not None
    assert timer.when() - asyncio.get_running_loop().time() <= FIRST_BACKOFF_SECONDS * (1 + JITTER)
