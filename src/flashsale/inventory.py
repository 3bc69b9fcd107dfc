"""Sales and reservations in Redis: typed calls of the Lua scripts, and reads.

Only this module and `outbox.py` use an item's keys, and `index.py` looks whether they exist. The
operator's rebuild is the one exception.
"""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from flashsale import clocks, pipelines, redis_client
from flashsale.clocks import ServerTime
from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.index import Index
from flashsale.keys import DEFAULT_ENGINE, ItemKeys
from flashsale.nodes import Nodes
from flashsale.reservations import (
    BatchReply,
    Expired,
    OrderCall,
    Outcome,
    Record,
    Request,
    Snapshot,
    Transition,
    TransitionReply,
    Verb,
    parse_expired,
    parse_reply,
    parse_transitions,
)
from flashsale.sale import Predecessor, Sale, SaleSpec, parse_sale
from flashsale.scripts import Script, Scripts, leased

ItemReply: TypeAlias = BatchReply | Outcome | RedisUnavailable | ContractViolation
"""The reply of `reserve.lua` for one item, or the error of its part."""

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


class Survey(NamedTuple):
    """The sales and the servers of some items, and a sentence about those that cannot be read."""

    sales: dict[str, Sale]
    servers: dict[str, ServerTime]
    unread: str


