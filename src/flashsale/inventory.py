"""Sales and reservations in Redis: typed calls of the Lua scripts, and reads.

Only this module and `outbox.py` use an item's keys. The operator's rebuild is the one exception.
"""

from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from enum import StrEnum
from typing import Final, NamedTuple, cast

from redis.asyncio import Redis

from flashsale import keys, redis_client
from flashsale.errors import ContractViolation, OtherEngine, RedisUnavailable
from flashsale.keys import DEFAULT_ENGINE, ItemKeys
from flashsale.reservations import BatchReply, Outcome, Record, Request, Snapshot, parse_reply
from flashsale.sale import Predecessor, Sale, SaleSpec
from flashsale.scripts import Script, Scripts, translated

OUTBOX_LIMIT: Final = 100_000
"""Entries in an item's outbox at which `reserve` refuses new buyers (`outbox_full`)."""


class Applied(StrEnum):
    """Results of `apply.lua`, with the script's own words."""

    SEEDED = "seeded"
    CHANGED = "changed"
    UNCHANGED = "unchanged"
    STALE = "stale"
    MISSING = "missing"
    FENCED = "fenced"
    CONFLICT = "conflict"
    ENDED = "ended"
    UNSUPPORTED = "unsupported"
    OTHER_ENGINE = "other_engine"


class Closed(StrEnum):
    """Results of `close.lua`, with the script's own words."""

    CLOSED = "closed"
    UNCHANGED = "unchanged"
    STALE = "stale"
    UNKNOWN = "unknown"
    UNSUPPORTED = "unsupported"
    OTHER_ENGINE = "other_engine"


class Freed(StrEnum):
    """Results of `free.lua`, with the script's own words."""

    FREED = "freed"
    UNKNOWN = "unknown"
    UNSUPPORTED = "unsupported"
    OTHER_ENGINE = "other_engine"
    OPEN = "open"
    UNRECORDED = "unrecorded"


class ServerTime(NamedTuple):
    """Redis' clock in Unix milliseconds, and the server's run as `read_sale` compares it.

    `run_id` is the server's run_id and its `master_replid2`, joined by a colon. The latter is the
    replication id of the master that this server followed before it became a master itself.
    """

    now_ms: int
    run_id: str


