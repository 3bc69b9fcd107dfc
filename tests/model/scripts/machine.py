"""One item on a server and in the model, and the comparison of both after each call."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant

from flashsale.errors import RedisUnavailable
from flashsale.inventory import Applied
from flashsale.keys import ItemKeys
from flashsale.outbox import Entry
from flashsale.reservations import (
    FINAL,
    OrderCall,
    OutboxEntry,
    Record,
    Request,
    Snapshot,
    State,
    Transition,
    TransitionReply,
)
from flashsale.sale import SaleSpec
from tests.model.scripts import reservation_model, sale_model
from tests.model.scripts.item import (
    OTHER_RUN,
    THIS_RUN,
    Buyer,
    Hash,
    Item,
    Manifest,
    buyers_of,
    due_ms,
    units,
)
from tests.model.scripts.server import Connected

HOUR_MS = 3_600_000
SALES = ("default/first", "default/second")
LAST_HOUR = 50
OTHER_SERVER = f"{'f' * 40}:{'0' * 40}"
OWN_ENGINE = "own"
LEASE_MS = 600_000
NO_ENTRY: Entry = ("1-1", "no-id", 1)
TRACE = f"00-{'a' * 32}-{'b' * 16}-01"
PARTS = ["sale", "buyers", "reservations", "outbox", "holds"]
FORMER = {"hold_ms": "0", "max_expired_holds": "3", "held": "0", "rebuilt": "0"}
"""Fields of the hash that the previous version does not write, and their meaning."""

chances = st.sampled_from(range(100))
stocks = st.sampled_from([20, 12, 40, 8, 5, 3, 1, 0])
limits = st.sampled_from([3, 2, 4, 8, 1])
pauses = st.sampled_from([False] * 10 + [True])
holds = st.sampled_from([3_600, 290, 290, 0, 7_200])
"""Seconds of a hold. The grace of 290 s is a tenth of it, and that of an hour is 30 s."""
expired_holds = st.sampled_from([3, 1, 2])
engines = st.sampled_from([OWN_ENGINE] * 10 + ["other", ""])
"""The caller's engine. The previous version has none."""
places = st.sampled_from(range(3))
"""The place of the tested item in a call of three."""
callers = st.sampled_from([OWN_ENGINE] * 5 + ["other", ""])
"""The engine of a caller whose refused call does not end the sequence."""
revisions = st.sampled_from([0, 0, 1, 1, 1, 2, -1])
"""Difference between a call's revision and the highest used revision."""