class Inventory:
    """An engine's sales in Redis. Every method raises `RedisUnavailable` if the call fails."""

    def __init__(
        self, redis: Redis, engine: str = DEFAULT_ENGINE, *, outbox_limit: int = OUTBOX_LIMIT
    ) -> None:
        self.redis = redis
        self.engine = engine
        self.nodes = Nodes.of_client(redis)
        self.index = Index(self.nodes, engine)
        self._scripts = Scripts(self.nodes)
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

    async def load(self) -> None:
        """Loads the scripts of buyers and orders, so that the first call does not wait for them."""
        await self._scripts.load(self._reserve, self._confirm, self._cancel, self._expire)

    @property
    def items_per_call(self) -> int:
        """The number of items that a call of `reserve_all` may have."""
        return self.nodes.items_per_call

    async def reserve(
        self,
        item_id: str,
        requests: Sequence[Request],
        *,
        timeout_seconds: float,
        engine_id: str = "",
    ) -> BatchReply | Outcome:
        """Decides a batch of requests for one item, as `reserve_all` does."""
        [reply] = await self.reserve_all(
            [(item_id, requests)], timeout_seconds=timeout_seconds, engine_id=engine_id
        )
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def reserve_all(
        self,
        batches: Sequence[tuple[str, Sequence[Request]]],
        *,
        timeout_seconds: float,
        engine_id: str = "",
    ) -> list[ItemReply]:
        """Decides a batch of requests for each item, in one call. Returns the replies in order.

        The batches have at most `BATCH_LIMIT` requests together, for at most `items_per_call`
        different items. A single `Outcome` (unknown, unsupported, fenced, other_engine) applies to
        every request of its item. An item whose reply cannot be read, or that Redis refuses, has
        the error as its reply. If Redis refuses all items, the call fails. After a failure the
        caller can send the same requests again, because their ids make the second call a replay.
        `engine_id` is the pod's engine, or empty if the pod does not know it.
        """
        item_keys: list[str] = []
        arguments: list[str | int] = [self._outbox_limit, engine_id]
        for item_id, requests in batches:
            item_keys += self._keys(item_id).sold
            lines = "".join(f"{r[0]},{r[1]},{r[2]},{r[3]},{r[4]}\n" for r in requests)
            arguments += (len(requests), lines)
        replies = await self._scripts.call_of_items(
            self._reserve, item_keys, arguments, timeout_seconds
        )
        return [_batch_reply(each) for each in replies]

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
        await self.index.add([spec.item_id])
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

    async def change(
        self,
        verb: Verb,
        item_id: str,
        calls: Sequence[OrderCall],
        *,
        timeout_seconds: float,
        engine_id: str = "",
    ) -> TransitionReply | Transition:
        """Confirms or cancels at most `BATCH_LIMIT` reservations of an item.

        A single `Transition` (unknown, unsupported, fenced, other_engine) applies to every call.
        After a failure the caller can send the same calls again: the second one is a replay.
        """
        script = self._confirm if verb == "confirm" else self._cancel
        lines = "".join(f"{','.join(call)}\n" for call in calls)
        reply = await self._scripts.call_quickly(
            script, self._keys(item_id).sold, (lines, len(calls), engine_id), timeout_seconds
        )
        return parse_transitions(str(reply))

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
        return await leased(self.nodes, self._keys(item_id).expiry, pod_id, lease_ms)

    async def holds(self, now_ms: Mapping[str, int]) -> dict[str, Holds]:
        """Returns the open holds of each item, at a time of its server's clock.

        Items whose server is away are left out, unless all are.
        """

        def count(pipeline: Pipeline, item_id: str) -> None:
            pipeline.zcard(self._keys(item_id).holds)

        def queue(pipeline: Pipeline, item_id: str) -> None:
            key = self._keys(item_id).holds
            pipeline.zcard(key)
            pipeline.zcount(key, "-inf", now_ms[item_id])
            pipeline.zrange(key, 0, 0, withscores=True)

        # Most sales have no hold at most times, and pods ask once per second.
        counts = await pipelines.each(self.nodes, now_ms, self._sale_key, count, partial=True)
        holding = [item_id for item_id, (total,) in counts.items() if total]
        found = await pipelines.each(self.nodes, holding, self._sale_key, queue, partial=True)
        holds = dict.fromkeys(counts, Holds(0, 0, 0))
        for item_id in holding:
            if item_id in found:
                total, overdue, first = found[item_id]
                holds[item_id] = Holds(total, overdue, int(first[0][1]) if first else 0)
            else:
                del holds[item_id]
        return holds

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
            await self.index.remove(item_id)
        return freed

    async def without_keys(self, item_ids: Iterable[str]) -> list[str]:
        """Returns the items that have no keys. Items whose server is away are left out."""

        def queue(pipeline: Pipeline, item_id: str) -> None:
            pipeline.exists(*self._keys(item_id).sold)

        found = await pipelines.each(self.nodes, item_ids, self._sale_key, queue, partial=True)
        return [item_id for item_id, (existing,) in found.items() if not existing]

    async def server(self, item_id: str = "") -> ServerTime:
        """Returns the clock and run of an item's server. A sale of another run is fenced.

        Without an item, the server is any one of the cluster.
        """
        [found] = (await self.servers([item_id])).values()
        return found

    async def servers(self, item_ids: Iterable[str]) -> dict[str, ServerTime]:
        """Returns the clock and run of each item's server.

        Items whose server is away, or has become a replica, are left out, unless all are.
        """
        wanted = list(item_ids)
        groups = await self.nodes.split(wanted, self._sale_key)
        if wanted and not groups:
            raise RedisUnavailable("Redis is unavailable: no node has the item's slot")
        found = await clocks.read(self.nodes, groups)
        return {
            item_id: found[node.name]
            for node, items in groups.items()
            if node.name in found
            for item_id in items
        }

    async def clocks(self) -> dict[str, ServerTime]:
        """Returns the clock and run of each server by its name, as `node_of` returns it.

        Servers that are away, or have become replicas, are left out, unless all are.
        """
        return await clocks.read(self.nodes, await self.nodes.all())

    async def sales(
        self, item_ids: Iterable[str], *, skip_unreadable: bool = False
    ) -> dict[str, Sale]:
        """Returns the sale of each item that has one.

        Raises `ContractViolation` if a sale cannot be read, and `RedisUnavailable` if the server of
        an item is away. With `skip_unreadable` such items are left out, unless every server is
        away.
        """
        found = {}
        for item_id, reply in (await self._read(item_ids, partial=skip_unreadable)).items():
            try:
                if sale := _sale_of(item_id, reply):
                    found[item_id] = sale
            except ContractViolation:
                if not skip_unreadable:
                    raise
        return found

    async def survey(self, item_ids: Iterable[str]) -> Survey:
        """Returns the sales and servers of items that can be read now.

        Raises `RedisUnavailable` if no server answers.
        """
        wanted = set(item_ids)
        replies = await self._read(wanted, partial=True)
        # Last, because the sales of a server that has restarted since they were read are fenced.
        servers = await self.servers(replies)
        unread = []
        if away := sorted(wanted.difference(servers)):
            unread = [f"no node of Redis answers for {', '.join(away)}: see flashsalectl doctor"]
        sales = {}
        for item_id in sorted(servers):
            try:
                if sale := _sale_of(item_id, replies[item_id]):
                    sales[item_id] = sale
            except ContractViolation as error:
                unread.append(str(error))
                del servers[item_id]
        return Survey(sales, servers, "; ".join(unread))

    async def observe(self, item_id: str) -> tuple[Sale | None, ServerTime]:
        """Returns the sale and the server of an item.

        Raises `ContractViolation` if the sale cannot be read, and `RedisUnavailable`.
        """
        replies = await self._read([item_id], partial=False)
        server = await self.server(item_id)  # last, as in `survey`
        return _sale_of(item_id, replies[item_id]), server

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
            parse_sale(item_id, found, int(outbox_length), int(parts), int(holds))
            if found
            else None,
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
        return redis_client.address(self.redis)

    def node_of(self, item_id: str) -> str:
        """Returns the name of an item's server in a cluster, as far as it is known."""
        return self.nodes.name_of(item_id)

    async def _read(self, item_ids: Iterable[str], *, partial: bool) -> dict[str, list[Any]]:
        def queue(pipeline: Pipeline, item_id: str) -> None:
            item = self._keys(item_id)
            pipeline.hgetall(item.sale)
            pipeline.xlen(item.outbox)
            pipeline.exists(item.buyers, item.reservations, item.outbox)
            pipeline.zcard(item.holds)

        return await pipelines.each(self.nodes, item_ids, self._sale_key, queue, partial=partial)

    def _keys(self, item_id: str) -> ItemKeys:
        return ItemKeys.of(item_id, self.engine)

    def _sale_key(self, item_id: str) -> str:
        return self._keys(item_id).sale


_texts = msgspec.json.Decoder(list[str]).decode

_UNREADABLE: Final = {
    "unknown": "Redis has no sale of this item",
    "unsupported": "this version cannot read the sale",
    "fenced": "the sale is fenced: rebuild it first",
}


def _batch_reply(reply: str | int | RedisUnavailable) -> ItemReply:
    if isinstance(reply, RedisUnavailable):
        return reply
    try:
        return parse_reply(str(reply))
    except ContractViolation as error:
        return error


def _sale_of(item_id: str, reply: Sequence[Any]) -> Sale | None:
    fields, *counts = reply
    return parse_sale(item_id, fields, *counts) if fields else None
