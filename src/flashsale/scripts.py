"""Load and call the Lua scripts, on the servers of their keys."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import MovedError, NoScriptError, RedisError

from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.nodes import Node, Nodes
from flashsale.redis_client import Reply
from flashsale.redis_errors import FAILURES, describe

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
    """Calls scripts on the server of their keys. Methods raise `RedisUnavailable`."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    async def load(self, *scripts: Script) -> None:
        """Connects the links and loads scripts, so that no later call waits for either.

        A primary of a cluster that is away is left out.
        """

        async def loaded(node: Node) -> None:
            try:
                async with asyncio.timeout(LOAD_SECONDS):
                    link = await node.pool.link()
                    for script in scripts:
                        await link.ask("SCRIPT", "LOAD", script.source)
            except FAILURES as error:
                raise self._nodes.unavailable(error, node) from error

        found = await self._nodes.all()
        results = await asyncio.gather(*map(loaded, found), return_exceptions=True)
        for error in results:
            if error is not None and (self._nodes.single or all(results)):
                raise error

    async def call(
        self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]
    ) -> Any:  # noqa: ANN401 - depends on the script
        """Runs a script that is safe to repeat, on a connection of the pool."""

        async def run(redis: Redis) -> Any:  # noqa: ANN401 - depends on the script
            ask = cast("Callable[..., Awaitable[Any]]", redis.execute_command)
            tail = (len(keys), *keys, *arguments)
            try:
                return await ask("EVALSHA", script.sha, *tail)
            except NoScriptError:
                return await ask("EVAL", script.source, *tail)

        return await self._nodes.call(keys[0], run)

    async def call_of_items(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[str | int],
        timeout_seconds: float,
    ) -> list[str | int | RedisUnavailable]:
        """Runs a script that returns a list with the result of each item, or its error.

        Raises `RedisUnavailable` if the call fails, or every item. Calls as `call_quickly` does.
        """
        reply = await self.call_quickly(script, keys, arguments, timeout_seconds)
        if not isinstance(reply, list):
            raise ContractViolation(f"a script returned {type(reply).__name__}, not a list")
        return [
            RedisUnavailable(describe(each)) if isinstance(each, RedisError) else each
            for each in reply
        ]

    async def call_quickly(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[str | int],
        timeout_seconds: float,
    ) -> Reply:
        """Runs a script that returns a string, an integer or a list of them, on the pipelined link.

        A call is never retried, except once on the node that a `MOVED` names. If it fails,
        `RedisUnavailable.maybe_executed` says whether it was sent.
        """
        sent = False
        tail = (len(keys), *keys, *arguments)
        node = self._nodes.single
        try:
            async with asyncio.timeout(timeout_seconds):
                if node is None:
                    node = await self._nodes.of(keys[0])
                link = await node.pool.link()
                sent = True
                try:
                    return await link.ask("EVALSHA", script.sha, *tail)
                except NoScriptError:
                    return await link.ask("EVAL", script.source, *tail)
                except MovedError as error:  # the script did not run
                    sent = False
                    node = await self._nodes.moved(error, node)
                    link = await node.pool.link()
                    sent = True
                    # The server of this link may lack the script.
                    return await link.ask("EVAL", script.source, *tail)
        except FAILURES as error:
            raise self._nodes.unavailable(error, node, sent=sent) from error


async def leased(nodes: Nodes, key: str, owner: str, lease_ms: int) -> bool:
    """Takes or renews a lease. False if another owner has it. Raises `RedisUnavailable`.

    A lease that ends later than a new one was taken under the clock of a former server. It is
    shortened.
    """
    found = await nodes.call(
        key, lambda redis: redis.set(key, owner, nx=True, get=True, px=lease_ms)
    )
    if found is not None:
        await nodes.call(key, lambda redis: redis.pexpire(key, lease_ms, lt=found != owner))
    return found in (None, owner)
