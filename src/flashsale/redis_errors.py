"""The errors of calls to Redis, and which of them are outages."""

from collections.abc import Awaitable
from typing import Final, TypeVar

from redis.exceptions import AskError, NoPermissionError, RedisError, ResponseError

from flashsale.errors import RedisUnavailable, has_just_closed

T = TypeVar("T")

FAILURES: Final = (RedisError, OSError, TimeoutError, RuntimeError)
"""The errors of a call. A `RuntimeError` may also be a mistake: `require_outage` tells."""


async def translated(call: Awaitable[T]) -> T:
    """Awaits a call of redis-py and raises `RedisUnavailable` if it fails."""
    try:
        return await call
    except FAILURES as error:
        require_outage(error)
        raise RedisUnavailable(describe(error)) from error


def require_outage(error: Exception) -> None:
    """Raises an error that is no outage."""
    if isinstance(error, RuntimeError) and not has_just_closed(error):
        raise error


def denies_command(error: Exception) -> bool:
    """Whether the user lacks the right to a command, or the server has renamed or removed it."""
    return isinstance(error, NoPermissionError) or (
        isinstance(error, ResponseError) and "unknown command" in str(error).lower()
    )


def describe(error: Exception) -> str:
    """Returns the text of a `RedisUnavailable`."""
    if isinstance(error, AskError):  # or a second MOVED, which redis-py derives from it
        return "Redis is unavailable: the item's slot moves to another node"
    problem = "refused the call" if isinstance(error, ResponseError) else "is unavailable"
    return f"Redis {problem}: {str(error) or 'no reply in time'}"