class Machine(RuleBasedStateMachine):
    """Tests one item. Each rule makes the same call on the server and on the model."""

    server: Connected

    def __init__(self) -> None:
        super().__init__()
        self.item = f"model-{next(self.server.names)}"
        self.keys = ItemKeys.of(self.item)
        self.empty = f"{self.item}-empty"
        """An item without a sale, which shares calls with the tested one."""
        self.broken = f"{self.item}-broken"
        """An item of which Redis refuses each call, because its keys have other types."""
        for key in (ItemKeys.of(self.broken).sale, ItemKeys.of(self.broken).outbox):
            self.server.redis.set(key, "text")
        self.model = Item()
        self.zero_ms = self.server.run(self.server.inventory.server()).now_ms
        self.revision = 1
        self.claim = 1
        self.highest_limit = 1
        self.ids = itertools.count()
        self.used: list[Request] = []
        self.retired: list[tuple[str, str, int]] = []
        self.entries: dict[str, OutboxEntry] = {}
        """All entries that scripts have added to the outbox."""

    @property
    def hash(self) -> Hash:
        """The model's hash of a sale that exists."""
        assert self.model.sale is not None
        return self.model.sale

    def seen(self, *answers: str) -> None:
        self.server.seen.update(answers)

    def apply_manifest(self, manifest: Manifest) -> None:
        expected = sale_model.apply(self.model, manifest)
        call = self.server.inventory.apply(
            self.spec(manifest),
            manifest.revision,
            engine_id=manifest.engine,
            seed_until_ms=2**53 if manifest.may_seed else None,
            replaces=manifest.replaces,
        )
        assert self.server.run(call) is expected
        self.seen(f"apply: {expected}")
        self.revision = max(self.revision, manifest.revision)
        if expected in {Applied.SEEDED, Applied.CHANGED}:
            self.highest_limit = max(self.highest_limit, manifest.max_per_user)

    def edit_sale(self, **changes: int) -> None:
        """Applies the sale again, if there is one, with other numbers and a new revision."""
        if self.model.sale is not None:
            changes["revision"] = self.next_revision(1)
            former = replace(self.hash.manifest, may_seed=False, replaces=None)
            self.apply_manifest(replace(former, **changes))  # type: ignore[arg-type]

    def close_sale(self, sale_id: str, revision: int, engine: str) -> None:
        expected = sale_model.close(self.model, sale_id, revision, engine)
        call = self.server.inventory.close(self.item, sale_id, revision, engine)
        assert self.server.run(call) is expected
        self.seen(f"close: {expected}")

    def spec(self, manifest: Manifest) -> SaleSpec:
        return SaleSpec(
            manifest.sale_id,
            self.item,
            manifest.stock,
            manifest.max_per_user,
            starts_ms=self.ms(manifest.starts_hour),
            ends_ms=self.ms(manifest.ends_hour),
            paused=manifest.paused,
            hold_seconds=manifest.hold_seconds or None,
            max_expired_holds=manifest.max_expired_holds,
        )

    def next_revision(self, above: int) -> int:
        return max(1, self.revision + above)

    def ms(self, hour: int | None) -> int | None:
        return None if hour is None else self.zero_ms + hour * HOUR_MS

    def snapshot(self) -> Snapshot:
        sale = self.hash
        capacity = sale.allocated + sale.released
        manifest = sale.manifest
        return Snapshot(
            manifest.sale_id, sale.allocated, capacity, manifest.revision, manifest.engine
        )

    def check_time(self, now_ms: int) -> None:
        """Checks the time of the sale in a script's answer."""
        if self.hash.last_hour:
            assert now_ms == self.ms(self.hash.last_hour)
        else:
            assert self.zero_ms <= now_ms < self.zero_ms + HOUR_MS

    def expect_entry(self, entry_id: str, own_id: str, record: Record, trace: str) -> None:
        """Adds an entry that the server has made to the outbox of the model."""
        self.entries[entry_id] = OutboxEntry(
            self.item, entry_id, own_id, record, self.snapshot(), trace
        )
        self.model.outbox = (self.model.outbox or {}) | {entry_id: (own_id, record)}

    def set_field(self, field: str, value: str) -> None:
        self.server.redis.hset(self.keys.sale, field, value)

    def settle_entries(self, named: Sequence[Entry], place: int = 0) -> None:
        """Settles entries in a call of three items. `place` is that of the tested one."""
        if named:
            expected = reservation_model.settle(self.model, named)
            pages = [(self.empty, [NO_ENTRY]), (self.broken, [NO_ENTRY])]
            pages.insert(place, (self.item, list(named)))
            results = self.server.run(self.server.outbox.settle_all(pages))
            assert results.pop(place) == expected
            assert results[0] == 0
            assert isinstance(results[1], RedisUnavailable)
            self.retired += named
            self.server.seen["settled"] += expected

    def change_records(
        self, verb: reservation_model.Verb, calls: list[OrderCall], engine: str
    ) -> None:
        """Confirms or cancels reservations on the server and in the model."""
        change = self.server.inventory.change
        reply = self.server.run(
            change(verb, self.item, calls, timeout_seconds=10, engine_id=engine)
        )
        now_ms = reply.now_ms if isinstance(reply, TransitionReply) else 0
        expected = reservation_model.change(self.model, verb, calls, engine, now_ms)
        if not isinstance(reply, TransitionReply):
            assert reply is expected
            self.seen(f"{verb}: {reply}")
            return
        assert [(answer.outcome, answer.record) for answer in reply.answers] == expected
        assert reply.snapshot == self.snapshot()
        self.check_time(now_ms)
        for call, (outcome, entry_id, record) in zip(calls, reply.answers, strict=True):
            self.seen(f"{verb}: {outcome}")
            if outcome is Transition.CHANGED:
                assert record is not None
                self.expect_entry(entry_id, call.reservation_id, record, call.traceparent)
            else:
                assert not entry_id

    def confirm_holds(self) -> None:
        """Confirms all reservations that are held."""
        records = (self.model.reservations or {}).items()
        held = [
            OrderCall(own_id, "a", TRACE)
            for own_id, record in records
            if record.state is State.HELD
        ]
        if held:
            self.change_records("confirm", held, OWN_ENGINE)

    def drain_outbox(self) -> None:
        entries = (self.model.outbox or {}).items()
        self.settle_entries(
            [(entry_id, own_id, record.version) for entry_id, (own_id, record) in entries]
        )

    def pass_hours(self, hours: int) -> None:
        """Makes the sale remember a later time, as if the clock was set back since."""
        if self.model.sale is not None:
            self.hash.last_hour = min(self.hash.last_hour + hours, LAST_HOUR)
            self.set_field("last_now_ms", str(self.ms(self.hash.last_hour)))

    def lose_part(self, part: str) -> None:
        setattr(self.model, part, {} if part == "holds" else None)
        self.server.redis.delete(getattr(self.keys, part))

    # Checks after each call.

    @invariant()
    def the_server_has_the_state_of_the_model(self) -> None:
        model = self.model
        sale, buyers, texts, entries, holds, *there = self._state()
        assert [bool(one) for one in there] == [
            part is not None for part in (model.buyers, model.reservations, model.outbox)
        ]
        assert {user: _buyer(text) for user, text in buyers.items()} == (model.buyers or {})
        records = {own_id: Record.parse(text) for own_id, text in texts.items()}
        assert records == (model.reservations or {})
        assert {own_id: int(score) for own_id, score in holds} == model.holds
        assert [entry_id for entry_id, _ in entries] == list(model.outbox or {})
        for entry_id, fields in entries:
            assert OutboxEntry.parse(self.item, entry_id, fields) == self.entries[entry_id]
        if model.sale is None:
            assert not sale
            return
        self._check_hash(FORMER | sale)
        if model.whole:
            self._check_invariants(FORMER | sale, buyers, records)

    def _check_hash(self, found: dict[str, str]) -> None:
        sale = self.hash
        self.check_time(int(found.pop("last_now_ms")))
        until_ms = found.pop("rebuild_until_ms", None)
        assert (until_ms is None) == (sale.leased is None)
        if until_ms is not None:
            assert (int(until_ms) >= self.zero_ms + LEASE_MS) == sale.leased
        manifest = sale.manifest
        stock = found.pop("stock", None)
        assert stock == (None if sale.stock is None else "{},{}".format(*sale.stock))
        starts_ms, ends_ms = self.ms(manifest.starts_hour), self.ms(manifest.ends_hour)
        runs = {THIS_RUN: self.server.run_id, OTHER_RUN: OTHER_SERVER}
        assert found == {
            "format": "1",
            "sale_id": manifest.sale_id,
            "run_id": runs.get(sale.run, sale.run),
            "revision": str(manifest.revision),
            "state": sale.state,
            "allocated": str(sale.allocated),
            "accepted": str(sale.accepted),
            "released": str(sale.released),
            "held": str(sale.held),
            "rebuilt": str(sale.rebuilt),
            "max_per_user": str(manifest.max_per_user),
            "starts_ms": "" if starts_ms is None else str(starts_ms),
            "ends_ms": "" if ends_ms is None else str(ends_ms),
            "hold_ms": str(1000 * manifest.hold_seconds),
            "max_expired_holds": str(manifest.max_expired_holds),
            "display_name": "",
            "engine": manifest.engine,
        }

    def _check_invariants(
        self, sale: dict[str, str], buyers: dict[str, str], records: dict[str, Record]
    ) -> None:
        """Checks that the server's state is consistent, without the rules of the model."""
        accepted, released = int(sale["accepted"]), int(sale["released"])
        waiting = {
            own_id for own_id, record in (self.model.outbox or {}).values() if record.state in FINAL
        }
        settled = {
            own_id: record._replace(state=State.CONFIRMED) if own_id in waiting else record
            for own_id, record in records.items()
        }
        assert accepted - released <= int(sale["allocated"])
        assert accepted == units(records.values(), *State)
        assert released == units(settled.values(), *FINAL)
        assert int(sale["held"]) == units(records.values(), State.HELD)
        assert self.model.holds == {
            own_id: due_ms(record)
            for own_id, record in records.items()
            if record.state is State.HELD
        }
        expected = buyers_of(settled.values())
        assert {user: _buyer(text) for user, text in buyers.items()} == expected
        assert max((taken for taken, _ in expected.values()), default=0) <= self.highest_limit
        for own_id, record in (self.model.outbox or {}).values():
            assert records[own_id] == record or records[own_id].version > record.version

    def _state(self) -> list[Any]:
        pipeline = self.server.redis.pipeline(transaction=False)
        for key in (self.keys.sale, self.keys.buyers, self.keys.reservations):
            pipeline.hgetall(key)
        pipeline.xrange(self.keys.outbox)
        pipeline.zrange(self.keys.holds, 0, -1, withscores=True)
        for key in (self.keys.buyers, self.keys.reservations, self.keys.outbox):
            pipeline.exists(key)
        state: list[Any] = pipeline.execute()
        return state

    def teardown(self) -> None:
        broken = ItemKeys.of(self.broken).sold
        self.server.redis.delete(*self.keys.sold, *broken)


def _buyer(text: str) -> Buyer:
    taken, _, expired = text.partition(",")
    return int(taken), int(expired or 0)
