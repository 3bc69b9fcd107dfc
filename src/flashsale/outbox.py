"""The outboxes in Redis: reservation events that Kafka has not acknowledged."""

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from flashsale import pipelines
from flashsale.errors import ContractViolation, RedisUnavailable
from flashsale.keys import DEFAULT_ENGINE, ItemKeys
from flashsale.nodes import Nodes
from flashsale.reservations import OutboxEntry
from flashsale.scripts import Script, Scripts, leased

SETTLE_SECONDS: Final = 2.0

Entry: TypeAlias = tuple[str, str, int]
"""An entry to settle: entry id, reservation id, version of the reservation."""


class Page(NamedTuple):
    """A page of entries, oldest first.

    `unreadable` has the errors of the others by entry id: damaged ones, and those of a later
    version. Their events are only in Redis, so a caller must not take them for published. `last` is
    the id of the page's last entry, or empty if the page is the last one.
    """

    entries: list[OutboxEntry]
    unreadable: dict[str, ContractViolation]
    last: str


class Outbox:
    """An engine's outboxes. Every method raises `RedisUnavailable` if the call fails."""

    def __init__(self, redis: Redis, engine: str = DEFAULT_ENGINE) -> None:
        self._nodes = Nodes.of_client(redis)
        self._engine = engine
        self._scripts = Scripts(self._nodes)
        self._settle = Script("settle")

    async def load(self) -> None:
        """Loads the script, so that no call has to send its source."""
        await self._scripts.load(self._settle)

    @property
    def items_per_call(self) -> int:
        """The number of items that a call of `settle_all` may have."""
        return self._nodes.items_per_call

    async def settle(self, item_id: str, acknowledged: Sequence[Entry]) -> int:
        """Deletes entries of one item, as `settle_all` does."""
        [deleted] = await self.settle_all([(item_id, acknowledged)])
        if isinstance(deleted, RedisUnavailable):
            raise deleted
        return deleted

    async def settle_all(
        self, pages: Sequence[tuple[str, Sequence[Entry]]]
    ) -> list[int | RedisUnavailable]:
        """Deletes entries that Kafka has acknowledged. Returns the number deleted of each item.

        The pages are of at most `items_per_call` different items. An entry of another
        event stays. The units of a cancelled or expired reservation are for sale again. An item
        that Redis refuses has the error as its result, unless it refuses all.
        """
        results = await self._scripts.call_of_items(
            self._settle,
            [key for item_id, _ in pages for key in self._keys(item_id).sold],
            ["".join(f"{entry[0]},{entry[1]},{entry[2]}\n" for entry in page) for _, page in pages],
            SETTLE_SECONDS,
        )
        return [each if isinstance(each, RedisUnavailable) else int(each) for each in results]

    async def page(self, item_id: str, *, after: str = "-", until_ms: int, count: int) -> Page:
        """Returns at most `count` entries written before `until_ms`.

        `after` is the last entry id of the previous page, or "-" for the first page.
        """
        start = "-" if after == "-" else f"({after}"
        key, end = self._keys(item_id).outbox, f"{until_ms - 1}"
        found = await self._nodes.call(
            key,
            lambda redis: cast(
                "Awaitable[list[tuple[str, dict[str, str]]]]", redis.xrange(key, start, end, count)
            ),
        )
        page = Page([], {}, found[-1][0] if len(found) == count else "")
        for entry_id, fields in found:
            try:
                page.entries.append(OutboxEntry.parse(item_id, entry_id, fields))
            except ContractViolation as error:
                page.unreadable[entry_id] = error
        return page

    async def lengths(self, item_ids: Iterable[str], *, partial: bool = False) -> dict[str, int]:
        """Returns the number of entries per item.

        With `partial`, items whose server is away are left out, unless all are.
        """
        found = await pipelines.each(
            self._nodes,
            item_ids,
            self._outbox,
            lambda pipeline, item_id: pipeline.xlen(self._outbox(item_id)),
            partial=partial,
        )
        return {item_id: length for item_id, (length,) in found.items()}

    async def oldest(self, since_ms: Mapping[str, int]) -> dict[str, tuple[int, bool]]:
        """Returns when each item's oldest entry was written, in ms of its server's clock.

        Also returns whether the item has entries that were written at its time of `since_ms` or
        later. Items with an empty outbox are left out, and items whose server is away, unless all
        are.
        """

        def queue(pipeline: Pipeline, item_id: str) -> None:
            pipeline.xrange(self._outbox(item_id), count=1)
            pipeline.xrange(self._outbox(item_id), f"{since_ms[item_id]}", count=1)

        found = await pipelines.each(self._nodes, since_ms, self._outbox, queue, partial=True)
        return {
            item_id: (int(oldest[0][0].partition("-")[0]), bool(later))
            for item_id, (oldest, later) in found.items()
            if oldest
        }

    async def take_lease(self, item_id: str, pod_id: str, lease_ms: int) -> bool:
        """Takes or renews the lease to sweep an item's outbox. False if another pod has it.

        The lease only saves work: two sweepers publish duplicates, which are harmless.
        """
        return await leased(self._nodes, self._keys(item_id).sweeper, pod_id, lease_ms)

    def node_of(self, item_id: str) -> str:
        """Returns the name of an item's server in a cluster, as far as it is known."""
        return self._nodes.name_of(item_id)

    def _outbox(self, item_id: str) -> str:
        return self._keys(item_id).outbox

    def _keys(self, item_id: str) -> ItemKeys:
        return ItemKeys.of(item_id, self._engine)
