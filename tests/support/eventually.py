"""Poll a condition until it holds, with a deadline."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar, overload

DEADLINE_SECONDS: Final = 90.0
"""Long enough for a busy machine. A test that meets it has failed."""

T = TypeVar("T")


def eventually(
    look: Callable[[], T | None],
    expected: str | Callable[[], object] = "",
    *,
    seconds: float = DEADLINE_SECONDS,
    pause: float = 0.05,
) -> T:
    """Return the first true result of `look`, which is called every `pause` seconds.

    Raises `AssertionError` with `expected` after `seconds`. A callable `expected` is called only
    then, so it can report the state that was found instead.
    """
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, _failure(look, expected, seconds, found)
        time.sleep(pause)
    return found


@overload
async def until(
    look: Callable[[], Awaitable[T | None]],
    expected: str | Callable[[], object] = ...,
    *,
    seconds: float = ...,
    pause: float = ...,
    ignoring: tuple[type[Exception], ...] = ...,
) -> T: ...


@overload
async def until(
    look: Callable[[], T | None],
    expected: str | Callable[[], object] = ...,
    *,
    seconds: float = ...,
    pause: float = ...,
    ignoring: tuple[type[Exception], ...] = ...,
) -> T: ...


async def until(
    look: Callable[[], object],
    expected: str | Callable[[], object] = "",
    *,
    seconds: float = DEADLINE_SECONDS,
    pause: float = 0.02,
    ignoring: tuple[type[Exception], ...] = (),
) -> object:
    """`eventually` inside an event loop. `look` may be a coroutine function.

    An exception of a type in `ignoring` counts as "not yet".
    """
    deadline = time.monotonic() + seconds
    while True:
        seen: object
        try:
            result = look()
            found = await result if inspect.isawaitable(result) else result
        except ignoring as error:
            seen = error
        else:
            if found:
                return found
            seen = found
        assert time.monotonic() < deadline, _failure(look, expected, seconds, seen)
        await asyncio.sleep(pause)


def _failure(
    look: object, expected: str | Callable[[], object], seconds: float, last: object
) -> str:
    described = expected() if callable(expected) else expected
    return f"not within {seconds:.0f} s: {described or look}; last: {last!r}"
