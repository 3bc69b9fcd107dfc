"""Sales and reservations in Redis: typed calls of the Lua scripts, and reads.

Only this module and `outbox.py` use an item's keys. The operator's rebuild is the one exception.
"""

from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from enum import StrEnum
from typing import Final, NamedTuple, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError

from flashsale import keys, redis_client
from flashsale.errors import ContractViolation, OtherEngine, RedisUnavailable
from flashsale.keys import DEFAULT_ENGINE, ItemKeys
from flashsale.requirements import RedisFacts
from flashsale.reservations import (
    BatchReply,
    Call,
    Expired,
    Outcome,
    Record,
    Request,
    Snapshot,
    Transition,
    TransitionReply,
    parse_expired,
    parse_reply,
    parse_transitions,
)
from flashsale.sale import Predecessor, Sale, SaleSpec
from flashsale.scripts import Script, Scripts, leased, translated

LOOK_SECONDS: Final = 1.0
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


class Holds(NamedTuple):
    """An item's open holds. `overdue` of them can be expired, the first since `first_due_ms`."""

    open: int
    overdue: int
    first_due_ms: int


class Look(NamedTuple):
    """A sale and one of its reservations, as `look.lua` found them at one moment of one server."""

    sale: Sale | None
    record: Record | None
    server: ServerTime


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
        self._confirm = Script("confirm", "transition")
        self._cancel = Script("cancel", "transition")
        self._expire = Script("expire", "transition")
        self._look = Script("look")

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
            self._keys(item_id).sold,
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
        other_id, other_accepted, other_released = replaces or ("", 0, 0)
        arguments = (
            *spec.arguments(revision),
            "" if seed_until_ms is None else seed_until_ms,
            other_id,
            other_accepted,
            other_released,
            engine_id,
        )
        item_keys = self._keys(spec.item_id).sold
        return Applied(await self._scripts.call(self._apply, item_keys, arguments))

    async def close(self, item_id: str, sale_id: str, revision: int, engine_id: str = "") -> Closed:
        """Closes a sale. A fenced sale is closed too, and stays fenced."""
        item_keys = self._keys(item_id).sold
        arguments = (sale_id, revision, engine_id)
        return Closed(await self._scripts.call(self._close, item_keys, arguments))

    async def confirm(
        self, item_id: str, calls: Sequence[Call], *, timeout_seconds: float, engine_id: str = ""
    ) -> TransitionReply | Transition:
        """Confirms at most `BATCH_LIMIT` reservations of an item, each for an order.

        A single `Transition` (unknown, unsupported, fenced, other_engine) applies to every call.
        After a failure the caller can send the same calls again: the second one is a replay.
        """
        return await self._change(self._confirm, item_id, calls, timeout_seconds, engine_id)

    async def cancel(
        self, item_id: str, calls: Sequence[Call], *, timeout_seconds: float, engine_id: str = ""
    ) -> TransitionReply | Transition:
        """Cancels at most `BATCH_LIMIT` reservations of an item, as `confirm` confirms them."""
        return await self._change(self._cancel, item_id, calls, timeout_seconds, engine_id)

    async def expire(
        self, item_id: str, limit: int, *, timeout_seconds: float, engine_id: str = ""
    ) -> Expired | Transition:
        """Ends at most `limit` holds (1 or more) of an item whose time and grace are over."""
        reply = await self._scripts.call_quickly(
            self._expire, self._keys(item_id).sold, (limit, engine_id), timeout_seconds
        )
        return parse_expired(str(reply))

    async def lease_expiry(self, item_id: str, pod_id: str, lease_ms: int) -> bool:
        """Takes or renews the lease to expire an item's holds. False if another pod has it.

        The lease only saves work: a hold expires once, however many pods try.
        """
        return await leased(self._redis, self._keys(item_id).expiry, pod_id, lease_ms)

    async def holds(self, item_ids: Iterable[str], now_ms: int) -> dict[str, Holds]:
        """Returns the open holds of each item, at a time of Redis' clock."""
        wanted = list(item_ids)
        pipeline = self._redis.pipeline(transaction=False)
        for item_id in wanted:
            key = self._keys(item_id).holds
            pipeline.zcard(key)
            pipeline.zcount(key, "-inf", now_ms)
            pipeline.zrange(key, 0, 0, withscores=True)
        replies = await translated(pipeline.execute()) if wanted else []
        return {
            item_id: Holds(total, overdue, int(first[0][1]) if first else 0)
            for item_id, total, overdue, first in zip(
                wanted, *(replies[n::3] for n in range(3)), strict=True
            )
        }

    async def _change(
        self,
        script: Script,
        item_id: str,
        calls: Sequence[Call],
        timeout_seconds: float,
        engine_id: str,
    ) -> TransitionReply | Transition:
        lines = "".join(f"{c[0]},{c[1]},{c[2]}\n" for c in calls)
        reply = await self._scripts.call_quickly(
            script, self._keys(item_id).sold, (lines, len(calls), engine_id), timeout_seconds
        )
        return parse_transitions(str(reply))

    async def free(  # noqa: PLR0913 - the row's numbers
        self,
        item_id: str,
        sale_id: str,
        revision: int,
        *,
        accepted: int,
        released: int,
        engine_id: str = "",
    ) -> Freed:
        """Deletes the keys of a closed sale that the ledger has recorded completely.

        The numbers are those of the closed ledger row.
        """
        item_keys = self._keys(item_id).sold
        arguments = (sale_id, revision, accepted, released, engine_id)
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
            pipeline.zcard(item.holds)
        replies = await translated(pipeline.execute()) if wanted else []
        found = {}
        for item_id, fields, outbox_length, parts, holds in zip(
            wanted, *(replies[n::4] for n in range(4)), strict=True
        ):
            if fields:
                try:
                    found[item_id] = _sale(item_id, fields, outbox_length, parts, holds)
                except ContractViolation:
                    if not skip_unreadable:
                        raise
        return found

    async def look(self, item_id: str, reservation_id: str = "") -> Look:
        """Reads an item's sale, and one of its reservations, in one quick round trip.

        Raises `ContractViolation` if either cannot be read.
        """
        reply = await self._scripts.call_quickly(
            self._look, self._keys(item_id).sold, (reservation_id,), LOOK_SECONDS
        )
        try:
            now_ms, run_id, outbox_length, parts, holds, record, *fields = _texts(str(reply))
        except msgspec.DecodeError as error:
            raise ContractViolation(f"{item_id}: the sale cannot be read: {error}") from error
        found = dict(zip(fields[::2], fields[1::2], strict=True))
        return Look(
            _sale(item_id, found, int(outbox_length), int(parts), int(holds)) if found else None,
            Record.parse(record) if record else None,
            ServerTime(int(now_ms), run_id),
        )

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
            item_keys = self._keys(item_id).sold
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
        """Loads the scripts of buyers and orders, so that the first call does not wait for them."""
        await self._scripts.load(self._reserve, self._confirm, self._cancel, self._expire)

    async def facts(self) -> RedisFacts:
        """Returns the server's version and settings, to compare with `requirements.REDIS`."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.info()
        pipeline.config_get("repl-backlog-ttl")
        pipeline.eval(_TRY_INFO, 1, keys.engine_id(self.engine))
        info, config, script = await translated(pipeline.execute(raise_on_error=False))
        for reply in (info, script):
            if isinstance(reply, RedisError) and not isinstance(reply, NoPermissionError):
                raise RedisUnavailable(f"Redis refused the call: {reply}") from reply
        if isinstance(info, NoPermissionError):
            info = {}
            script = "this user may not call it"
        return RedisFacts(
            version=info.get("redis_version"),
            policy=info.get("maxmemory_policy"),
            backlog_ttl=None if isinstance(config, RedisError) else config.get("repl-backlog-ttl"),
            appendonly=bool(info.get("aof_enabled", True)),
            script_error=" ".join(str(script).split()),
        )


_TRY_INFO: Final = """
local info = redis.pcall('INFO', 'server', 'replication')
if type(info) == 'table' then return info.err end
if not string.match(info, 'run_id:%x+') then return 'INFO has no run_id' end
if not string.match(info, 'master_replid2:%x+') then return 'INFO has no master_replid2' end
return ''
"""


_texts = msgspec.json.Decoder(list[str]).decode

_UNREADABLE: Final = {
    "unknown": "Redis has no sale of this item",
    "unsupported": "this version cannot read the sale",
    "fenced": "the sale is fenced: rebuild it first",
}


def _sale(item_id: str, fields: dict[str, str], outbox_length: int, parts: int, holds: int) -> Sale:
    if fields.get("format") != "1":
        raise ContractViolation(f"{item_id}: format {fields.get('format')!r} is not supported")
    try:
        accepted, held = int(fields["accepted"]), int(fields.get("held") or 0)
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
            torn=(accepted > 0 and parts < 3) or (held > 0 and not holds),
            engine=fields.get("engine", ""),
            held=held,
            hold_ms=int(fields.get("hold_ms") or 0),
            max_expired_holds=int(fields.get("max_expired_holds") or 3),
        )
    except (KeyError, ValueError) as error:
        raise ContractViolation(f"{item_id}: the sale cannot be read: {error}") from error