class Inventory:
    """An engine's sales in Redis. Every method raises `RedisUnavailable` if the call fails."""

    def __init__(
        self, redis: "Redis", engine: str = DEFAULT_ENGINE, *, outbox_limit: int = OUTBOX_LIMIT
    ) -> None:
        self.redis = self._redis = redis
        self.engine = engine
        self._items = keys.items(engine)
        self._scripts = Scripts(redis)
        self._outbox_limit = outbox_limit
        self._reserve = Script("reserve")
        self._apply = Script("apply")
        self._close = Script("close")
        self._free = Script("free")
        self._page = Script("page")

    async def reserve(
        self,
        item_id: str,
        requests: Sequence[Request],
        *,
        timeout_seconds: float,
        engine_id: str = "",
    ) -> BatchReply | Outcome:
        """Decides a batch of at most `BATCH_LIMIT` requests for one item.

        A single `Outcome` (unknown, unsupported, fenced, other_engine) applies to every request.
        After a failure the caller can send the same requests again, because their ids make the
        second call a replay. `engine_id` is the pod's engine, or empty if the pod does not know it.
        """
        lines = "".join(f"{r[0]},{r[1]},{r[2]},{r[3]},{r[4]}\n" for r in requests)
        reply = await self._scripts.call_quickly(
            self._reserve,
            self._keys(item_id).four,
            (self._outbox_limit, len(requests), lines, engine_id),
            timeout_seconds,
        )
        return parse_reply(str(reply))

    async def apply(
        self,
        spec: SaleSpec,
        revision: int,
        *,
        engine_id: str = "",
        seed_until_ms: int | None = None,
        replaces: Predecessor | None = None,
    ) -> Applied:
        """Makes Redis agree with `spec`. The ledger must have the row of `revision` already.

        `seed_until_ms` permits creating the keys until that time of Redis' clock. The caller has
        just seen that no data of this sale can be lost, so missing keys mean a new sale.
        `replaces` is the finished sale of the item that this one may replace.
        """
        await translated(self._redis.sadd(self._items, spec.item_id))
        other_id, other_accepted = replaces or ("", 0)
        arguments = (
            *spec.arguments(revision),
            "" if seed_until_ms is None else seed_until_ms,
            other_id,
            other_accepted,
            engine_id,
        )
        item_keys = self._keys(spec.item_id).four
        return Applied(await self._scripts.call(self._apply, item_keys, arguments))

    async def close(self, item_id: str, sale_id: str, revision: int, engine_id: str = "") -> Closed:
        """Closes a sale. A fenced sale is closed too, and stays fenced."""
        item_keys = self._keys(item_id).four
        arguments = (sale_id, revision, engine_id)
        return Closed(await self._scripts.call(self._close, item_keys, arguments))

    async def free(
        self, item_id: str, sale_id: str, revision: int, recorded: int, engine_id: str = ""
    ) -> Freed:
        """Deletes the keys of a closed sale that the ledger has recorded completely.

        `revision` is the revision of the closed ledger row, and `recorded` its accepted units.
        """
        item_keys = self._keys(item_id).four
        arguments = (sale_id, revision, recorded, engine_id)
        freed = Freed(await self._scripts.call(self._free, item_keys, arguments))
        if freed is Freed.FREED:
            await translated(self._redis.srem(self._items, item_id))
            if await translated(self._redis.exists(*item_keys)):
                # Another sale of the item was seeded in the meantime.
                await self.index([item_id])
        return freed

    async def index(self, item_ids: Iterable[str]) -> None:
        """Adds items to the index that the sweeper and the operator walk. Idempotent."""
        if items := list(item_ids):
            await translated(self._redis.sadd(self._items, *items))

    async def items(self) -> list[str]:
        """Returns the items that have keys, sorted."""
        members = self._redis.smembers(self._items)
        return sorted(await translated(cast("Awaitable[set[str]]", members)))

    async def server(self) -> ServerTime:
        """Returns Redis' clock and run. Sales written under another run are fenced."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.time()
        pipeline.info("server", "replication")
        (seconds, microseconds), info = await translated(pipeline.execute())
        # redis-py converts an id of digits only, such as 40 zeros, to a number.
        ids = (str(info[name]).zfill(40) for name in ("run_id", "master_replid2"))
        return ServerTime(seconds * 1000 + microseconds // 1000, ":".join(ids))

    async def sales(
        self, item_ids: Iterable[str], *, skip_unreadable: bool = False
    ) -> dict[str, Sale]:
        """Returns the sale of each item that has one.

        Raises `ContractViolation` if a sale cannot be read, unless `skip_unreadable` is set.
        """
        wanted = list(item_ids)
        pipeline = self._redis.pipeline(transaction=False)
        for item_id in wanted:
            item = self._keys(item_id)
            pipeline.hgetall(item.sale)
            pipeline.xlen(item.outbox)
            pipeline.exists(item.buyers, item.reservations, item.outbox)
        replies = await translated(pipeline.execute()) if wanted else []
        found = {}
        for item_id, fields, outbox_length, parts in zip(
            wanted, replies[::3], replies[1::3], replies[2::3], strict=True
        ):
            if fields:
                try:
                    found[item_id] = _sale(item_id, fields, outbox_length, parts)
                except ContractViolation:
                    if not skip_unreadable:
                        raise
        return found

    async def reservation(self, item_id: str, reservation_id: str) -> Record | None:
        """Returns a reservation, or None if Redis has none with this id."""
        text = await translated(
            cast(
                "Awaitable[str | None]",
                self._redis.hget(self._keys(item_id).reservations, reservation_id),
            )
        )
        return None if text is None else Record.parse(text)

    async def reservation_pages(
        self, item_id: str, count: int = 500
    ) -> AsyncIterator[tuple[Snapshot, list[tuple[str, Record]]]]:
        """Yields all reservations of an item, with their ids, in pages of about `count`.

        Each page has the snapshot of the sale at the moment it was read. A reservation can appear
        twice, and one accepted during the scan can be missing. Raises `ContractViolation` if the
        item has no sale that can be read, or a fenced one, which may be an older copy.
        """
        cursor = "0"
        while True:
            item_keys = self._keys(item_id).four
            page = await self._scripts.call(self._page, item_keys, (cursor, count))
            if isinstance(page, str):
                raise ContractViolation(f"{item_id}: {_UNREADABLE[page]}")
            cursor, sale_id, allocated, capacity, revision, engine, *pairs = page
            yield (
                Snapshot(sale_id, int(allocated), int(capacity), int(revision), engine),
                [
                    (reservation_id, Record.parse(text))
                    for reservation_id, text in zip(pairs[::2], pairs[1::2], strict=True)
                ],
            )
            if cursor == "0":
                return

    @property
    def address(self) -> str:
        """The server's address, host:port/db."""
        return redis_client.address(self._redis)

    async def engine_id(self) -> str:
        """Returns the id of the engine that this Redis serves, or "" if none has claimed it."""
        found = self._redis.get(keys.engine_id(self.engine))
        return str(await translated(cast("Awaitable[str | None]", found)) or "")

    async def claim(self, engine_id: str) -> None:
        """Claims this Redis for an engine. Raises `OtherEngine` if another engine has it."""
        key = keys.engine_id(self.engine)
        claimed = self._redis.set(key, engine_id, nx=True, get=True)
        owner = await translated(cast("Awaitable[str | None]", claimed))
        if owner not in (None, engine_id):
            raise OtherEngine(
                f"this Redis belongs to engine {owner}, and the ledger to engine {engine_id}, both "
                f"named {self.engine}: use a Redis of its own, or another FLASHSALE_ENGINE"
            )

    def _keys(self, item_id: str) -> ItemKeys:
        return ItemKeys.of(item_id, self.engine)

    async def load(self) -> None:
        """Loads the `reserve` script, so that the first buyer does not wait for it."""
        await self._scripts.load(self._reserve)

    async def unsafe_setting(self) -> str | None:
        """Returns a sentence about a setting of the server that endangers sales, or None.

        A server that does not permit CONFIG is trusted to have `repl-backlog-ttl 0`.
        """
        info = await translated(self._redis.info("memory"))
        if (policy := str(info["maxmemory_policy"])) != "noeviction":
            return (
                f"Redis' maxmemory-policy is {policy}: it must be noeviction, "
                "or a full Redis drops sales (CONFIG SET maxmemory-policy noeviction)"
            )
        try:
            config = await translated(self._redis.config_get("repl-backlog-ttl"))
        except RedisUnavailable:
            return None
        if (seconds := config.get("repl-backlog-ttl", "0")) != "0":
            return (
                f"Redis' repl-backlog-ttl is {seconds}: it must be 0, or a server that was without "
                "replicas for that time forgets its failovers (CONFIG SET repl-backlog-ttl 0)"
            )
        return None


