"""Random sequences of calls compare the Lua scripts on real servers with their model.

`FLASHSALE_MODEL_EXAMPLES=5000` runs more sequences, and `FLASHSALE_MODEL_RANDOM=1` other ones each
time. Needs the Redis servers of the stack.
"""

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from dev.stack.packages import redis_binaries
from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.errors import ContractViolation
from flashsale.inventory import Applied, Closed, Freed, Inventory
from flashsale.keys import ItemKeys
from flashsale.outbox import Outbox
from flashsale.reservations import BatchReply, Outcome, Record, Request
from flashsale.sale import Predecessor, SaleSpec
from flashsale_operator.sales.recovery import Fenced, Recovery, Step, Trusted
from tests.model.scripts import OTHER_RUN, THIS_RUN, Hash, Item, Manifest

EXAMPLES = int(os.environ.get("FLASHSALE_MODEL_EXAMPLES", "200"))
STEPS = 40
HOUR_MS = 3_600_000
SALES = ("default/first", "default/second")
OTHER_SERVER = f"{'f' * 40}:{'0' * 40}"
OWN_ENGINE = "own"
LEASE_MS = 600_000
NO_ENTRY = "1-1"
PARTS = ["sale", "buyers", "reservations", "outbox"]

T = TypeVar("T")


class Fault(NamedTuple):
    """A mistake in a script: the correct text and the wrong one."""

    script: str
    right: str
    wrong: str

    def into(self, *clients: Inventory | Outbox | Recovery) -> None:
        name = f"_{self.script}"
        [script] = [getattr(client, name) for client in clients if hasattr(client, name)]
        assert script.source.count(self.right) == 1
        script.source = script.source.replace(self.right, self.wrong)
        script.sha = sha1(script.source.encode(), usedforsecurity=False).hexdigest()


FAULTS = [
    Fault("reserve", "+ quantity > sale.max_per_user", "+ 1 > sale.max_per_user"),
    Fault("reserve", "quantity > available then", "quantity > available + 1 then"),
    Fault("reserve", "local record = records[id]\n  if", "local record = known[n]\n  if"),
    Fault("reserve", "held[user] = held[user] + quantity", "held[user] = quantity"),
    Fault("reserve", "if sale.fenced then", "if sale.torn then"),
    Fault("reserve", "outbox_length >= outbox_limit", "outbox_length > outbox_limit"),
    Fault("reserve", "sale.now < sale.starts_ms", "clock_ms() < sale.starts_ms"),
    Fault("reserve", "'HSET', KEYS[1], 'state', 'ended',", "'HSET', KEYS[1],"),
    Fault("apply", "revision < sale.revision", "revision <= sale.revision"),
    Fault("apply", "math.max(requested, sale.accepted - sale.released)", "requested"),
    Fault("apply", "if sale.fenced then", "if sale.torn then"),
    Fault("apply", "and redis.call('XLEN', outbox) == 0", ""),
    Fault("apply", "and sale.accepted == tonumber(recorded)", ""),
    Fault("apply", "or redis.call('EXISTS', KEYS[2], KEYS[3], KEYS[4]) > 0", ""),
    Fault("trust", "math.max(sale.allocated, accepted - released)", "sale.allocated"),
    Fault("settle", "and entry[2][2] == reservation_id", ""),
    Fault("close", "if revision < sale.revision then", "if revision < 0 then"),
    Fault("close", "and 'ended' or 'closed'", "and 'closed' or 'closed'"),
    Fault("free", "redis.call('XLEN', KEYS[4]) > 0 or", ""),
    Fault("free", "or sale.accepted ~= recorded", ""),
    Fault("free", "or sale.revision ~= revision", ""),
    Fault("reserve", "redis.pcall('HSET', key, 'run_id', 'fenced')", ""),
    Fault("reserve", "'%x+:%x+$'", "'%x+$'"),
    Fault("apply", "redis.pcall('HSET', key, 'run_id', 'fenced')", ""),
    Fault("reserve", "if foreign(sale, ARGV[4]) then", "if false then"),
    Fault("apply", "if foreign(sale, ARGV[12]) then", "if false then"),
    Fault("close", "if foreign(sale, ARGV[3]) then", "if false then"),
    Fault("free", "if foreign(sale, ARGV[4]) then", "if false then"),
    Fault("fence", "if sale and foreign(sale, ARGV[14]) then", "if false then"),
    Fault("reserve", "traceparents[n], 'engine', sale.engine", "traceparents[n], 'engine', ''"),
    Fault("apply", "and ARGV[12] == sale.engine", ""),
    Fault("fence", "and sale.accepted >= tonumber(ARGV[13])", ""),
    Fault("fence", "if ARGV[12] ~= 'fence' and", "if ARGV[12] == 'begin' and"),
    Fault("fence", "sale.run_id ~= mine", "false"),
    Fault("fence", "if redis.call('XLEN', KEYS[4]) > 0 then", "if false then"),
    Fault("fence", "if sale.revision > tonumber(ARGV[2]) then", "if false then"),
    Fault("fence", "and other > tonumber(ARGV[2])", ""),
    Fault("fence", "and until_ms > clock_ms()", ""),
    Fault("fence", "redis.call('DEL', KEYS[2], KEYS[3])\n  write()", "write()"),
    Fault("page", "if sale.fenced then", "if sale.torn then"),
]
chances = st.sampled_from(range(100))
stocks = st.sampled_from([8, 12, 5, 3, 1, 0])
limits = st.sampled_from([2, 3, 4, 1])
pauses = st.sampled_from([False] * 5 + [True])
sales = st.sampled_from(SALES)
engines = st.sampled_from([OWN_ENGINE] * 20 + ["other", ""])
"""The caller's engine. The previous version has none."""
revisions = st.sampled_from([0, 0, 1, 1, 1, 2, -1])
"""Difference between a call's revision and the highest used revision."""


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


