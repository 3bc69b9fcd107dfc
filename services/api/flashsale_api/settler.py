"""Deletes the outbox entries of events that Kafka has acknowledged."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Final

from flashsale.errors import RedisUnavailable
from flashsale.outbox import Entry, Outbox

log = logging.getLogger(__name__)

BATCH: Final = 256
"""Entries of one call."""
RETRY_SECONDS: Final = 2.0


class Settler:
    """Settles entries, with a task for each node of a cluster, so that none waits for another."""

    def __init__(
        self, outbox: Outbox, settled: Callable[[Iterable[tuple[str, str]]], None]
    ) -> None:
        """`settled` takes the pairs (item id, entry id) of a settled page."""
        self._outbox = outbox
        self._settled = settled
        self._waiting: dict[str, list[Entry]] = {}
        self._aside: dict[str, list[Entry]] = {}
        """The entries of items that failed. They must not delay other items."""
        self._failing: set[str] = set()
        """The items whose last call failed."""
        self._work = asyncio.Event()

    def add(self, item_id: str, entry: Entry) -> None:
        """Takes an entry to settle. Never waits."""
        aside = self._aside.get(item_id)
        if aside is None:
            self._waiting.setdefault(item_id, []).append(entry)
            self._work.set()
        else:
            aside.append(entry)

    async def run(self) -> None:
        """Settles until it is cancelled."""
        running: set[str] = set()
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._work.wait()
                self._work.clear()
                for node in set(map(self._outbox.node_of, self._waiting)) - running:
                    running.add(node)
                    tasks.create_task(self._settle(node, running))

    async def _settle(self, node: str, running: set[str]) -> None:
        """Settles the items of a node until none is left, and takes the node out of `running`."""
        while pages := self._next_pages(node):
            try:
                results = await self._outbox.settle_all(pages)
            except RedisUnavailable as error:
                results = [error] * len(pages)
            for (item_id, page), result in zip(pages, results, strict=True):
                if isinstance(result, RedisUnavailable):
                    self._set_aside(item_id, page, result)
                else:
                    self._failing.discard(item_id)
                    self._settled((item_id, entry_id) for entry_id, _, _ in page)
        running.discard(node)
        if self._waiting:  # an item may be on another node now
            self._work.set()

    def _set_aside(self, item_id: str, page: list[Entry], error: RedisUnavailable) -> None:
        if not self._failing:
            log.warning("cannot settle outbox entries yet: %s", error)
        self._failing.add(item_id)
        if item_id not in self._aside:
            self._aside[item_id] = []
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._try_again, item_id)
        self._aside[item_id] += page + self._waiting.pop(item_id, [])

    def _try_again(self, item_id: str) -> None:
        self._waiting[item_id] = self._aside.pop(item_id)
        self._work.set()

    def _next_pages(self, node: str) -> list[tuple[str, list[Entry]]]:
        """Takes at most `BATCH` entries of the items of a node.

        The items take turns. A waiting item may have a full outbox and sell nothing.
        """
        items = (each for each in self._waiting if self._outbox.node_of(each) == node)
        pages: list[tuple[str, list[Entry]]] = []
        room = BATCH
        for item_id in list(itertools.islice(items, self._outbox.items_per_call)):
            waiting = self._waiting.pop(item_id)
            page, left = waiting[:room], waiting[room:]
            pages.append((item_id, page))
            if left:
                self._waiting[item_id] = left
            room -= len(page)
            if not room:
                break
        return pages