_UNREADABLE: Final = {
    "unknown": "Redis has no sale of this item",
    "unsupported": "this version cannot read the sale",
    "fenced": "the sale is fenced: rebuild it first",
}


def _sale(item_id: str, fields: dict[str, str], outbox_length: int, parts: int) -> Sale:
    if fields.get("format") != "1":
        raise ContractViolation(f"{item_id}: format {fields.get('format')!r} is not supported")
    try:
        accepted = int(fields["accepted"])
        return Sale(
            item_id=item_id,
            sale_id=fields["sale_id"],
            run_id=fields["run_id"],
            revision=int(fields["revision"]),
            stored_state=fields["state"],
            allocated=int(fields["allocated"]),
            accepted=accepted,
            released=int(fields["released"]),
            max_per_user=int(fields["max_per_user"]),
            display_name=fields.get("display_name") or None,
            starts_ms=int(fields["starts_ms"]) if fields["starts_ms"] else None,
            ends_ms=int(fields["ends_ms"]) if fields["ends_ms"] else None,
            last_now_ms=int(fields["last_now_ms"]),
            outbox_length=outbox_length,
            torn=accepted > 0 and parts < 3,
            engine=fields.get("engine", ""),
        )
    except (KeyError, ValueError) as error:
        raise ContractViolation(f"{item_id}: the sale cannot be read: {error}") from error
