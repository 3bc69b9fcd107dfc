"""The servers behind Redis' address: one server, or the primaries of a Redis Cluster.

The address may name any node of a cluster. A map says which primary has a key's slot. redis-py
makes the connections, but its cluster client is not used: while one primary is away, it stops the
calls to all others (docs/adr/0023-redis-cluster.md).
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import (
    ClusterDownError,
    MovedError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as Disconnected

from flashsale import redis_client
from flashsale.errors import RedisUnavailable
from flashsale.redis_client import Pool
from flashsale.redis_errors import FAILURES, denies_command, describe, require_outage
from flashsale.requirements import SLOTS
from flashsale.slots import View, slot_of

T = TypeVar("T")

log = logging.getLogger(__name__)

FIRST_LOOK_SECONDS: Final = 2.0
LOOK_SECONDS: Final = 0.5
"""How long the nodes may take to say which primary has which slots."""
NODE_SECONDS: Final = 1.0
"""How long a primary of a cluster may take for a call or a pipeline."""
BETWEEN_LOOKS_SECONDS: Final = 0.1
STRANGER_SECONDS: Final = 5.0
"""How long no known node may answer before another server at the address takes their place."""
PROBE_SECONDS: Final = 1.0
"""How often each primary is called, and how long it may take to answer."""

ITEMS_PER_CALL: Final = 32
"""Items of one script call. So many with `BATCH_LIMIT` requests block Redis for about 2 ms."""


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A server. `name` is its host:port, or empty if it is the only one."""

    name: str
    redis: Redis
    pool: Pool
    """The client's connections, with the pipelined link."""

    @classmethod
    def of(cls, name: str, redis: Redis) -> "Node":
        return cls(name, redis, cast("Pool", redis.connection_pool))


class Stranger(Disconnected):
    """Another server than a node of the cluster has the address of a node."""