class Scripts(RuleBasedStateMachine):
    """Tests one item. Each rule makes the same call on the server and on the model."""

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

    # The calls.

    @initialize(stock=stocks, limit=limits, paused=pauses, engine=engines)
    def seed(self, stock: int, limit: int, paused: bool, engine: str) -> None:
        manifest = Manifest(SALES[0], 1, stock, limit, paused=paused, may_seed=True, engine=engine)
        self._apply(manifest)

    @rule(
        sale_id=st.sampled_from([*SALES[:1] * 4, SALES[1]]),
        above=revisions,
        stock=stocks,
        limit=limits,
        window=st.tuples(
            st.sampled_from([None, None, None, -1, 1]),
            st.sampled_from([None, None, None, -1, 2, 4]),
        ),
        paused=pauses,
        may_seed=st.booleans(),
        replaces=st.sampled_from([None, 0, 0, 1]),
        engine=engines,
    )
    def apply(
        self,
        sale_id: str,
        above: int,
        stock: int,
        limit: int,
        window: tuple[int | None, int | None],
        paused: bool,
        may_seed: bool,
        replaces: int | None,
        engine: str,
    ) -> None:
        held = self.model.sale
        accepted = 0 if held is None else held.accepted
        other = SALES[1 - SALES.index(sale_id)]
        self._apply(
            Manifest(
                sale_id,
                self._revision(above),
                stock,
                limit,
                *window,
                paused=paused,
                may_seed=may_seed,
                replaces=None if replaces is None else Predecessor(other, accepted + replaces),
                engine=engine,
            )
        )

    @rule(stock=stocks, limit=limits, paused=pauses, again=chances, engine=engines)
    @precondition(lambda self: self.model.sale is not None)
    def edit(self, stock: int, limit: int, paused: bool, again: int, engine: str) -> None:
        """Applies the same sale again, mostly with a new revision and other values."""
        sale = cast("Hash", self.model.sale)
        manifest = replace(sale.manifest, may_seed=False, replaces=None, engine=engine)
        if again > 25:
            manifest = replace(
                manifest,
                revision=self._revision(1),
                stock=stock,
                max_per_user=limit,
                paused=paused,
            )
        self._apply(manifest)

    @rule(
        wanted=st.lists(
            st.tuples(st.integers(0, 5), st.sampled_from([1, 1, 2, 3]), chances),
            min_size=1,
            max_size=6,
        ),
        engine=engines,
    )
    def reserve(self, wanted: list[tuple[int, int, int]], engine: str = OWN_ENGINE) -> None:
        batch = [self._request(*one) for one in wanted]
        before = self.model.sale and replace(self.model.sale)
        fenced = self.model.fenced
        expected = self.model.reserve(batch, engine)
        call = self.server.inventory.reserve(self.item, batch, timeout_seconds=10, engine_id=engine)
        reply = self.server.run(call)
        if not isinstance(reply, BatchReply):
            assert reply is expected
            self.server.seen[reply] += 1
            return
        assert [answer.outcome for answer in reply.answers] == expected
        sale = cast("Hash", self.model.sale)
        for request, (outcome, detail) in zip(batch, reply.answers, strict=True):
            self.server.seen[outcome] += 1
            if outcome is Outcome.ACCEPTED:
                assert before is not None
                assert before.state == "open"
                assert not fenced
                assert not before.finished
                self.model.outbox = (self.model.outbox or {}) | {detail: request.reservation_id}
                self.engine_of[request.reservation_id] = sale.manifest.engine
            elif outcome is Outcome.REPLAYED:
                known = (self.model.reservations or {})[request.reservation_id]
                record = Record.parse(detail)
                assert (record.state, record.version) == ("accepted", 1)
                assert record[2] == known.quantity
                assert record[4:] == (known.user_id, known.request_key)
        manifest = sale.manifest
        capacity = sale.allocated + sale.released
        numbers = (manifest.sale_id, sale.allocated, capacity, manifest.revision)
        assert reply.snapshot == (*numbers, manifest.engine)
        assert reply.available == capacity - sale.accepted
        assert reply.outbox_length == len(self.model.outbox or {})
        assert reply.starts_ms == (self._ms(manifest.starts_hour) or 0)

    @rule(first=st.integers(0, 5), size=st.integers(2, 6))
    def crowd(self, first: int, size: int) -> None:
        """Sends a batch of users who each want one unit."""
        self.reserve([((first + n) % 6, 1, 99) for n in range(size)])

    @rule(picks=st.lists(st.tuples(st.integers(0, 9), chances), min_size=1, max_size=5))
    def settle(self, picks: list[tuple[int, int]]) -> None:
        """Settles entries, some with the id of another reservation and some that do not exist."""
        outbox = list((self.model.outbox or {}).items())
        pairs = []
        for pick, chance in picks:
            entry, identity = outbox[pick % len(outbox)] if outbox else (NO_ENTRY, "no-id")
            if chance < 20:
                identity = outbox[(pick + 1) % len(outbox)][1] if outbox else "no-id"
            elif chance < 30:
                entry = NO_ENTRY
            elif chance < 40 and self.retired:
                entry, identity = self.retired[pick % len(self.retired)]
            pairs.append((entry, identity))
        expected = self.model.settle(pairs)
        assert self.server.run(self.server.outbox.settle(self.item, pairs)) == expected
        self.retired += pairs
        self.server.seen["settled"] += expected

    @rule()
    def drain(self) -> None:
        pairs = list((self.model.outbox or {}).items())
        expected = self.model.settle(pairs)
        if pairs:
            assert self.server.run(self.server.outbox.settle(self.item, pairs)) == expected

    @rule(sale_id=st.sampled_from([SALES[0], *SALES]), above=revisions, chance=chances,
          engine=engines)  # fmt: skip
    def close(self, sale_id: str, above: int, chance: int, engine: str) -> None:
        if chance > 50:
            return
        revision = self._revision(above)
        expected = self.model.close(sale_id, revision, engine)
        call = self.server.inventory.close(self.item, sale_id, revision, engine)
        assert self.server.run(call) is expected
        self.server.seen[f"close: {expected}"] += 1

    @rule(stock=stocks, limit=limits, chance=chances)
    @precondition(lambda self: self.model.sale is not None)
    def succeed(self, stock: int, limit: int, chance: int) -> None:
        """Closes the sale, and applies another one in its place, drained or not."""
        if chance > 15:
            return
        sale = cast("Hash", self.model.sale)
        former, revision = sale.manifest.sale_id, self._revision(1)
        expected = self.model.close(former, revision, OWN_ENGINE)
        call = self.server.inventory.close(self.item, former, revision, OWN_ENGINE)
        assert self.server.run(call) is expected
        self._apply(
            Manifest(
                SALES[1 - SALES.index(former)],
                self._revision(1),
                stock,
                limit,
                may_seed=True,
                replaces=Predecessor(former, sale.accepted),
                engine=OWN_ENGINE,
            )
        )

    @rule(sale_id=st.sampled_from([SALES[0], *SALES]), above=st.sampled_from([0, 0, 0, -1]),
          more=st.sampled_from([0, 0, 0, 1]), engine=engines)  # fmt: skip
    def free(self, sale_id: str, above: int, more: int, engine: str) -> None:
        sale = self.model.sale
        revision = above + (sale.manifest.revision if sale else self.revision)
        recorded = more + (sale.accepted if sale else 0)
        expected = self.model.free(sale_id, revision, recorded, engine)
        call = self.server.inventory.free(self.item, sale_id, revision, recorded, engine)
        assert self.server.run(call) is expected
        self.server.seen[f"free: {expected}"] += 1

    @rule(count=st.sampled_from([1, 500]))
    def page(self, count: int) -> None:
        """Reads all reservations, as a republishing does."""
        expected = self.model.page()
        try:
            found = self.server.run(self._pages(count))
        except ContractViolation:
            assert expected in {Outcome.UNKNOWN, Outcome.FENCED}
        else:
            assert found == expected

    async def _pages(self, count: int) -> set[str]:
        sale, found = cast("Hash", self.model.sale), set()
        pages = self.server.inventory.reservation_pages(self.item, count)
        async for snapshot, page in pages:
            assert snapshot.revision == sale.manifest.revision
            assert snapshot.engine == sale.manifest.engine
            assert snapshot.capacity == sale.allocated + sale.released
            found |= {reservation_id for reservation_id, _ in page}
        return found

    # Faults and rebuilds.

    @rule(chance=chances)
    @precondition(lambda self: self.model.sale is not None and self.model.sale.run == THIS_RUN)
    def restart(self, chance: int) -> None:
        """Makes the hash look as if it was written under another run of the server."""
        if chance > 40:
            return
        cast("Hash", self.model.sale).run = OTHER_RUN
        self._set("run_id", OTHER_SERVER)

    @rule(
        sale_id=st.sampled_from([*SALES[:1] * 4, SALES[1]]),
        calls=st.lists(
            st.tuples(
                st.sampled_from(["fence", "wait", "begin", "begin"]),
                st.sampled_from([1, 0, -1]),
                st.sampled_from([0, 1]),
                st.booleans(),
                chances,
            ),
            min_size=1,
            max_size=4,
        ),
        engine=engines,
        chance=chances,
    )
    def fence(
        self,
        sale_id: str,
        calls: list[tuple[Step, int, int, bool, int]],
        engine: str,
        chance: int,
    ) -> None:
        """Makes a few calls of rebuilds, which may be interrupted."""
        if chance < 30 or self.model.fenced or self.model.sale is None:
            first, *others = calls
            if chance % 4:  # otherwise the mark may be gone, or another rebuild's
                first = ("fence", *first[1:])
            for call in (first, *others):
                self._fence(sale_id, engine, *call)

    def _fence(
        self, sale_id: str, engine: str, step: Step, above: int, more: int, leased: bool, again: int
    ) -> None:
        sale = self.model.sale
        accepted = 0 if sale is None else sale.accepted
        other = Predecessor(SALES[1 - SALES.index(sale_id)], accepted)
        if sale is None or sale.manifest.sale_id != sale_id:
            manifest = Manifest(sale_id, 1, 5, replaces=other, engine=engine)
        else:
            manifest = replace(sale.manifest, replaces=other, engine=engine)
        if step == "fence" or again < 10:
            self.claim = self._revision(above)
        self.revision = max(self.revision, self.claim)
        self.highest_limit = max(self.highest_limit, manifest.max_per_user)
        recorded = accepted + more
        closed = sale is not None and sale.state == "closed"
        expected = self.model.fence(
            manifest, self.claim, step, recorded, closed=closed, leased=leased
        )
        call = self.server.recovery.fence(
            self._spec(manifest),
            self.claim,
            step=step,
            recorded=recorded,
            engine_id=engine,
            closed=closed,
            replaces=manifest.replaces,
            lease_ms=LEASE_MS if leased else 0,
        )
        assert self.server.run(call) is expected
        self.server.seen[f"fence: {expected}"] += 1

    @rule()
    @precondition(lambda self: self.model.fenced and not self.model.outbox)
    def rebuild(self) -> None:
        """Rebuilds from a ledger that has recorded everything and whose row matches the hash."""
        sale = cast("Hash", self.model.sale)
        claim = self.revision = max(self.revision, sale.manifest.revision) + 1
        closed = sale.state == "closed"
        self.model.rebuild(claim)
        self.server.run(self._rebuild(sale.manifest, claim, closed=closed))
        self.server.seen["rebuilt"] += 1

    async def _rebuild(self, manifest: Manifest, claim: int, *, closed: bool) -> None:
        recovery, spec = self.server.recovery, self._spec(manifest)
        for step, expected in _STEPS:
            answer = await recovery.fence(
                spec, claim, step=step, engine_id=manifest.engine, closed=closed
            )
            assert answer is expected
        held, taken = self.model.held(), self.model.taken
        records = [
            (identity, Record("accepted", 1, r.quantity, self.zero_ms, r.user_id, r.request_key))
            for identity, r in taken.items()
        ]
        if taken:
            for page in ({"buyers": held}, {"records": records}):
                restored = await recovery.restore(self.item, claim, **page)
                assert restored is Trusted.RESTORED
        ended = await recovery.trust(
            self.item,
            claim,
            self.server.run_id,
            accepted=sum(held.values()),
            released=0,
            reservations=len(taken),
            buyers=len(held),
        )
        assert ended is Trusted.TRUSTED

    @rule(hour=st.sampled_from([1, 2, 3]))
    @precondition(lambda self: self.model.sale is not None and self.model.sale.last_hour < 3)
    def pass_time(self, hour: int) -> None:
        """Makes the sale remember a later time, as if the clock was set back since."""
        sale = cast("Hash", self.model.sale)
        sale.last_hour = max(sale.last_hour, hour)
        self._set("last_now_ms", str(self._ms(sale.last_hour)))

    @rule(part=st.sampled_from(PARTS), chance=chances)
    def lose(self, part: str, chance: int) -> None:
        if chance < 20:  # rare, because most calls after a loss do nothing
            self._lose(part)

    @rule(stock=stocks, limit=limits)
    @precondition(lambda self: self.model.useless(OWN_ENGINE))
    def start_over(self, stock: int, limit: int) -> None:
        """Deletes all keys and seeds a sale, so that the rest of the sequence does something."""
        manifest = Manifest(
            SALES[0], self._revision(1), stock, limit, may_seed=True, engine=OWN_ENGINE
        )
        self._apply(manifest)  # must not repair a lost sale
        for part in PARTS:
            self._lose(part)
        self._apply(manifest)

    # Checks after each call.

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


