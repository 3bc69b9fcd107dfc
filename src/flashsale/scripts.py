"""Load and call the Lua scripts, and translate failures to `RedisUnavailable`."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final, TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError, ResponseError

from flashsale.errors import RedisUnavailable
from flashsale.redis_client import Pool, Reply

T = TypeVar("T")

LOAD_SECONDS: Final = 2.0


class Script:
    """A script of `lua/`, with `sale.lua` and the other `shared` parts prepended."""

    def __init__(self, name: str, *shared: str) -> None:
        folder = files("flashsale") / "lua"
        self.source = "\n".join(
            (folder / f"{part}.lua").read_text("utf-8") for part in ("sale", *shared, name)
        )
        self.sha = sha1(self.source.encode(), usedforsecurity=False).hexdigest()


class Scripts:
    """Calls scripts on a client of `redis_client.connect`. Methods raise `RedisUnavailable`."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
        self._pool = cast("Pool", redis.connection_pool)

    async def load(self, *scripts: Script) -> None:
        """Connects the link and loads scripts, so that no later call waits for either."""

        async def loaded() -> None:
            async with asyncio.timeout(LOAD_SECONDS):
                link = await self._pool.link()
                for script in scripts:
                    await link.ask("SCRIPT", "LOAD", script.source)

        await translated(loaded())

    async def call(
        self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]
    ) -> Any:  # noqa: ANN401 - depends on the script
        """Runs a script that is safe to repeat, on a connection of the pool."""
        call = cast("Callable[..., Awaitable[Any]]", self._redis.evalsha)
        try:
            return await translated(call(script.sha, len(keys), *keys, *arguments))
        except NoScriptError:
            call = cast("Callable[..., Awaitable[Any]]", self._redis.eval)
            return await translated(call(script.source, len(keys), *keys, *arguments))

    async def call_quickly(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[str | int],
        timeout_seconds: float,
    ) -> Reply:
        """Runs a script that returns a string or an integer, on the pipelined link.

        A call is never retried. If it fails, `RedisUnavailable.maybe_executed` says whether it was
        sent.
        """
        sent = False
        tail = (len(keys), *keys, *arguments)
        try:
            async with asyncio.timeout(timeout_seconds):
                link = await self._pool.link()
                sent = True
                try:
                    return await link.ask("EVALSHA", script.sha, *tail)
                except NoScriptError:
                    return await link.ask("EVAL", script.source, *tail)
        except (RedisError, OSError, TimeoutError, RuntimeError) as error:
            _require_outage(error)
            # A refusal is a reply: the script has changed nothing.
            maybe_executed = sent and not isinstance(error, ResponseError)
            raise RedisUnavailable(_describe(error), maybe_executed=maybe_executed) from error


async def translated(call: Awaitable[T]) -> T:
    """Awaits a call of redis-py and raises `RedisUnavailable` if it fails, except on NOSCRIPT."""
    try:
        return await call
    except NoScriptError:
        raise
    except (RedisError, OSError, TimeoutError, RuntimeError) as error:
        _require_outage(error)
        raise RedisUnavailable(_describe(error)) from error


async def leased(redis: "Redis", key: str, owner: str, lease_ms: int) -> bool:
    """Takes or renews a lease. False if another owner has it. Raises `RedisUnavailable`."""
    found = await translated(redis.set(key, owner, nx=True, get=True, px=lease_ms))
    if found == owner:
        await translated(redis.pexpire(key, lease_ms))
    return found in (None, owner)


def _require_outage(error: Exception) -> None:
    """Raises an error that is no outage.

    uvloop raises a `RuntimeError` for a write to a connection that the server has just closed.
    """
    if isinstance(error, RuntimeError) and "the handler is closed" not in str(error):
        raise error


def _describe(error: Exception) -> str:
    problem = "refused the call" if isinstance(error, ResponseError) else "is unavailable"
    return f"Redis {problem}: {str(error) or 'no reply in time'}"
