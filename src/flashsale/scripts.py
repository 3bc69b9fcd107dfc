"""Lua scripts on a Redis: loaded by their hash, called, and their failures translated."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, TypeVar, cast

from redis.asyncio import Connection, Redis
from redis.exceptions import BusyLoadingError, NoScriptError, RedisError, ResponseError

from flashsale.errors import RedisUnavailable

T = TypeVar("T")


class Script:
    """One of `lua/`, with `sale.lua` in front of it."""

    def __init__(self, name: str) -> None:
        folder = files("flashsale") / "lua"
        self.source = "\n".join(
            (folder / f"{part}.lua").read_text("utf-8") for part in ("sale", name)
        )
        self.sha = sha1(self.source.encode(), usedforsecurity=False).hexdigest()


class Scripts:
    """Calls scripts on one Redis; raises `RedisUnavailable` when it cannot serve the call."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis

    async def load(self, *scripts: Script) -> None:
        """Loads scripts, so that no call has to."""
        for script in scripts:
            await translated(self._redis.script_load(script.source))

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

    async def call_once(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[str | int],
        timeout_seconds: float,
    ) -> str:
        """Runs a script on one connection, knowing whether the call was sent when it fails."""
        pool = self._redis.connection_pool
        get_connection = cast("Callable[[], Awaitable[Connection]]", pool.get_connection)
        sent = False
        try:
            async with asyncio.timeout(timeout_seconds):
                connection = await get_connection()
                try:
                    sent = True
                    tail = (len(keys), *keys, *arguments)
                    try:
                        await connection.send_command("EVALSHA", script.sha, *tail)
                        return cast("str", await connection.read_response())
                    except NoScriptError:
                        await connection.send_command("EVAL", script.source, *tail)
                        return cast("str", await connection.read_response())
                except (ResponseError, BusyLoadingError):
                    sent = False  # it was answered: nothing was done
                    raise
                except BaseException:
                    # The answer may still come: nobody else must read it as theirs.
                    await connection.disconnect(nowait=True)
                    raise
                finally:
                    await pool.release(connection)
        except (RedisError, OSError, TimeoutError) as error:
            raise RedisUnavailable(_describe(error), maybe_executed=sent) from error


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
