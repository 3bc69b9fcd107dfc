"""The audit reports real differences between the stores, and no others."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from flashsale.events import Event
from flashsale.keys import ItemKeys
from flashsale.reservations import Outcome
from flashsale.sale import SaleSpec, SaleState
from flashsale_operator.sales import audit as module
from flashsale_operator.sales.audit import Audit, Facts, SaleFinding, Tally, Verdict, audit, compare
from flashsale_operator.sales.offsets import Span, behind, faults
from tests.support.ledgers import Ledger
from tests.support.observations import NOW_MS, OTHER, SERVER, SPEC, a_row, a_sale
from tests.support.recording import record
from tests.support.simulated_shop import SimulatedShop


def tally(**changes: Any) -> Tally:  # noqa: ANN401 - any field
    fields: dict[str, Any] = {
        "row": a_row(accepted=4),
        "accepted": 4,
        "released": 0,
        "held": 0,
        "refused": 0,
        "refused_units": 0,
        "buyers_above_limit": 0,
    }
    return Tally(**(fields | changes))


AGREED = Facts(
    before=a_row(accepted=4), holder=a_sale(accepted=4), server=SERVER, lag=0, after=tally()
)
HELD = a_row(accepted=4, held=2)
LOST_HOLDS = a_row(accepted=4, held=2, closed=True)
RECORDED_THREE = tally(row=a_row(accepted=3), accepted=3)
ENDED = replace(SPEC, ends_ms=NOW_MS)
PAUSED = replace(SPEC, paused=True)
PAUSED_TO_THE_END = replace(ENDED, paused=True)


def verdict(**changes: Any) -> tuple[Verdict, tuple[str, ...]]:  # noqa: ANN401 - any field
    finding = compare(replace(AGREED, **changes))
    return finding.verdict, finding.notes


def test_equal_counts_are_ok() -> None:
    assert compare(AGREED) == SaleFinding(
        SPEC.sale_id, SPEC.item_id, SaleState.SELLING, 100, 4, 0, 4, 0, 0, Verdict.OK, ()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"holder": a_sale(accepted=5, outbox_length=1)},
        {"holder": a_sale(accepted=4, outbox_length=1)},
        {"holder": a_sale(accepted=5), "lag": 1},
        {"before": a_row(), "holder": a_sale(accepted=2, outbox_length=1)},
        {"before": HELD, "after": tally(row=HELD, held=2), "lag": 1},
        {
            "before": HELD,
            "holder": a_sale(accepted=4, outbox_length=1),
            "after": tally(row=HELD, held=2),
        },
        {
            "before": a_row(accepted=4, released=1),
            "holder": a_sale(accepted=4, outbox_length=1),
            "after": tally(row=a_row(accepted=4, released=1), released=1),
        },
        {"holder": a_sale(accepted=4, released=1), "lag": 1},
    ],
)
def test_units_in_the_outbox_or_unread_are_in_flight(changes: dict[str, Any]) -> None:
    assert verdict(**changes) == (Verdict.IN_FLIGHT, ())


def test_a_restart_of_redis_does_not_fence_a_closed_sale() -> None:
    closed = a_row(closed=True, accepted=4)
    facts = replace(
        AGREED,
        before=closed,
        holder=a_sale(stored_state="closed", accepted=4, run_id="run-0"),
        after=tally(row=closed),
    )
    finding = compare(facts)
    assert (finding.state, finding.verdict, finding.notes) == (SaleState.CLOSING, Verdict.OK, ())
    torn = compare(replace(facts, holder=replace(a_sale(), torn=True, stored_state="closed")))
    assert torn.verdict is Verdict.DISAGREES
    # The close has not reached Redis yet.
    unclosed = compare(replace(facts, holder=a_sale(accepted=4, run_id="run-0")))
    assert (unclosed.state, unclosed.verdict) == (SaleState.FENCED, Verdict.DISAGREES)


def test_lag_without_a_difference_belongs_to_another_sale() -> None:
    assert verdict(lag=7) == (Verdict.OK, ())


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"after": RECORDED_THREE}, "lost: 1 unit, not in ledger, outbox or topic"),
        ({"holder": a_sale(accepted=3)}, "Redis lost 1 unit"),
        ({"holder": a_sale(accepted=3, outbox_length=1)}, "Redis lost 1 unit"),
        ({"holder": None}, "Redis has no keys of the sale"),
        ({"holder": a_sale(OTHER)}, "another sale has the item"),
        ({"after": None, "before": None}, "the ledger has no row of the sale"),
        ({"holder": a_sale(accepted=4, run_id="run-0")}, "fenced: Redis restarted or lost keys"),
        ({"holder": a_sale(accepted=4, torn=True)}, "fenced: Redis restarted or lost keys"),
        ({"before": a_row(revision=2, accepted=4)}, "Redis has revision 1, the ledger 2"),
        ({"holder": a_sale(accepted=4, revision=2)}, "the ledger has revision 1, Redis 2"),
        ({"holder": a_sale(accepted=4, allocated=99)}, "Redis allocates 99, the ledger 100"),
        ({"holder": a_sale(accepted=4, allocated=3)}, "oversold: 4 units taken, 3 allocated"),
        ({"after": tally(accepted=5)}, "accepted: 4, but reservations add up to 5"),
        ({"after": tally(released=1)}, "released: 0, but releases add up to 1"),
        ({"after": tally(held=1)}, "held: 0, but holds add up to 1"),
        (
            {"holder": a_sale(accepted=4, held=1)},
            "Redis lost the confirmation or the end of 1 held unit",
        ),
        (
            {"before": a_row(accepted=4, released=1)},
            "Redis lost the release of 1 unit",
        ),
        (
            {"before": HELD, "after": tally(row=HELD, held=2)},
            "lost: the confirmation or the end of 2 held units, not in ledger, outbox or topic",
        ),
        (
            {"holder": a_sale(accepted=4, released=1)},
            "lost: the release of 1 unit, not in ledger, outbox or topic",
        ),
        ({"holder": a_sale(accepted=4, held=-1)}, "impossible counts in Redis: 4 accepted"),
        ({"holder": a_sale(accepted=4, held=5)}, "impossible counts in Redis: 4 accepted"),
        ({"holder": a_sale(accepted=4, released=-1)}, "impossible counts in Redis: 4 accepted"),
        ({"holder": a_sale(accepted=4, released=5)}, "impossible counts in Redis: 4 accepted"),
        ({"before": LOST_HOLDS, "holder": None}, "Redis has no keys of the sale"),
    ],
)
def test_a_difference_that_cannot_be_in_flight_disagrees(
    changes: dict[str, Any], note: str
) -> None:
    found, notes = verdict(**changes)
    assert found is Verdict.DISAGREES
    assert notes[0].startswith(note)


@pytest.mark.parametrize(
    "changed",
    [
        {"max_per_user": 2},
        {"display_name": "another"},
        {"starts_ms": NOW_MS - 1_000},
        {"ends_ms": NOW_MS + 1_000},
        {"stored_state": "paused"},
        {"hold_ms": 1_000},
        {"max_expired_holds": SPEC.max_expired_holds + 1},
    ],
)
def test_a_sale_with_other_settings_disagrees(changed: dict[str, Any]) -> None:
    assert verdict(holder=a_sale(accepted=4, **changed)) == (
        Verdict.DISAGREES,
        ("the ledger has other settings of the sale than Redis",),
    )


def test_a_refused_reservation_disagrees_once() -> None:
    holder = a_sale(accepted=6)
    assert verdict(holder=holder, after=tally(refused=1, refused_units=2)) == (
        Verdict.DISAGREES,
        ("refused by the ledger: 1 reservation (2 units)",),
    )


def test_units_of_refused_reservations_end_only_in_redis() -> None:
    refused = tally(refused=1, refused_units=2)
    for holder in (a_sale(accepted=6, held=2), a_sale(accepted=6, released=2)):
        assert verdict(holder=holder, after=refused) == (
            Verdict.DISAGREES,
            ("refused by the ledger: 1 reservation (2 units)",),
        )


def test_a_finished_sale_needs_neither_keys_nor_the_last_change() -> None:
    closed = a_row(accepted=4, closed=True)
    over = a_row(ENDED, accepted=4, revision=2)
    for row, holder in (
        (closed, None),
        (closed, a_sale(OTHER)),
        (a_row(ENDED, accepted=4), None),
        (over, a_sale(ENDED, accepted=4)),
        (
            a_row(PAUSED_TO_THE_END, accepted=4),
            a_sale(PAUSED_TO_THE_END, accepted=4, stored_state="ended"),
        ),
        (a_row(PAUSED, accepted=4, closed=True), a_sale(PAUSED, accepted=4, stored_state="closed")),
        (closed, a_sale(accepted=4, stored_state="closed", allocated=SPEC.stock + 1)),
        (closed, a_sale(accepted=4, stored_state="ended", allocated=SPEC.stock - 1)),
    ):
        assert verdict(before=row, holder=holder, after=tally(row=row)) == (Verdict.OK, ())


def test_stock_below_the_taken_units_is_no_disagreement() -> None:
    row = a_row(replace(SPEC, stock=1), accepted=4)
    assert verdict(before=row, holder=a_sale(accepted=4, allocated=4), after=tally(row=row)) == (
        Verdict.OK,
        (),
    )


def test_a_change_of_the_sale_during_the_look_is_no_disagreement() -> None:
    row = a_row(accepted=4, revision=2)
    assert verdict(holder=a_sale(accepted=4, revision=2), after=tally(row=row)) == (Verdict.OK, ())


def test_a_sale_from_before_its_last_rebuild_is_outdated() -> None:
    """Another rebuild restores its units, so the audit must not call them lost."""
    row = a_row(accepted=4, rebuilt_revision=1)
    found, notes = verdict(before=row, holder=a_sale(accepted=3, rebuilt=0), after=tally(row=row))
    assert found is Verdict.DISAGREES
    assert notes[-1] == "Redis has the sale from before its last rebuild"


def test_buyers_above_a_lowered_limit_are_noted() -> None:
    assert verdict(after=tally(buyers_above_limit=2)) == (
        Verdict.OK,
        ("above maxPerUser 1: 2 buyers",),
    )


def test_lag_and_faults_of_a_topic() -> None:
    topic = {0: Span(0, 5), 1: Span(3, 9), 2: Span(0, 0)}
    assert behind(topic, {0: 5, 1: 4}) == 5
    assert faults(topic, {0: 5, 1: 4}) == ()
    assert [fault.split(":")[0] for fault in faults(topic, {0: 6, 1: 2, 3: 1})] == [
        "partition 0 ends at offset 5, but the ledger has read to 6",
        "partition 1 begins at offset 3, but the ledger has read only to 2",
        "partition 3 ends at offset 0, but the ledger has read to 1",
    ]


async def audited(shop: SimulatedShop, item_id: str | None = None) -> Audit:
    return await audit(shop.inventory, shop.pool, shop.spans, item_id)


@pytest.fixture(autouse=True)
def _without_pause_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BETWEEN_LOOKS_SECONDS", 0.01)


async def test_a_sale_agrees_before_during_and_after_recording(
    shop: SimulatedShop, spec: SaleSpec, other: SaleSpec
) -> None:
    assert await audited(shop) == Audit((), "flashsale.reservations", ())
    await shop.apply(spec)
    await shop.apply(replace(other, item_id=f"{spec.item_id}-2"))
    await shop.buy(spec.item_id, "a", "b")
    found = await audited(shop)
    assert [finding.verdict for finding in found.findings] == [Verdict.IN_FLIGHT, Verdict.OK]
    assert found.agrees
    await shop.record(spec.item_id)
    [finding] = (await audited(shop, spec.item_id)).findings
    assert (finding.verdict, finding.accepted, finding.recorded) == (Verdict.OK, 2, 2)


async def test_holds_agree_before_during_and_after_their_changes(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    async def looks() -> tuple[Verdict, int | None]:
        found = await audited(shop)
        assert found.agrees, found
        [finding] = found.findings
        return finding.verdict, finding.held

    held = replace(spec, hold_seconds=600)
    await shop.apply(held)
    await shop.buy(spec.item_id, "a", "b", "c", "d")
    assert await looks() == (Verdict.IN_FLIGHT, 4)
    await shop.record(spec.item_id)
    assert await looks() == (Verdict.OK, 4)
    await shop.confirm(spec.item_id, "a")
    await shop.cancel(spec.item_id, "b")
    await shop.expire(spec.item_id, "c")
    assert await looks() == (Verdict.IN_FLIGHT, 1)
    await shop.record(spec.item_id)
    assert await looks() == (Verdict.OK, 1)
    # A unit that has ended does not count for its buyer, who has another one.
    await shop.pool.execute(
        "UPDATE reservations SET state = 'expired', user_id = 'a' WHERE state = 'held'"
    )
    [finding] = (await audited(shop)).findings
    assert finding.notes == (
        "released: 2, but releases add up to 3",
        "held: 1, but holds add up to 0",
    )


async def test_records_that_arrive_during_the_audit_are_no_fault_of_the_topic(
    shop: SimulatedShop,
) -> None:
    async def then_others_go_on() -> Mapping[int, Span]:
        found = dict(shop.topic)
        shop.topic[0] = Span(0, shop.topic[0].end + 10)
        await shop.read_to(0, shop.topic[0].end)
        return found

    shop.topic[0] = Span(0, 5)
    await shop.read_to(0, 5)
    assert (await audit(shop.inventory, shop.pool, then_others_go_on)).agrees
    shop.topic[0] = Span(0, 4)
    found = await audited(shop)
    assert [fault.split(":")[0] for fault in found.topic_faults] == [
        "partition 0 ends at offset 4, but the ledger has read to 15"
    ]


async def test_a_difference_that_the_next_look_does_not_find_is_none(shop: SimulatedShop) -> None:
    await shop.read_to(0, 5)
    ends = iter((4, 5))

    async def then_at_its_end() -> Mapping[int, Span]:
        return {0: Span(0, next(ends))}

    assert (await audit(shop.inventory, shop.pool, then_at_its_end)).agrees


async def test_a_lost_unit_disagrees(shop: SimulatedShop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b")
    await shop.record(spec.item_id, lose=1)
    shop.topic[0] = Span(0, 2)
    found = await audited(shop)
    assert found.agrees, "the unit may be on the topic"
    await shop.read_to(0, 2)
    found = await audited(shop)
    assert found.findings[0].notes == ("lost: 1 unit, not in ledger, outbox or topic",)
    assert not found.agrees


async def test_a_sale_without_a_row_disagrees(shop: SimulatedShop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    await shop.pool.execute("DELETE FROM sales")
    [finding] = (await audited(shop)).findings
    assert finding.verdict is Verdict.DISAGREES
    assert "the ledger has no row of the sale" in finding.notes


async def test_a_flush_disagrees(shop: SimulatedShop, spec: SaleSpec) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a")
    await shop.record(spec.item_id)
    await shop.redis.flushall()
    found = await audited(shop)
    assert found.findings[0].notes == ("Redis has no keys of the sale",)
    assert not found.agrees


async def test_a_ledger_that_lost_a_reservation_disagrees_with_itself(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.buy(spec.item_id, "a", "b")
    await shop.record(spec.item_id)
    await shop.pool.execute("DELETE FROM reservations WHERE user_id = 'a'")
    [finding] = (await audited(shop)).findings
    assert finding.notes == ("accepted: 2, but reservations add up to 1",)


async def test_a_sale_that_cannot_be_read_agrees_with_nothing(
    shop: SimulatedShop, spec: SaleSpec, other: SaleSpec
) -> None:
    await shop.apply(spec)
    await shop.apply(replace(other, item_id=f"{spec.item_id}-2"))
    await shop.redis.hset(ItemKeys.of(spec.item_id).sale, "accepted", "many")
    found = await audited(shop)
    assert found.unread.startswith(f"{spec.item_id}: the sale cannot be read: ")
    assert [(each.item_id, each.verdict) for each in found.findings] == [
        (f"{spec.item_id}-2", Verdict.OK)
    ]
    assert not found.agrees


async def test_a_recreated_topic_disagrees(shop: SimulatedShop) -> None:
    await shop.read_to(0, 3)
    assert not (await audited(shop)).agrees


async def test_a_busy_sale_never_disagrees(shop: SimulatedShop, spec: SaleSpec) -> None:
    await shop.apply(replace(spec, stock=100_000))
    done = asyncio.Event()

    async def crowd(name: str) -> None:
        number = 0
        while not done.is_set():
            number += 1
            users = [f"{name}-{number}-{n}" for n in range(3)]
            assert await shop.buy(spec.item_id, *users) == [Outcome.ACCEPTED] * 3

    async def recorder() -> None:
        while not done.is_set():
            await shop.record(spec.item_id)

    async def auditor() -> None:
        try:
            for number in range(30):
                if number % 10 == 0:
                    await shop.apply(replace(spec, stock=100_000 + number))
                found = await audited(shop)
                assert found.agrees, found
        finally:
            done.set()

    await asyncio.gather(crowd("a"), crowd("b"), recorder(), auditor())


async def test_a_sale_that_the_ledger_knows_from_events_only_waits_for_its_manifest(
    shop: SimulatedShop, spec: SaleSpec
) -> None:
    """A rebuild would open it without its window and its holds."""
    now_ms = (await shop.inventory.server()).now_ms
    spec = replace(spec, ends_ms=now_ms + 3_600_000, hold_seconds=60, max_per_user=2)
    await shop.apply(spec)
    await shop.buy(spec.item_id, "ann")
    [entry] = (await shop.outbox.page(spec.item_id, until_ms=2**50, count=10)).entries
    await shop.pool.execute("DELETE FROM sales")
    event = Event.of(spec.item_id, entry.reservation_id, entry.record, entry.snapshot)
    await record(Ledger("", shop.pool), [event])
    await shop.record(spec.item_id)
    [finding] = (await audit(shop.inventory, shop.pool, shop.spans)).findings
    assert finding.verdict is Verdict.DISAGREES
    assert finding.notes == ("the ledger has other settings of the sale than Redis",)

    await shop.redis.flushall()
    await shop.rebuild(spec)
    assert await shop.buy(spec.item_id, "bob") == [Outcome.PAUSED]
    assert (await shop.apply(spec)).ready
    assert await shop.buy(spec.item_id, "bob") == [Outcome.ACCEPTED]
    await shop.record(spec.item_id)
    assert (await audit(shop.inventory, shop.pool, shop.spans)).agrees