class Nodes:
    """Finds the servers of keys, and calls them.

    The first call looks whether the address belongs to a cluster. Later looks follow a `MOVED`, and
    a node that does not answer. A server whose map shares no node with the known map belongs to
    another cluster. It gets no call, even at the address of a node, until no known node has
    answered for `STRANGER_SECONDS`.
    """

    def __init__(self, redis: Redis) -> None:
        """`redis` is a client of `redis_client.connect`. Its `aclose` closes all nodes."""
        self._seed = Node.of("", redis)
        host, port, _ = redis_client.location(redis)
        self._seed_name = f"{host}:{port}"
        self._primaries: dict[str, Node] = {}
        self._owners: list[Node | None] = []
        """The primary of each slot. Empty before the first look, and if there is one server."""
        self._ids: frozenset[str] = frozenset()
        """The ids of the nodes in the map. Empty if `_owners` is."""
        self._look: asyncio.Task[None] | None = None
        self._next_look = 0.0
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = asyncio.Event()
        self.single: Node | None = None
        """The only server, if the address does not belong to a cluster."""
        self.failures: dict[str, str] = {}
        """Why the last failed call of each node failed, by the name of the node."""

    @classmethod
    def of_client(cls, redis: Redis) -> "Nodes":
        """Returns the nodes of a client. All users of the client share them."""
        pool = cast("Pool", redis.connection_pool)
        if pool.nodes is None:
            pool.nodes = cls(redis)
        return pool.nodes

    @property
    def items_per_call(self) -> int:
        """The number of items that a script call may have. In a cluster its keys have one slot."""
        return ITEMS_PER_CALL if self.single else 1

    def name_of(self, key: str) -> str:
        """Returns the name of the server of a key, as far as it is known.

        An item is the hash tag of its keys, so it has their slot.
        """
        owner = self._owners[slot_of(key)] if self._owners else None
        return owner.name if owner else ""

    async def of(self, key: str) -> Node:
        """Returns the server of a key. Raises redis-py's errors if it is not known."""
        await self._known()
        if self.single:
            return self.single
        slot = slot_of(key)
        owner = self._owners[slot]
        if owner is None:
            self.look_soon()
            raise ClusterDownError(f"no node of the cluster has slot {slot}")
        return owner

    async def all(self) -> list[Node]:
        """Returns the only server, or all primaries. Raises `RedisUnavailable` if none answers."""
        try:
            await self._known()
        except FAILURES as error:
            raise self.unavailable(error, None) from error
        self._look_for_owners()
        return [self.single] if self.single else list(self._primaries.values())

    async def call(self, key: str, command: Callable[[Redis], Awaitable[T]]) -> T:
        """Runs a command on the server of a key, and once more if its slot has moved.

        Raises `RedisUnavailable`.
        """
        node = None
        try:
            node = await self.of(key)
            # A frozen primary must not delay calls to the others.
            async with asyncio.timeout(NODE_SECONDS if node.name else None):
                try:
                    return await command(node.redis)
                except MovedError as error:
                    node = await self.moved(error, node)
                    return await command(node.redis)
        except FAILURES as error:
            raise self.unavailable(error, node) from error

    async def split(self, items: Iterable[T], key: Callable[[T], str]) -> dict[Node, list[T]]:
        """Groups items by the server of their key. Items whose slot has none are left out.

        Raises `RedisUnavailable` if no server is known.
        """
        groups: dict[Node, list[T]] = {}
        try:
            await self._known()
            for item in items:
                with contextlib.suppress(ClusterDownError):
                    groups.setdefault(await self.of(key(item)), []).append(item)
        except FAILURES as error:
            raise self.unavailable(error, None) from error
        return groups

    async def covered(self, node: Node) -> int:
        """Returns how many slots have a primary by a node's view. Raises redis-py's errors."""
        view = await self._view(node)
        return view.covered if view else 0

    async def moved(self, error: MovedError, node: Node) -> Node:
        """Notes that `node` has named another owner of a slot, and returns that one.

        Raises `RedisUnavailable` if the only server belongs to a cluster now, whose nodes do not
        say which slots they have.
        """
        if self.single:  # the only server has become a node of a cluster
            self.look_soon()
            if self._look:
                try:
                    await asyncio.shield(self._look)
                except FAILURES as failure:
                    raise self.unavailable(failure, None) from failure
        owner = self._primary(error.host or redis_client.location(node.redis)[0], error.port)
        if self._owners:
            self._owners[error.slot_id] = owner
        self.look_soon()
        return owner

    def look_soon(self, besides: Node | None = None, *, at_once: bool = False) -> None:
        """Begins a look at which servers there are, and which primary has which slots.

        Does nothing if a look runs or has just begun, or if `besides` is the only server.
        """
        if besides is not None and besides is self.single:
            return
        now = asyncio.get_running_loop().time()
        if (self._look is None or self._look.done()) and (at_once or now >= self._next_look):
            self._next_look = now + BETWEEN_LOOKS_SECONDS
            self._look = asyncio.create_task(self._read(besides))
            self._look.add_done_callback(_log_failure)

    def demoted(self, node: Node) -> None:
        """Leaves a server that has become a replica, for the primary that has replaced it.

        The address of a single server leads to that one, but connections can stay open.
        """
        if node is self.single:
            node.pool.close_link()  # a call that is repeated at once must not use it
            self._finish(node.pool.renew())
        else:
            self.look_soon(besides=node)

    def unavailable(
        self, error: Exception, node: Node | None, *, sent: bool = False
    ) -> RedisUnavailable:
        """Returns the error for the caller. Looks for a new primary if `node` is away.

        Raises `error` if it is no outage.
        """
        require_outage(error)
        refused, reason = isinstance(error, ResponseError), describe(error)
        if node:
            self.failures[node.name] = reason
        if node and isinstance(error, ReadOnlyError):
            self.demoted(node)
        elif isinstance(error, Stranger):
            self.look_soon()
        elif node and (not refused or isinstance(error, ClusterDownError)):
            self.look_soon(besides=node)
        # A refusal is a reply: the script has changed nothing.
        return RedisUnavailable(reason, maybe_executed=sent and not refused)

    async def watch(self) -> None:
        """Calls each primary every second on its link, until it is cancelled.

        In a cluster, the link of a primary that does not answer is closed. Otherwise one that was
        frozen and replaced could execute calls that it got before, when it thaws. The watch also
        notices a primary that has become a replica, the new owner of a slot that had none, and a
        single server that has become a node of a cluster.
        """
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            self._look_for_owners()
            nodes = [self.single] if self.single else [*self._primaries.values()]
            await asyncio.gather(*map(self._probe, nodes))

    async def close(self) -> None:
        """Closes the connections to all nodes except the address."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.gather(self._look, return_exceptions=True)
        self._forget()
        self._closed.set()
        await asyncio.gather(*self._closing)
        self._closed.clear()

    async def _probe(self, node: Node) -> None:
        try:
            # The link of a single server has calls that may take longer.
            async with asyncio.timeout(PROBE_SECONDS if node.name else None):
                info = await (await node.pool.link()).ask("INFO", "replication", "cluster")
        except FAILURES as error:
            log.debug("%s: %s", node.name, self.unavailable(error, node))
        else:
            if "role:slave" in str(info):
                # A pod without a heartbeat on this node sends no call that would get a `MOVED`.
                self.demoted(node)
            if node is self.single and "cluster_enabled:1" in str(info):
                # A call of several items gets no `MOVED`.
                self.look_soon()

    async def _known(self) -> None:
        """Waits until a look has found which servers there are."""
        if self.single is None and not self._owners:
            self.look_soon(at_once=True)
            if self._look:
                await asyncio.shield(self._look)

    def _look_for_owners(self) -> None:
        """Begins a look if a slot has no owner.

        Without an owner, a pod sends neither a heartbeat nor a reservation, so no call would look.
        """
        if None in self._owners:
            self.look_soon()

    async def _read(self, besides: Node | None) -> None:
        """Asks the nodes for the map.

        If only a server of no cluster or of another one answers, it is asked again together with
        the known nodes, for `STRANGER_SECONDS`. The known nodes may be cut off from this process,
        but still sell to others.
        """
        end = asyncio.get_running_loop().time() + STRANGER_SECONDS
        view = await self._asked(besides)
        while not self._ours(view):
            if asyncio.get_running_loop().time() >= end:
                self._forget()
                break
            await asyncio.sleep(LOOK_SECONDS)
            view = await self._asked()
        if view is None:
            self.single = self._seed
        else:
            self._take(view)

    async def _asked(self, besides: Node | None = None) -> View | None:
        """Asks all nodes at once. The first whole answer counts, or else the largest.

        A node that has just failed is not asked. It may be frozen, or cut off from the others.
        Returns the answer of a stranger only if no known node answers.
        """
        everyone = self._primaries | {self._seed_name: self._seed}
        asked = dict(everyone)
        if besides:
            asked.pop(besides.name or self._seed_name, None)
        tasks = [asyncio.create_task(self._view(node)) for node in (asked or everyone).values()]
        found: list[View | None] = []
        failure: Exception = Disconnected("no node has answered in time")
        try:
            async with asyncio.timeout(LOOK_SECONDS if self._owners else FIRST_LOOK_SECONDS):
                for answer in asyncio.as_completed(tasks):
                    try:
                        view = await answer
                    except FAILURES as error:
                        failure = error
                        continue
                    found.append(view)
                    if self._ours(view) and (view is None or view.covered == SLOTS):
                        break
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not found:
            raise failure
        return max(found, key=lambda view: (self._ours(view), view.covered if view else 0))

    def _ours(self, view: View | None) -> bool:
        """Whether a view may replace the map: it shares a node with it, or there is none."""
        return not self._ids or (view is not None and not self._ids.isdisjoint(view.ids))

    async def _view(self, node: Node) -> View | None:
        """Returns the node's view of the cluster, or None if there is no cluster."""
        refusal: ResponseError | None = None
        if node is self._seed:  # at the address of a former node, there may be any server now
            try:
                info = await node.redis.info("cluster")
            except ResponseError as error:
                if not denies_command(error):
                    raise
                refusal = error
            else:
                if not info.get("cluster_enabled"):
                    return None
        ask = cast("Callable[..., Awaitable[Any]]", node.redis.execute_command)
        try:
            entries = await ask("CLUSTER", "SLOTS")
        except ResponseError as error:
            if refusal and "cluster support disabled" in str(error):
                return None
            raise refusal or error from None
        if not entries:
            raise Disconnected(
                f"the cluster of {self._seed_name} has no slots assigned "
                "(flashsalectl form-redis-cluster assigns them)"
            )
        return View.of(entries, redis_client.location(node.redis)[0])

    async def _connected(self, connection: Any) -> None:  # noqa: ANN401 - redis-py's
        """Prepares a new connection to a node. Raises `Stranger` if another server has answered."""
        await connection.on_connect()
        await connection.send_command("CLUSTER", "SLOTS")
        place = f"{connection.host}:{connection.port}"
        try:
            view = View.of(await connection.read_response(), connection.host)
        except ResponseError as error:
            if denies_command(error):
                raise
            raise Stranger(f"the server at {place} is no node of the cluster: {error}") from error
        if not self._ours(view):
            raise Stranger(f"the server at {place} is no node of the cluster")

    def _take(self, view: View) -> None:
        """Makes `view` the map. Keeps the connections to the primaries that stay."""
        self.single = None
        owners: list[Node | None] = [None] * SLOTS
        for first, last, host, port in view.ranges:
            owners[first : last + 1] = [self._primary(host, port)] * (last - first + 1)
        used = dict.fromkeys(owner for owner in owners if owner)
        self._owners, self._ids = owners, view.ids
        self._drop([node for node in self._primaries.values() if node not in used])
        self._primaries = {node.name: node for node in used}

    def _primary(self, host: str, port: int) -> Node:
        name = f"{host}:{port}"
        if name not in self._primaries:
            client = redis_client.neighbour(self._seed.redis, host, port, self._connected)
            self._primaries[name] = Node.of(name, client)
        return self._primaries[name]

    def _forget(self) -> None:
        self._drop(self._primaries.values())
        self._primaries, self._owners, self._ids = {}, [], frozenset()

    def _drop(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            node.pool.close_link()
            self._finish(self._close_later(node))

    def _finish(self, closing: Coroutine[Any, Any, None]) -> None:
        """Closes connections in a task, which `close` waits for."""
        task = asyncio.create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close_later(self, node: Node) -> None:
        """Closes the connections of a node after the last call that may use one.

        redis-py raises an `AttributeError` if a connection is closed while it connects.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * NODE_SECONDS):
                await self._closed.wait()
        await node.redis.aclose()


def _log_failure(look: "asyncio.Task[None]") -> None:
    if not look.cancelled() and (error := look.exception()):
        log.debug("cannot read the slots of the cluster: %s", error)
