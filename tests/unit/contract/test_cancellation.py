"""A cancellation is not lost if an error of the clean-up replaces it."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from flashsale import cancellation


class Outage(Exception):
    """A server stands still."""


async def fails_to_clean_up(began: asyncio.Event) -> None:
    """Wait, and fail when it is cancelled."""
    try:
        began.set()
        await asyncio.Event().wait()
    finally:
        raise Outage


async def directly(began: asyncio.Event) -> None:
    with cancellation.kept():
        await fails_to_clean_up(began)


async def in_a_group_that_ends_after_a_failure(began: asyncio.Event) -> None:
    async def fails_first() -> None:
        raise Outage

    async def ends_slowly() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            began.set()
            await asyncio.sleep(0.01)

    async def work() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ends_slowly())
            await asyncio.sleep(0)
            tasks.create_task(fails_first())

    await cancellation.in_own_task(work())


async def within_a_timeout(began: asyncio.Event) -> None:
    """An expired timeout is no cancellation from outside, and keeps its error."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await directly(asyncio.Event())
    assert not cancellation.requested()
    await directly(began)


@pytest.mark.parametrize("once", [directly, in_a_group_that_ends_after_a_failure, within_a_timeout])
async def test_a_loop_that_survives_errors_ends_at_its_cancellation(
    once: Callable[[asyncio.Event], Awaitable[None]],
) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def loop() -> None:
        while not ended.is_set():
            try:
                await once(began)
            except* Outage:
                await asyncio.sleep(0)

    task = asyncio.create_task(loop())
    try:
        async with asyncio.timeout(5):
            await began.wait()
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
    finally:
        ended.set()
    assert done
    assert task.cancelled()


async def test_an_error_without_a_cancellation_stays_as_it_is() -> None:
    async def fails() -> None:
        raise Outage

    with pytest.raises(Outage):
        await cancellation.in_own_task(fails())
    with pytest.raises(Outage), cancellation.kept():
        await fails()