_STEPS: tuple[tuple[Step, Fenced], ...] = (
    ("fence", Fenced.FENCED),
    ("wait", Fenced.FENCED),
    ("begin", Fenced.BEGUN),
)


async def _awaited(call: Any) -> Any:  # noqa: ANN401 - redis-py's types are sync or async
    return await call


def _compared(
    server: RedisServer, *phases: Phase, examples: int, fault: Fault | None
) -> Counter[str]:
    """Runs sequences on a server and returns counts of the results."""
    with asyncio.Runner() as runner:
        client = redis_client.connect(server.url)
        inventory = Inventory(client, outbox_limit=Item().outbox_limit)
        outbox, recovery = Outbox(client), Recovery(client)
        if fault is not None:
            fault.into(inventory, outbox, recovery)
        run_id = runner.run(inventory.server()).run_id
        connected = Connected(
            runner, client, inventory, outbox, recovery, run_id, itertools.count(), Counter()
        )
        machine = type("OnServer", (Scripts,), {"server": connected})
        try:
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=STEPS,
                    phases=phases,
                    derandomize=os.environ.get("FLASHSALE_MODEL_RANDOM") != "1",
                    database=None,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(client.aclose())
    return connected.seen


@pytest.mark.parametrize("kind", sorted(redis_binaries()))
def test_the_scripts_agree_with_their_model(kind: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path, binary=redis_binaries()[kind]) as server:
        seen = _compared(server, Phase.generate, Phase.shrink, examples=EXAMPLES, fault=None)
    # Sequences without these results would prove nothing.
    decided = {*Outcome} - {Outcome.UNSUPPORTED}
    assert seen["rebuilt"]
    answered = {f"apply: {answer}" for answer in Applied if answer is not Applied.UNSUPPORTED}
    answered |= {f"free: {answer}" for answer in Freed if answer is not Freed.UNSUPPORTED}
    answered |= {f"close: {answer}" for answer in Closed if answer is not Closed.UNSUPPORTED}
    answered |= {f"fence: {answer}" for answer in Fenced if answer is not Fenced.UNSUPPORTED}
    assert len((decided | answered) - seen.keys()) <= 3, (decided | answered) - seen.keys()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.script}: {fault.right}")
def test_a_mistake_in_a_script_is_found(fault: Fault, redis_server: RedisServer) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - any check may fail first
        _compared(redis_server, Phase.generate, examples=1_000, fault=fault)
