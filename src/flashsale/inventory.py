"""The Lua scripts as typed calls: the only place that talks to Redis about sales."""

from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from enum import StrEnum
from typing import Final, NamedTuple, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from flashsale.errors import ContractViolation
from flashsale.keys import ITEMS, ItemKeys
from flashsale.redis_client import Pool
from flashsale.reservations import BatchReply, OutboxEntry, Outcome, Record, Request, parse_reply
from flashsale.sale import Predecessor, Sale, SaleSpec
from flashsale.scripts import Script, Scripts, translated

OUTBOX_LIMIT: Final = 100_000
"""Entries of an item's outbox above which new buyers meet backpressure."""

MAX_CONNECTIONS: Final = 64
SETTLE_SECONDS: Final = 2.0


class Applied(StrEnum):
    """What `apply.lua` answers; the words are the script's own."""

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
    """What `close.lua` answers; the words are the script's own."""

    CLOSED = "closed"
    UNCHANGED = "unchanged"
    STALE = "stale"
    UNKNOWN = "unknown"
    UNSUPPORTED = "unsupported"


class Freed(StrEnum):
    """What `free.lua` answers; the words are the script's own."""

    FREED = "freed"
    UNKNOWN = "unknown"
    UNSUPPORTED = "unsupported"
    OPEN = "open"
    UNRECORDED = "unrecorded"


class ServerTime(NamedTuple):
    """Redis' clock in Unix milliseconds, and the server's run as sales are stamped with it: its
    run_id, and the replication id of the master that it followed before it became one.
    """

    now_ms: int
    run_id: str


def connect(url: str) -> "Redis":
    """A client of `url` (`redis://…` or `rediss://…`) that never repeats a call by itself.

    A repeated call of a script that timed out would run it again, unseen by the caller. Nothing
    is connected yet.
    """
    pool = Pool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=1,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=2,
        socket_connect_timeout=1,
        # Else some providers send what nobody asked for, and a connection that the server has
        # closed is not noticed before it is used.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )
    return Redis.from_pool(pool)


