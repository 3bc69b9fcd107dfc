"""Lua scripts on a Redis: loaded by their hash, called, and their failures translated."""

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
    """One of `lua/`, with `sale.lua` in front of it."""

    def __init__(self, name: str) -> None:
        folder = files("flashsale") / "lua"
        self.source = "\n".join(
            (folder / f"{part}.lua").read_text("utf-8") for part in ("sale", name)
        )
        self.sha = sha1(self.source.encode(), usedforsecurity=False).hexdigest()


class Scripts:
    """Calls scripts on the Redis of an `redis_client.connect`; raises `RedisUnavailable`."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
        self._pool = cast("Pool", redis.connection_pool)

    async def load(self, *scripts: Script) -> None:
        """Loads scripts, and connects, so that no quick call has to."""

        async def loaded() -> None:
            async with asyncio.timeout(LOAD_SECONDS):
                link = await self._pool.link()
                for script in scripts:
                    await link.ask("SCRIPT", "LOAD", script.source)

        await translated(loaded())

    async def call(
        self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]
    ) -> Any:  # noqa: ANN401 - a script's own type
        """Runs a script; a caller who does not hear the answer may call again."""
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
        """Runs a script that answers a string or a number, behind all that are under way.

        When it fails, `maybe_executed` says whether the call was sent; it is not tried again.
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
        except (RedisError, OSError, TimeoutError) as error:
            # What was refused was answered: nothing was done.
            maybe_executed = sent and not isinstance(error, ResponseError)
            raise RedisUnavailable(_describe(error), maybe_executed=maybe_executed) from error


async def translated(call: Awaitable[T]) -> T:
    """The result of a client's call; its failure as `RedisUnavailable`, but for NOSCRIPT."""
    try:
        return await call
    except NoScriptError:
        raise
    except (RedisError, OSError, TimeoutError) as error:
        raise RedisUnavailable(_describe(error)) from error


def _describe(error: Exception) -> str:
    what = "refused the call" if isinstance(error, ResponseError) else "is away"
    return f"Redis {what}: {str(error) or 'no answer in time'}"
