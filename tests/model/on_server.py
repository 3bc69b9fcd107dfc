"""An item on a real server next to its model, and the comparison of both after each call."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
)
from redis.asyncio import Redis

from flashsale.inventory import Applied, Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Outbox
from flashsale.reservations import Record, Request
from flashsale.sale import SaleSpec
from flashsale_operator.sales.recovery import Recovery
from tests.model.scripts import OTHER_RUN, THIS_RUN, Hash, Item, Manifest

HOUR_MS = 3_600_000
OTHER_SERVER = f"{'f' * 40}:{'0' * 40}"
LEASE_MS = 600_000
PARTS = ["sale", "buyers", "reservations", "outbox"]

T = TypeVar("T")


@dataclass(slots=True)
class Connected:
    """A server, and the event loop of all calls to it."""

    runner: asyncio.Runner
    redis: Redis
    inventory: Inventory
    outbox: Outbox
    recovery: Recovery
    run_id: str
    names: Iterator[int]
    seen: Counter[str]

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)


class OnServer(RuleBasedStateMachine):
    """One item. Subclasses have the rules."""

    server: Connected

    def __init__(self) -> None:
        super().__init__()
        self.item = f"model-{next(self.server.names)}"
        self.keys = ItemKeys.of(self.item)
        self.model = Item()
        self.zero_ms = self.server.run(self.server.inventory.server()).now_ms
        self.revision = 1
        self.highest_limit = 1
        self.ids = itertools.count()
        self.used: list[Request] = []
        self.retired: list[tuple[str, str]] = []
        self.claim = 1
        self.engine_of: dict[str, str] = {}

    @invariant()
    def the_server_has_the_state_of_the_model(self) -> None:
        model = self.model
        sale, buyers, reservations, entries, *there = self.server.run(self._state())
        assert [bool(one) for one in there] == [
            part is not None for part in (model.buyers, model.reservations, model.outbox)
        ]
        assert {user: int(units) for user, units in buyers.items()} == (model.buyers or {})
        assert reservations.keys() == (model.reservations or {}).keys()
        outbox = {entry: fields["id"] for entry, fields in entries}
        assert outbox == (model.outbox or {})
        if model.sale is None:
            assert not sale
            return
        last_ms = int(sale.pop("last_now_ms"))
        until_ms = sale.pop("rebuild_until_ms", None)
        assert (until_ms is None) == (model.sale.leased is None)
        if until_ms is not None:
            assert (int(until_ms) >= self.zero_ms + LEASE_MS) == model.sale.leased
        assert sale == self._fields(model.sale)
        if model.sale.last_hour:
            assert last_ms == self._ms(model.sale.last_hour)
        else:
            assert self.zero_ms <= last_ms < self.zero_ms + HOUR_MS
        if model.whole:
            self._check_invariants(sale, buyers, reservations, entries)

    def _check_invariants(
        self,
        sale: dict[str, str],
        buyers: dict[str, str],
        reservations: dict[str, str],
        entries: list[tuple[str, dict[str, str]]],
    ) -> None:
        """Checks that the server's state is consistent, without the model."""
        accepted, released = int(sale["accepted"]), int(sale["released"])
        assert accepted - released <= int(sale["allocated"])
        records = {identity: Record.parse(text) for identity, text in reservations.items()}
        assert sum(record.quantity for record in records.values()) == accepted
        held: Counter[str] = Counter()
        for record in records.values():
            held[record.user_id] += record.quantity
        assert held == {user: int(units) for user, units in buyers.items()}
        assert max(held.values(), default=0) <= self.highest_limit
        unsettled = {fields["id"] for _, fields in entries}
        assert unsettled == records.keys() - self.model.settled
        for _, fields in entries:
            assert fields["record"] == reservations[fields["id"]]
            assert fields["engine"] == self.engine_of[fields["id"]]
            _, allocated, capacity, _ = fields["sale"].split(",")
            assert int(capacity) >= int(allocated)

    def _lose(self, part: str) -> None:
        setattr(self.model, part, None)
        self.server.run(_awaited(self.server.redis.delete(getattr(self.keys, part))))

    def _apply(self, manifest: Manifest) -> None:
        expected = self.model.apply(manifest)
        call = self.server.inventory.apply(
            self._spec(manifest),
            manifest.revision,
            engine_id=manifest.engine,
            seed_until_ms=2**53 if manifest.may_seed else None,
            replaces=manifest.replaces,
        )
        assert self.server.run(call) is expected
        self.server.seen[f"apply: {expected}"] += 1
        self.revision = max(self.revision, manifest.revision)
        if expected in {Applied.SEEDED, Applied.CHANGED}:
            self.highest_limit = max(self.highest_limit, manifest.max_per_user)

    def _spec(self, manifest: Manifest) -> SaleSpec:
        return SaleSpec(
            manifest.sale_id,
            self.item,
            manifest.stock,
            manifest.max_per_user,
            starts_ms=self._ms(manifest.starts_hour),
            ends_ms=self._ms(manifest.ends_hour),
            paused=manifest.paused,
        )

    def _revision(self, above: int) -> int:
        return max(1, self.revision + above)

    def _request(self, user: int, quantity: int, chance: int) -> Request:
        """Returns a new request, or an earlier one with the same or another quantity."""
        if self.used and chance < 30:
            known = self.used[chance % len(self.used)]
            return known if chance < 22 else known._replace(quantity=known.quantity % 3 + 1)
        key = f"key-{chance}" if chance < 60 else ""
        request = Request(f"{self.item}-r{next(self.ids)}", f"user-{user}", quantity, key)
        self.used.append(request)
        return request

    def _ms(self, hour: int | None) -> int | None:
        return None if hour is None else self.zero_ms + hour * HOUR_MS

    def _fields(self, sale: Hash) -> dict[str, str]:
        starts_ms, ends_ms = self._ms(sale.manifest.starts_hour), self._ms(sale.manifest.ends_hour)
        return {
            "format": "1",
            "sale_id": sale.manifest.sale_id,
            "run_id": {THIS_RUN: self.server.run_id, OTHER_RUN: OTHER_SERVER}.get(
                sale.run, sale.run
            ),
            "revision": str(sale.manifest.revision),
            "state": sale.state,
            "allocated": str(sale.allocated),
            "accepted": str(sale.accepted),
            "released": str(sale.released),
            "max_per_user": str(sale.manifest.max_per_user),
            "starts_ms": "" if starts_ms is None else str(starts_ms),
            "ends_ms": "" if ends_ms is None else str(ends_ms),
            "display_name": "",
            "engine": sale.manifest.engine,
        }

    def _set(self, field: str, value: str) -> None:
        self.server.run(_awaited(self.server.redis.hset(self.keys.sale, field, value)))

    async def _state(self) -> list[Any]:
        pipeline = self.server.redis.pipeline(transaction=False)
        for key in (self.keys.sale, self.keys.buyers, self.keys.reservations):
            pipeline.hgetall(key)
        pipeline.xrange(self.keys.outbox)
        for key in (self.keys.buyers, self.keys.reservations, self.keys.outbox):
            pipeline.exists(key)
        state: list[Any] = await pipeline.execute()
        return state

    def teardown(self) -> None:
        names = (self.keys.sale, self.keys.buyers, self.keys.reservations, self.keys.outbox)
        self.server.run(_awaited(self.server.redis.delete(*names)))


async def _awaited(call: Any) -> Any:  # noqa: ANN401 - redis-py's types are sync or async
    return await call