class Inventory:
    """Sales in Redis. Every method raises `RedisUnavailable` when Redis cannot serve the call."""

    def __init__(self, redis: "Redis", *, outbox_limit: int = OUTBOX_LIMIT) -> None:
        self._redis = redis
        self._scripts = Scripts(redis)
        self._outbox_limit = outbox_limit
        self._reserve = Script("reserve")
        self._settle = Script("settle")
        self._apply = Script("apply")
        self._close = Script("close")
        self._free = Script("free")

    async def reserve(
        self, item_id: str, requests: Sequence[Request], *, timeout_seconds: float
    ) -> BatchReply | Outcome:
        """Decides a batch of at most `BATCH_LIMIT` requests for one item.

        A lone `Outcome` (unknown, unsupported, fenced) holds for every request. The same requests
        may be sent again after a failure: their ids make the second call a replay.
        """
        lines = "".join(f"{r[0]},{r[1]},{r[2]},{r[3]},{r[4]}\n" for r in requests)
        reply = await self._scripts.call_quickly(
            self._reserve,
            ItemKeys.of(item_id).four,
            (self._outbox_limit, len(requests), lines),
            timeout_seconds,
        )
        return parse_reply(str(reply))

    async def settle(self, item_id: str, acknowledged: Sequence[tuple[str, str]]) -> int:
        """Deletes outbox entries, given as (entry id, reservation id); returns how many."""
        return int(
            await self._scripts.call_quickly(
                self._settle,
                [ItemKeys.of(item_id).outbox],
                ("".join(f"{entry_id},{own_id}\n" for entry_id, own_id in acknowledged),),
                SETTLE_SECONDS,
            )
        )

    async def apply(
        self,
        spec: SaleSpec,
        revision: int,
        *,
        seed_until_ms: int | None = None,
        replaces: Predecessor | None = None,
    ) -> Applied:
        """Makes Redis agree with `spec`; the ledger's row for `revision` must exist before.

        `seed_until_ms`: a moment ago nothing of this sale could be lost, so until then, of Redis'
        clock, absent keys mean new.
        `replaces`: a finished sale of the item whose rows are recorded, and its accepted units.
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
        """Closes a sale; a fenced one too, which stays fenced."""
        return Closed(
            await self._scripts.call(self._close, ItemKeys.of(item_id).four, (sale_id, revision))
        )

    async def free(self, item_id: str, sale_id: str, revision: int, recorded: int) -> Freed:
        """Deletes the keys of a closed sale of which the ledger has `recorded` accepted units.

        `revision` is the one of the ledger's row that says closed.
        """
        keys = ItemKeys.of(item_id).four
        freed = Freed(await self._scripts.call(self._free, keys, (sale_id, revision, recorded)))
        if freed is Freed.FREED:
            await translated(self._redis.srem(ITEMS, item_id))
            if await translated(self._redis.exists(*keys)):
                # Another sale took the item meanwhile.
                await self.index([item_id])
        return freed

    async def index(self, item_ids: Iterable[str]) -> None:
        """Has sweeps look at the items, also if they do already."""
        if items := list(item_ids):
            await translated(self._redis.sadd(ITEMS, *items))

    async def items(self) -> list[str]:
        """The items that have keys, sorted."""
        return sorted(await translated(cast("Awaitable[set[str]]", self._redis.smembers(ITEMS))))

    async def server(self) -> ServerTime:
        """Redis' clock and run; the sales of another run are fenced."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.time()
        pipeline.info("server", "replication")
        (seconds, microseconds), info = await translated(pipeline.execute())
        # The client makes a number of what has only digits, such as 40 zeros.
        ids = (str(info[name]).zfill(40) for name in ("run_id", "master_replid2"))
        return ServerTime(seconds * 1000 + microseconds // 1000, ":".join(ids))

    async def sales(
        self, item_ids: Iterable[str], *, skip_unreadable: bool = False
    ) -> dict[str, Sale]:
        """The sales of the items, without those that have none.

        Raises `ContractViolation` for one that cannot be read, unless those are skipped.
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

    async def outbox_lengths(self, item_ids: Iterable[str]) -> dict[str, int]:
        """Entries in the outbox of each item."""
        wanted = list(item_ids)
        pipeline = self._redis.pipeline(transaction=False)
        for item_id in wanted:
            pipeline.xlen(ItemKeys.of(item_id).outbox)
        replies = await translated(pipeline.execute()) if wanted else []
        return dict(zip(wanted, replies, strict=True))

    async def outbox_oldest_ms(self, item_ids: Iterable[str]) -> dict[str, int]:
        """When each outbox' oldest entry was written, by Redis' clock; empty ones are left out."""
        wanted = list(item_ids)
        pipeline = self._redis.pipeline(transaction=False)
        for item_id in wanted:
            pipeline.xrange(ItemKeys.of(item_id).outbox, count=1)
        replies = await translated(pipeline.execute()) if wanted else []
        return {
            item_id: int(entries[0][0].partition("-")[0])
            for item_id, entries in zip(wanted, replies, strict=True)
            if entries
        }

    async def reservation(self, item_id: str, reservation_id: str) -> Record | None:
        """One reservation, or None if Redis has none of that id."""
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

    async def outbox_page(
        self, item_id: str, *, after: str = "-", until_ms: int, count: int
    ) -> list[OutboxEntry]:
        """At most `count` outbox entries, oldest first, written before `until_ms`.

        `after` is the last entry id of the page before, or "-".
        """
        start = "-" if after == "-" else f"({after}"
        page = self._redis.xrange(ItemKeys.of(item_id).outbox, start, f"{until_ms - 1}", count)
        entries = await translated(cast("Awaitable[list[tuple[str, dict[str, str]]]]", page))
        return [OutboxEntry.parse(entry_id, fields) for entry_id, fields in entries]

    async def take_sweep(self, item_id: str, pod_id: str, lease_ms: int) -> bool:
        """Takes or renews the lease to sweep an item's outbox; False if another pod has it.

        Two sweepers at once would cost duplicates, which are harmless, and nothing else.
        """
        key = ItemKeys.of(item_id).sweeper
        owner = await translated(self._redis.set(key, pod_id, nx=True, get=True, px=lease_ms))
        if owner == pod_id:
            await translated(self._redis.pexpire(key, lease_ms))
        return owner in (None, pod_id)

    async def load(self) -> None:
        """Loads the scripts, so that the first buyer does not wait for it."""
        await self._scripts.load(self._reserve, self._settle)

    async def eviction_policy(self) -> str:
        """The server's `maxmemory-policy`; anything but `noeviction` may drop a sale's keys."""
        info = await translated(self._redis.info("memory"))
        return str(info["maxmemory_policy"])


def _sale(item_id: str, fields: dict[str, str], outbox_length: int, parts: int) -> Sale:
    if fields.get("format") != "1":
        raise ContractViolation(f"{item_id}: format {fields.get('format')!r} is not known")
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
        raise ContractViolation(f"{item_id}: a sale that cannot be read: {error}") from error
