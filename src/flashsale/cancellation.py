"""Keeps the cancellation of a task, which an error of the task's clean-up can hide.

A task is cancelled once. An endless loop that survives the error would then go on for ever, and its
process would not end.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any


def requested() -> bool:
    """Whether the current task was asked to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@contextmanager
def kept() -> Iterator[None]:
    """Raises the cancellation of the current task in place of an error."""
    try:
        yield
    except Exception as error:
        if requested():
            raise asyncio.CancelledError from error
        raise


async def in_own_task(work: Coroutine[Any, Any, None]) -> None:
    """Awaits work that ends with a TaskGroup.

    - Before Python 3.13, a group that fails leaves a counted cancellation on its task. A later
      `asyncio.timeout` could take it for one from outside.
    - A group that is cancelled while it ends after a failure raises only the failure.
    """
    with kept():
        await asyncio.create_task(work)
