"""Events that do not fit the capacity, or come after a rebuild that did not find them."""

from datetime import timedelta
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashsale.events import Event
from flashsale_consumer import recorder
from flashsale_consumer.clients import transaction
from flashsale_consumer.recorder import BatchOutcome
from tests.support.consumer import BEYOND_POSTGRESQL, NOON, accepted, changed, held
from tests.support.ledgers import Ledger
from tests.support.recording import check, counts, rebuild, record


async def test_events_over_the_capacity_are_refused_and_the_others_recorded(ledger: Ledger) -> None:
    oversold = [accepted(number, allocated=3, capacity=3) for number in range(5)]
    other = [accepted(number, sale_id="default/watches", item_id="watch") for number in range(5)]
    outcome = await record(ledger, [*reversed(oversold), *other])
    assert {event.reservation_id for event, _ in outcome.refused} == {
        event.reservation_id for event in oversold[3:]
    }
    assert outcome.recorded == 8
    sale = await ledger.sale()
    assert (sale.accepted, sale.capacity) == (3, 3)
    states = {key: row[0] for key, row in (await ledger.rows()).items()}
    assert states == {
        event.reservation_id: "confirmed" if number < 3 else "refused"
        for number, event in enumerate(oversold)
    }
    assert await ledger.has(*other)


@pytest.mark.parametrize("kind", ["over the capacity", "late"])
async def test_many_events_are_refused_in_few_statements(ledger: Ledger, kind: str) -> None:
    """Otherwise a large batch would not end before its deadline, and would be read for ever."""
    if kind == "late":
        await record(ledger, [accepted(revision=4)])
        await rebuild(ledger, 5)
        refused = [accepted(number, revision=4) for number in range(2_000)]
    else:
        refused = [accepted(number, allocated=0, capacity=0) for number in range(2_000)]
    statements: list[object] = []
    async with transaction(ledger.pool) as connection:
        connection.add_query_logger(statements.append)
        outcome = await recorder.record(connection, "reservations", {}, {}, refused)
        connection.remove_query_logger(statements.append)
    assert [event for event, _ in outcome.refused] == refused
    assert len(statements) < 50


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Event], list[Event]]:
    """Draw two batches of events of the same few reservations, whatever their versions."""
    batches: tuple[list[Event], list[Event]] = ([], [])
    for number in range(draw(st.integers(1, 7))):
        first = held(number, quantity=draw(st.integers(1, 3)), reservation_id=str(UUID(int=number)))
        for batch in batches:
            state = draw(st.sampled_from(["", "held", "confirmed", "cancelled", "expired"]))
            if state:
                version = draw(st.integers(1, 4))
                batch.append(msgspec.structs.replace(first, state=state, version=version))
    return batches


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(history=histories(), capacities=st.tuples(st.integers(0, 9), st.integers(0, 4)))
async def test_a_batch_is_refused_as_if_its_events_came_one_by_one(
    ledger: Ledger, history: tuple[list[Event], list[Event]], capacities: tuple[int, int]
) -> None:
    """The first batch leaves reservations of all states, and refused ones."""
    together, apart = f"default/{uuid4()}", f"default/{uuid4()}"
    capacity = 0
    for events, more in zip(history, capacities, strict=True):
        capacity += more
        same = [msgspec.structs.replace(each, capacity=capacity) for each in events]
        whole = await record(ledger, [msgspec.structs.replace(e, sale_id=together) for e in same])
        single = [
            await record(ledger, [msgspec.structs.replace(event, sale_id=apart)]) for event in same
        ]
        assert [event.reservation_id for event, _ in whole.refused] == [
            event.reservation_id for outcome in single for event, _ in outcome.refused
        ]
        assert whole.recorded == sum(outcome.recorded for outcome in single)
        assert await ledger.rows(together) == await ledger.rows(apart)
        if same:
            assert await counts(ledger, together) == await counts(ledger, apart)


async def test_a_refused_reservation_stays_refused_while_it_does_not_fit(ledger: Ledger) -> None:
    event = accepted(allocated=0, capacity=0)
    assert [each for each, _ in (await record(ledger, [event])).refused] == [event]
    assert await record(ledger, [event]) == BatchOutcome()
    assert await ledger.rows() == {event.reservation_id: ("refused", 1, 1)}
    assert await counts(ledger) == (0, 0, 0)


