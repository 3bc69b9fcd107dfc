"""The index of an engine's items in Redis, and the engine's id. Both keys have one slot."""

from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple, TypeVar, cast

from redis.asyncio import Redis

from flashsale import keys
from flashsale.errors import OtherEngine, RedisUnavailable
from flashsale.keys import ItemKeys
from flashsale.nodes import Nodes
from flashsale.scripts import Script, Scripts

T = TypeVar("T")


class Indexed(NamedTuple):
    """The items of the index, sorted, and whether this run of Redis was claimed at that moment.

    `claimed` is None while the index is away. The items are then those that were read last.
    """

    items: list[str]
    claimed: bool | None


class Index:
    """An engine's index and id. Every method raises `RedisUnavailable` if the call fails.

    In a cluster, the node of these keys can be away while the items of other nodes sell.
    """

    def __init__(self, nodes: Nodes, engine: str) -> None:
        self._nodes = nodes
        self._engine = engine
        self._items = keys.items(engine)
        self._id = keys.engine_id(engine)
        self._scripts = Scripts(nodes)
        self._run = keys.claimed_run(engine)
        self._claim = Script("claim")
        self._look = Script("index")
        self._last_items: list[str] = []

    async def add(self, item_ids: Iterable[str]) -> None:
        """Adds items to the index that the sweeper and the operator walk. Idempotent.

        If only the index is away, the operator's next resync adds all items of the ledger.
        """
        if items := list(item_ids):
            await self._try(self._items, lambda redis: redis.sadd(self._items, *items))

    async def remove(self, item_id: str) -> None:
        """Removes an item from the index, unless it has keys."""
        await self._try(self._items, lambda redis: redis.srem(self._items, item_id))
        item_keys = ItemKeys.of(item_id, self._engine).sold
        if await self._nodes.call(item_keys[0], lambda redis: redis.exists(*item_keys)):
            # A sale of the item was seeded in the meantime.
            await self.add([item_id])

    async def items(self, known: Iterable[str] = ()) -> list[str]:
        """Returns the items of the index and the `known` ones, sorted.

        If an item of the index has no keys, Redis has lost them, or a sale is about to be seeded.
        While the index is away, its items are those that this object has read last.
        """
        found = set(known)
        try:
            await self.read()
        except RedisUnavailable:
            if not found:
                raise
        return sorted(found.union(self._last_items))

    async def read(self) -> Indexed:
        """Returns the index and whether this run of Redis is claimed, in one round trip.

        Without a claim, Redis is new, has lost its keys or is an older copy of itself. So the index
        may lack items.
        """
        try:
            owner, current, members = await self._looked("items")
        except RedisUnavailable:
            if not self._last_items:
                raise
            return Indexed(self._last_items, None)
        self._last_items = sorted(members)
        return Indexed(self._last_items, bool(owner and current))

    async def _looked(self, part: str) -> tuple[str, int, list[str]]:
        """Returns the answer of `index.lua`."""
        owner, current, members = await self._scripts.call(
            self._look, (self._id, self._items, self._run), (part,)
        )
        return owner, current, members

    async def engine_id(self) -> str:
        """Returns the id of the engine that this Redis serves, or "" if none has claimed it."""
        found = await self._nodes.call(
            self._id, lambda redis: cast("Awaitable[str | None]", redis.get(self._id))
        )
        return found or ""

    async def claimed(self, engine_id: str) -> bool:
        """Whether the engine has claimed this run of Redis. False while the claim's node is away.

        Raises `OtherEngine` if another engine has claimed it.
        """
        try:
            owner, current, _ = await self._looked("")
        except RedisUnavailable:
            if self._nodes.single:
                raise
            return False
        self._require(owner, engine_id)
        return bool(owner and current)

    async def claim(self, engine_id: str, item_ids: Iterable[str] = ()) -> None:
        """Claims this Redis for an engine, and adds items to the index at the same moment.

        In a claimed Redis, the index has all items that should have keys. If only the claim's node
        is away, each sale still names its engine. Raises `OtherEngine` if another engine has
        claimed this Redis.
        """
        try:
            owner = await self._scripts.call(
                self._claim, (self._id, self._items, self._run), (engine_id, *item_ids)
            )
        except RedisUnavailable:
            if self._nodes.single:
                raise
        else:
            self._require(str(owner), engine_id)

    def _require(self, owner: str, engine_id: str) -> None:
        """Raises `OtherEngine` if the owner of this Redis is another engine."""
        if owner not in ("", engine_id):
            raise OtherEngine(
                f"this Redis belongs to engine {owner}, and the ledger to engine {engine_id}, both "
                f"named {self._engine}: use a Redis of its own, or another FLASHSALE_ENGINE, or "
                f"empty this Redis if engine {owner} is gone"
            )

    async def _try(self, key: str, command: Callable[[Redis], Awaitable[T]]) -> T | None:
        """Calls a key that no item needs. Its server may be away while the others work."""
        try:
            return await self._nodes.call(key, command)
        except RedisUnavailable:
            if self._nodes.single:
                raise
            return None
