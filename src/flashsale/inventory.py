"""Sales and reservations in Redis: typed calls of the Lua scripts, and reads.

Only this module and `outbox.py` use an item's keys. The operator's rebuild is the one exception.
"""

from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from enum import StrEnum
from typing import Final, NamedTuple, cast

from redis.asyncio import Redis

from flashsale.errors import ContractViolation
from flashsale.keys import ITEMS, ItemKeys
from flashsale.reservations import BatchReply, Outcome, Record, Request, parse_reply
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


class Closed(StrEnum):
    """Results of `close.lua`, with the script's own words."""

    CLOSED = "closed"
    UNCHANGED = "unchanged"
    STALE = "stale"
    UNKNOWN = "unknown"
    UNSUPPORTED = "unsupported"


class Freed(StrEnum):
    """Results of `free.lua`, with the script's own words."""

    FREED = "freed"
    UNKNOWN = "unknown"
    UNSUPPORTED = "unsupported"
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
    """Sales in Redis. Every method raises `RedisUnavailable` if the call fails."""

    def __init__(self, redis: "Redis", *, outbox_limit: int = OUTBOX_LIMIT) -> None:
        self._redis = redis
        self._scripts = Scripts(redis)
        self._outbox_limit = outbox_limit
        self._reserve = Script("reserve")
        self._apply = Script("apply")
        self._close = Script("close")
        self._free = Script("free")

    async def reserve(
        self, item_id: str, requests: Sequence[Request], *, timeout_seconds: float
    ) -> BatchReply | Outcome:
        """Decides a batch of at most `BATCH_LIMIT` requests for one item.

        A single `Outcome` (unknown, unsupported, fenced) applies to every request. After a failure
        the caller can send the same requests again, because their ids make the second call a
        replay.
        """
        lines = "".join(f"{r[0]},{r[1]},{r[2]},{r[3]},{r[4]}\n" for r in requests)
        reply = await self._scripts.call_quickly(
            self._reserve,
            ItemKeys.of(item_id).four,
            (self._outbox_limit, len(requests), lines),
            timeout_seconds,
        )
        return parse_reply(str(reply))

    async def apply(
        self,
        spec: SaleSpec,
        revision: int,
        *,
        seed_until_ms: int | None = None,
        replaces: Predecessor | None = None,
    ) -> Applied:
        """Makes Redis agree with `spec`. The ledger must have the row of `revision` already.

        `seed_until_ms` permits creating the keys until that time of Redis' clock. The caller has
        just seen that no data of this sale can be lost, so missing keys mean a new sale.
        `replaces` is the finished sale of the item that this one may replace.
        """
        await translated(self._redis.sadd(ITEMS, spec.item_id))
        other_id, other_accepted = replaces or ("", 0)
        arguments = (
            *spec.arguments(revision),
            "" if seed_until_ms is None else seed_until_ms,
            other_id,
            other_accepted,
        )
        return Applied(
            await self._scripts.call(self._apply, ItemKeys.of(spec.item_id).four, arguments)
        )

    async def close(self, item_id: str, sale_id: str, revision: int) -> Closed:
        """Closes a sale. A fenced sale is closed too, and stays fenced."""
        return Closed(
            await self._scripts.call(self._close, ItemKeys.of(item_id).four, (sale_id, revision))
        )

    async def free(self, item_id: str, sale_id: str, revision: int, recorded: int) -> Freed:
        """Deletes the keys of a closed sale that the ledger has recorded completely.

        `revision` is the revision of the closed ledger row, and `recorded` its accepted units.
        """
        keys = ItemKeys.of(item_id).four
        freed = Freed(await self._scripts.call(self._free, keys, (sale_id, revision, recorded)))
        if freed is Freed.FREED:
            await translated(self._redis.srem(ITEMS, item_id))
            if await translated(self._redis.exists(*keys)):
                # Another sale of the item was seeded in the meantime.
                await self.index([item_id])
        return freed

    async def index(self, item_ids: Iterable[str]) -> None:
        """Adds items to the index that the sweeper and the operator walk. Idempotent."""
        if items := list(item_ids):
            await translated(self._redis.sadd(ITEMS, *items))

    async def items(self) -> list[str]:
        """Returns the items that have keys, sorted."""
        return sorted(await translated(cast("Awaitable[set[str]]", self._redis.smembers(ITEMS))))

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
            keys = ItemKeys.of(item_id)
            pipeline.hgetall(keys.sale)
            pipeline.xlen(keys.outbox)
            pipeline.exists(keys.buyers, keys.reservations, keys.outbox)
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
                self._redis.hget(ItemKeys.of(item_id).reservations, reservation_id),
            )
        )
        return None if text is None else Record.parse(text)

    async def reservation_pages(
        self, item_id: str, count: int = 500
    ) -> AsyncIterator[list[tuple[str, Record]]]:
        """Yields all reservations of an item, with their ids, in pages of about `count`.

        A reservation can appear twice, and one accepted during the scan can be missing. Raises
        `ContractViolation` if a record cannot be read.
        """
        cursor = 0
        while True:
            scanned = self._redis.hscan(ItemKeys.of(item_id).reservations, cursor, count=count)
            cursor, page = await translated(cast("Awaitable[tuple[int, dict[str, str]]]", scanned))
            yield [(reservation_id, Record.parse(text)) for reservation_id, text in page.items()]
            if not cursor:
                return

    async def load(self) -> None:
        """Loads the `reserve` script, so that the first buyer does not wait for it."""
        await self._scripts.load(self._reserve)

    async def eviction_policy(self) -> str:
        """Returns the server's `maxmemory-policy`. Any but `noeviction` can drop a sale's keys."""
        info = await translated(self._redis.info("memory"))
        return str(info["maxmemory_policy"])


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
        )
    except (KeyError, ValueError) as error:
        raise ContractViolation(f"{item_id}: the sale cannot be read: {error}") from error