@pytest.mark.parametrize("end", ["cancelled", "expired"])
@pytest.mark.parametrize("together", [False, True])
async def test_the_end_of_a_refused_hold_leaves_no_room_for_another_reservation(
    ledger: Ledger, together: bool, end: str
) -> None:
    """Redis sold the units twice. It sells those of the hold a third time."""
    first, hold = (held(number, quantity=2, allocated=2, capacity=2) for number in range(2))
    assert (await record(ledger, [first, hold])).refused == [(hold, recorder._TOO_MANY)]
    ended = changed(hold, end)
    third = held(3, quantity=2, allocated=2, capacity=4)
    if together:
        refused = (await record(ledger, [third, ended])).refused
    else:
        assert await record(ledger, [ended]) == BatchOutcome(recorded=1)
        refused = (await record(ledger, [third, ended])).refused
    assert [event for event, _ in refused] == [third]
    assert (await ledger.rows())[hold.reservation_id] == (end, 2, 2)
    assert await counts(ledger) == (4, 2, 2)
    assert await record(ledger, [first, hold, ended, third]) == BatchOutcome()
    assert (await record(ledger, [changed(first, end)])).recorded == 1
    assert (await record(ledger, [msgspec.structs.replace(third, capacity=6)])).recorded == 1


async def test_an_older_version_of_a_refused_reservation_does_not_return_alone(
    ledger: Ledger,
) -> None:
    """The ledger would have a confirmed reservation as a hold, for ever."""
    hold = held(allocated=0, capacity=0)
    confirmed = changed(hold, "confirmed")
    assert [each for each, _ in (await record(ledger, [hold])).refused] == [hold]
    assert await record(ledger, [confirmed]) == BatchOutcome()
    other = accepted(allocated=5, capacity=5)
    assert await record(ledger, [other, hold]) == BatchOutcome(recorded=1)
    assert (await ledger.rows())[hold.reservation_id] == ("refused", 2, 1)
    assert (await record(ledger, [confirmed])).recorded == 1


async def test_a_refused_reservation_that_is_accepted_again_is_recorded(ledger: Ledger) -> None:
    """Redis was rebuilt without it, and its buyer repeated the request with the same key."""
    first, other = accepted(0, allocated=1, capacity=1), accepted(1, allocated=1, capacity=1)
    assert (await record(ledger, [first])).recorded == 1
    assert [each for each, _ in (await record(ledger, [other])).refused] == [other]
    again = msgspec.structs.replace(other, capacity=2, revision=2)
    assert (await record(ledger, [again, first])).recorded == 1
    assert await record(ledger, [again, other]) == BatchOutcome()
    assert await ledger.has(first, again)
    sale = await ledger.sale()
    assert (sale.accepted, sale.capacity) == (2, 2)


async def test_a_refused_hold_that_is_accepted_later_counts_with_its_new_quantity(
    ledger: Ledger,
) -> None:
    """The buyer repeats the key after a rebuild, and asks for fewer units."""
    refused = held(quantity=3, request_key="k", allocated=2, capacity=2)
    assert [each for each, _ in (await record(ledger, [refused])).refused] == [refused]
    again = msgspec.structs.replace(refused, quantity=2, version=1_001, revision=1)
    assert (await record(ledger, [again])).recorded == 1
    await check(ledger, again.sale_id, [again])
    confirmed = changed(again, "confirmed")
    assert (await record(ledger, [refused, confirmed])).recorded == 1
    await check(ledger, again.sale_id, [confirmed])


async def test_an_older_version_does_not_replace_a_refused_one(ledger: Ledger) -> None:
    """The ledger would have the hold for ever, because the confirmation does not come again."""
    hold = held(allocated=0, capacity=0)
    confirmed = changed(hold, "confirmed")
    assert [each for each, _ in (await record(ledger, [confirmed])).refused] == [confirmed]
    other = accepted(allocated=5, capacity=5)
    assert await record(ledger, [other, hold]) == BatchOutcome(recorded=1)
    assert (await ledger.rows())[hold.reservation_id] == ("refused", 2, 1)
    assert await counts(ledger) == (1, 0, 0)
    # The same event fits now, if it is read again.
    assert (await record(ledger, [confirmed])).recorded == 1
    await check(ledger, other.sale_id, [other, confirmed])


