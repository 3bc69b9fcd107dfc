"""Recording batches of events in a real PostgreSQL."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from uuid import UUID, uuid4

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashsale.events import Event
from flashsale_consumer import recorder
from flashsale_consumer.clients import transaction
from flashsale_consumer.recorder import BatchOutcome
from tests.support.consumer import BEYOND_POSTGRESQL, Ledger, accepted


def released(event: Event, **changes: object) -> Event:
    return msgspec.structs.replace(event, state="released", version=event.version + 1, **changes)


async def record(ledger: Ledger, events: Sequence[Event]) -> BatchOutcome:
    async with transaction(ledger.pool) as connection:
        return await recorder.record(connection, "reservations", {}, {}, events)


@dataclass
class Redis:
    """A sale in Redis, and the events of its reservations and releases."""

    allocated: int
    accepted: int = 0
    released: int = 0
    held: list[Event] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def snapshot(self) -> dict[str, int]:
        return {
            "allocated": self.allocated,
            "capacity": self.allocated + self.released,
            "revision": 1,
        }

    def restock(self, units: int) -> None:
        held = self.accepted - self.released
        self.allocated = max(self.allocated + units, held)

    def reserve(self, sale_id: str, random: Random) -> None:
        quantity = random.randint(1, 3)
        if quantity <= self.allocated - self.accepted + self.released:
            self.accepted += quantity
            event = accepted(
                len(self.events),
                reservation_id=str(UUID(int=len(self.events))),
                sale_id=sale_id,
                quantity=quantity,
                **self.snapshot(),
            )
            self.held.append(event)
            self.events.append(event)

    def release(self, random: Random) -> None:
        if self.held:
            event = self.held.pop(random.randrange(len(self.held)))
            self.events.append(released(event, **self.snapshot()))
            # The units are sold again only after Kafka has the release.
            self.released += event.quantity


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(random=st.randoms(use_true_random=False), allocated=st.integers(0, 12))
async def test_order_and_repetition_of_events_do_not_change_the_result(
    ledger: Ledger, random: Random, allocated: int
) -> None:
    sale_id = f"default/{uuid4()}"
    redis = Redis(allocated)
    for _ in range(random.randrange(40)):
        match random.choice(("reserve", "reserve", "reserve", "release", "restock")):
            case "reserve":
                redis.reserve(sale_id, random)
            case "release":
                redis.release(random)
            case "restock":
                redis.restock(random.randint(-2, 3))
    delivered = redis.events + random.choices(redis.events, k=10) if redis.events else []
    random.shuffle(delivered)
    while delivered:
        size = random.randint(1, 12)
        outcome = await record(ledger, delivered[:size])
        assert (outcome.refused, outcome.broken) == ([], [])
        delivered = delivered[size:]

    last = {event.reservation_id: event for event in redis.events}  # versions ascend
    assert await ledger.rows(sale_id) == {
        key: (event.state, event.version, event.quantity) for key, event in last.items()
    }
    if redis.events:
        sale = await ledger.sale(sale_id)
        assert sale.accepted == redis.accepted
        assert sale.released == redis.released
        assert sale.capacity == max(event.capacity for event in redis.events)


async def test_an_event_recorded_again_changes_nothing(ledger: Ledger) -> None:
    events = [accepted(number) for number in range(10)]
    assert (await record(ledger, events)).recorded == 10
    before = await ledger.sale(), await ledger.rows()
    assert (await record(ledger, events)).recorded == 0
    assert (await ledger.sale(), await ledger.rows()) == before


async def test_a_release_that_arrives_before_its_reservation_stays(ledger: Ledger) -> None:
    event = accepted(quantity=3)
    await record(ledger, [released(event)])
    await record(ledger, [event])
    sale = await ledger.sale()
    assert (sale.accepted, sale.released) == (3, 3)
    assert await ledger.rows() == {event.reservation_id: ("released", 2, 3)}


async def test_a_released_reservation_stays_released(ledger: Ledger) -> None:
    event = released(accepted())
    await record(ledger, [event])
    later = msgspec.structs.replace(event, state="accepted", version=9)
    assert await record(ledger, [later]) == BatchOutcome()
    assert await ledger.rows() == {event.reservation_id: ("released", 2, 1)}


async def test_a_unit_sold_again_may_arrive_before_its_release(ledger: Ledger) -> None:
    first = accepted(0, allocated=1, capacity=1)
    again = accepted(1, allocated=1, capacity=2)
    for event in (first, again, released(first, capacity=1)):
        assert (await record(ledger, [event])).recorded == 1
    sale = await ledger.sale()
    assert (sale.accepted, sale.released, sale.capacity) == (2, 1, 2)


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
        event.reservation_id: "accepted" if number < 3 else "refused"
        for number, event in enumerate(oversold)
    }
    assert await ledger.has(*other)


async def test_a_refused_reservation_stays_refused_while_it_does_not_fit(ledger: Ledger) -> None:
    event = accepted(allocated=0, capacity=0)
    assert [each for each, _ in (await record(ledger, [event])).refused] == [event]
    for later in (event, released(event, capacity=0)):
        assert await record(ledger, [later]) == BatchOutcome()
    assert await ledger.rows() == {event.reservation_id: ("refused", 1, 1)}
    sale = await ledger.sale()
    assert (sale.accepted, sale.released) == (0, 0)


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


async def test_a_late_event_from_before_the_last_rebuild_is_refused(ledger: Ledger) -> None:
    known, late = accepted(0, revision=4), accepted(1, revision=4)
    await record(ledger, [known])
    await ledger.pool.execute("UPDATE sales SET rebuilt_revision = 5, revision = 5")
    after = accepted(2, revision=5)
    outcome = await record(ledger, [known, late, after])
    assert (outcome.recorded, [each for each, _ in outcome.refused]) == (1, [late])
    assert "rebuilt without it" in outcome.refused[0][1]
    assert await record(ledger, [late, known]) == BatchOutcome()
    assert {key: row[0] for key, row in (await ledger.rows()).items()} == {
        known.reservation_id: "accepted",
        late.reservation_id: "refused",
        after.reservation_id: "accepted",
    }
    assert (await ledger.sale()).accepted == 2


async def test_a_restock_counts_for_its_whole_batch_even_if_the_batch_is_split(
    ledger: Ledger,
) -> None:
    broken = accepted(2, occurred_at=BEYOND_POSTGRESQL)
    events = [accepted(0, capacity=1), accepted(1, capacity=1), broken, accepted(3, capacity=3)]
    outcome = await record(ledger, events)
    assert (outcome.recorded, outcome.refused) == (3, [])


async def test_a_sale_that_the_ledger_lost_is_added_from_its_newest_event(ledger: Ledger) -> None:
    await record(
        ledger,
        [
            accepted(0, allocated=5, capacity=5, revision=1),
            accepted(1, allocated=9, capacity=9, revision=3),
            accepted(2, allocated=7, capacity=7, revision=2),
        ],
    )
    sale = await ledger.sale()
    assert (sale.item_id, sale.allocated, sale.capacity) == ("phone", 9, 9)
    assert (sale.revision, sale.accepted) == (3, 3)


async def test_an_event_does_not_change_the_settings_of_a_known_sale(ledger: Ledger) -> None:
    await ledger.pool.execute(
        "INSERT INTO sales (sale_id, item_id, allocated, revision, capacity, max_per_user)"
        " VALUES ('default/phones', 'phone', 10, 7, 10, 2)"
    )
    await record(ledger, [accepted(allocated=4, capacity=4, revision=5)])
    sale = await ledger.sale()
    assert (sale.allocated, sale.revision, sale.capacity, sale.max_per_user) == (10, 7, 10, 2)


async def test_an_event_that_postgresql_rejects_is_reported_and_the_others_recorded(
    ledger: Ledger,
) -> None:
    good = [accepted(number) for number in range(20)]
    broken = accepted(occurred_at=BEYOND_POSTGRESQL)
    outcome = await record(ledger, [*good[:7], broken, *good[7:]])
    assert [event for event, _ in outcome.broken] == [broken]
    assert outcome.recorded == 20
    assert await ledger.has(*good)
    assert broken.reservation_id not in await ledger.rows()


async def test_consumers_that_record_the_same_events_count_them_once(ledger: Ledger) -> None:
    sales = [f"default/sale-{number}" for number in range(5)]
    for attempt in range(10):
        events = [
            accepted(attempt * 100 + number, sale_id=sales[number % 5]) for number in range(100)
        ]
        outcomes = await asyncio.gather(
            record(ledger, events), record(ledger, events[::-1]), record(ledger, events[50:])
        )
        assert sum(outcome.recorded for outcome in outcomes) == 100
    assert sum([(await ledger.sale(sale_id)).accepted for sale_id in sales]) == 1_000