async def test_a_late_event_from_before_the_last_rebuild_is_refused(ledger: Ledger) -> None:
    known, late = accepted(0, revision=4), accepted(1, revision=4)
    await record(ledger, [known])
    await rebuild(ledger, 5)
    after = accepted(2, revision=5)
    outcome = await record(ledger, [known, late, changed(late, "cancelled"), after])
    assert (outcome.recorded, outcome.voided) == (1, [])
    ((refused, why),) = outcome.refused
    assert refused.reservation_id == late.reservation_id
    assert "rebuilt without it" in why
    assert await record(ledger, [late, known]) == BatchOutcome()
    assert {key: row[0] for key, row in (await ledger.rows()).items()} == {
        known.reservation_id: "confirmed",
        late.reservation_id: "refused",
        after.reservation_id: "confirmed",
    }
    assert (await ledger.sale()).accepted == 2


async def test_an_older_late_event_does_not_replace_a_newer_refused_one(ledger: Ledger) -> None:
    """Receivers keep the highest version, and it would be announced a second time."""
    await record(ledger, [accepted(revision=4)])
    await rebuild(ledger, 5)
    late = held(1, revision=4)
    confirmed = changed(late, "confirmed")
    assert [event for event, _ in (await record(ledger, [confirmed])).refused] == [confirmed]
    assert await record(ledger, [late]) == BatchOutcome()
    assert (await ledger.rows())[late.reservation_id] == ("refused", 2, 1)


async def test_a_late_event_raises_the_capacity(ledger: Ledger) -> None:
    """The units of a release that the ledger has are sold again before the rebuild and after it."""
    await record(ledger, [accepted(0, capacity=1, revision=1)])
    await rebuild(ledger, 2)
    late, after = accepted(1, capacity=2, revision=1), accepted(2, capacity=1, revision=2)
    outcome = await record(ledger, [late, after])
    assert (outcome.recorded, [each for each, _ in outcome.refused]) == (1, [late])


async def test_a_late_change_of_a_known_reservation_is_void(ledger: Ledger) -> None:
    known = held(revision=4)
    await record(ledger, [known])
    await rebuild(ledger, 5)
    late = changed(known, "cancelled")
    assert await record(ledger, [late]) == BatchOutcome(voided=[late])
    await check(ledger, known.sale_id, [known])
    assert await ledger.voided() == 1
    # The rebuild gave the hold more time.
    later = NOON + timedelta(hours=1)
    confirmed = changed(known, "confirmed", version=2**53, revision=5, expires_at=later)
    assert (await record(ledger, [confirmed])).recorded == 1
    await check(ledger, known.sale_id, [confirmed])


async def test_a_late_version_that_the_ledger_has_is_not_void(ledger: Ledger) -> None:
    first = held(revision=4)
    second = changed(first, "confirmed")
    await record(ledger, [second])
    await rebuild(ledger, 5)
    assert await record(ledger, [first, second]) == BatchOutcome()
    assert await ledger.voided() == 0
    await check(ledger, first.sale_id, [second])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("version", [1, 2])
async def test_a_void_event_does_not_hide_a_valid_one_of_its_batch(
    ledger: Ledger, version: int, order: int
) -> None:
    """The same key is accepted again after a rebuild by a pod of the previous version."""
    await record(ledger, [accepted(revision=4)])
    await rebuild(ledger, 5)
    void = held(1, version=version, revision=4)
    valid = msgspec.structs.replace(void, version=1, revision=5)
    outcome = await record(ledger, [void, valid][::order])
    assert outcome == BatchOutcome(recorded=1)
    assert await ledger.has(valid)
    assert (await ledger.rows())[valid.reservation_id] == ("held", 1, 1)


async def test_a_void_change_does_not_hide_a_valid_one_of_its_batch(ledger: Ledger) -> None:
    known = held(revision=4)
    await record(ledger, [known])
    await rebuild(ledger, 5)
    void = changed(known, "cancelled", version=3)
    valid = changed(known, "confirmed", revision=5)
    assert await record(ledger, [void, valid]) == BatchOutcome(recorded=1, voided=[void])
    await check(ledger, known.sale_id, [valid])


async def test_a_late_event_that_postgresql_rejects_is_reported(ledger: Ledger) -> None:
    known = accepted(revision=4)
    await record(ledger, [known])
    await rebuild(ledger, 5)
    broken = accepted(accepted_at=BEYOND_POSTGRESQL, revision=4)
    late = accepted(revision=4)
    outcome = await record(ledger, [broken, late])
    assert [event for event, _ in outcome.broken] == [broken]
    assert [event for event, _ in outcome.refused] == [late]
