"""Recording batches of events in a real PostgreSQL."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta, timezone
from itertools import chain, pairwise, permutations, zip_longest
from random import Random
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashsale.events import Event
from flashsale.schema import migrate
from flashsale_consumer.recorder import BatchOutcome
from tests.support.consumer import BEYOND_POSTGRESQL, NOON, accepted, changed, held
from tests.support.ledgers import Ledger, migrate_to, opened
from tests.support.recording import check, counted, counts, known_events, record


@dataclass
class Redis:
    """A sale in Redis, and the events of its reservations."""

    allocated: int
    accepted: int = 0
    released: int = 0
    open: list[Event] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def snapshot(self) -> dict[str, int]:
        return {
            "allocated": self.allocated,
            "capacity": self.allocated + self.released,
            "revision": 1,
        }

    def restock(self, units: int) -> None:
        taken = self.accepted - self.released
        self.allocated = max(self.allocated + units, taken)

    def reserve(self, sale_id: str, random: Random) -> None:
        quantity = random.randint(1, 3)
        if quantity <= self.allocated - self.accepted + self.released:
            self.accepted += quantity
            made = random.choice((accepted, held))
            event = made(
                len(self.events),
                reservation_id=str(UUID(int=len(self.events))),
                sale_id=sale_id,
                quantity=quantity,
                **self.snapshot(),
            )
            self.open.append(event)
            self.events.append(event)

    def change(self, random: Random) -> None:
        if self.open:
            event = self.open.pop(random.randrange(len(self.open)))
            states = ("cancelled",) if event.state == "confirmed" else STATES
            after = changed(event, random.choice(states), **self.snapshot())
            self.events.append(after)
            if after.state == "confirmed":
                self.open.append(after)
            else:
                # The units are sold again only after Kafka has the event.
                self.released += event.quantity


STATES = ("confirmed", "cancelled", "expired")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(random=st.randoms(use_true_random=False), allocated=st.integers(0, 12))
async def test_order_and_repetition_of_events_do_not_change_the_result(
    ledger: Ledger, random: Random, allocated: int
) -> None:
    sale_id = f"default/{uuid4()}"
    redis = Redis(allocated)
    for _ in range(random.randrange(60)):
        match random.choice(("reserve", "reserve", "reserve", "change", "change", "restock")):
            case "reserve":
                redis.reserve(sale_id, random)
            case "change":
                redis.change(random)
            case "restock":
                redis.restock(random.randint(-2, 3))
    delivered = redis.events + random.choices(redis.events, k=10) if redis.events else []
    random.shuffle(delivered)
    while delivered:
        size = random.randint(1, 12)
        outcome = await record(ledger, delivered[:size])
        assert (outcome.refused, outcome.voided, outcome.broken) == ([], [], [])
        delivered = delivered[size:]

    if redis.events:
        last = {event.reservation_id: event for event in redis.events}  # versions ascend
        await check(ledger, sale_id, list(last.values()))
        sale = await ledger.sale(sale_id)
        assert (sale.accepted, sale.released) == (redis.accepted, redis.released)
        assert sale.capacity == max(event.capacity for event in redis.events)


def batches(events: Sequence[Event]) -> Iterator[list[Sequence[Event]]]:
    """Every way to divide events into batches, in this order."""
    for cuts in range(2 ** (len(events) - 1)):
        ends = [n for n in range(1, len(events)) if cuts & 1 << n - 1]
        yield [events[one:two] for one, two in pairwise([0, *ends, len(events)])]


async def record_side_by_side(
    ledger: Ledger, sales: Mapping[str, Sequence[Sequence[Event]]]
) -> None:
    """Record the batches of each sale in their order, together with those of the other sales."""
    for together in zip_longest(
        *(
            [
                [msgspec.structs.replace(each, sale_id=sale_id) for each in batch]
                for batch in several
            ]
            for sale_id, several in sales.items()
        ),
        fillvalue=[],
    ):
        outcome = await record(ledger, list(chain.from_iterable(together)))
        assert (outcome.refused, outcome.voided, outcome.broken) == ([], [], [])


@pytest.mark.parametrize(
    "states",
    [
        ("held", "confirmed", "cancelled"),
        ("held", "cancelled"),
        ("held", "expired"),
        ("confirmed", "confirmed", "cancelled"),
    ],
    ids=" ".join,
)
async def test_versions_of_a_reservation_can_come_in_every_order_and_batch(
    ledger: Ledger, states: Sequence[str]
) -> None:
    first = held(quantity=3) if states[0] == "held" else accepted(quantity=3)
    versions = [first]
    for state in states[1:]:
        versions.append(changed(versions[-1], state))
    sales = [
        (f"default/{uuid4()}", max(order, key=lambda event: event.version), several)
        for size in range(1, len(versions) + 1)
        for order in permutations(versions, size)
        for several in batches([*order, order[0]])
    ]
    await record_side_by_side(ledger, {sale_id: several for sale_id, _, several in sales})
    for sale_id, newest, _ in sales:
        await check(ledger, sale_id, [newest])


async def test_an_event_recorded_again_changes_nothing(ledger: Ledger) -> None:
    events = [accepted(number) for number in range(10)]
    assert (await record(ledger, events)).recorded == 10
    before = await ledger.sale(), await ledger.rows()
    assert (await record(ledger, events)).recorded == 0
    assert (await ledger.sale(), await ledger.rows()) == before


async def test_the_rows_of_a_batch_are_known_without_reading_them(ledger: Ledger) -> None:
    hold, order = held(quantity=2), accepted()
    assert known_events(await record(ledger, [hold, order])) == [hold, order]
    confirmed, again = changed(hold, "confirmed", order_ref="o-1"), accepted()
    assert known_events(await record(ledger, [confirmed, again])) == [confirmed, again]
    # One of two events wrote nothing, and it is not known which.
    assert known_events(await record(ledger, [again, accepted()])) == []


async def test_a_row_that_differs_from_its_event_is_read(ledger: Ledger) -> None:
    """A row keeps the user and the quantity of its first event, and the item of its sale."""
    hold, other = held(quantity=2), accepted()
    assert known_events(await record(ledger, [hold])) == [hold]
    for changes in ({"user_id": "another"}, {"quantity": 1}, {"item_id": "another"}):
        hold = msgspec.structs.replace(hold, version=hold.version + 1)
        event = msgspec.structs.replace(hold, **changes)
        other = accepted()
        assert known_events(await record(ledger, [event, other])) == [other]


async def test_a_time_with_another_offset_is_known_in_utc(ledger: Ledger) -> None:
    elsewhere = timezone(timedelta(hours=2))
    event = msgspec.structs.replace(held(), accepted_at=NOON.astimezone(elsewhere))
    assert known_events(await record(ledger, [event])) == [event]


async def test_a_final_state_stays(ledger: Ledger) -> None:
    event = changed(held(quantity=2), "expired")
    await record(ledger, [event])
    for state in ("held", "confirmed", "cancelled"):
        later = msgspec.structs.replace(event, state=state, version=9)
        assert await record(ledger, [later]) == BatchOutcome()
    await check(ledger, event.sale_id, [event])


async def test_a_unit_that_is_sold_again_fits_whatever_arrives_first(ledger: Ledger) -> None:
    one = {"allocated": 1, "capacity": 1}
    first, second = held(0, **one), held(1, allocated=1, capacity=2)
    last = accepted(2, allocated=1, capacity=3)
    events = [first, changed(first, "expired"), second, changed(second, "cancelled"), last]
    sales = {f"default/{uuid4()}": order for order in permutations(events)}
    await record_side_by_side(
        ledger, {sale_id: [[event] for event in order] for sale_id, order in sales.items()}
    )
    for sale_id in sales:
        assert await counts(ledger, sale_id) == (3, 0, 2)


async def test_a_row_of_the_previous_version_can_be_cancelled(database_url: str) -> None:
    async with opened(database_url) as ledger:
        await migrate_to(ledger.pool, 4)
        former = accepted(quantity=2)
        await ledger.pool.execute(
            "INSERT INTO sales (sale_id, item_id, allocated, revision, capacity, accepted) "
            "VALUES ('default/phones', 'phone', 5, 1, 5, 2)"
        )
        await ledger.pool.execute(
            "INSERT INTO reservations (sale_id, reservation_id, user_id, quantity, state, version, "
            "occurred_at) VALUES ('default/phones', $1, 'user', 2, 'accepted', 1, $2)",
            former.reservation_id,
            former.accepted_at,
        )
        await migrate(ledger.pool)
        assert await record(ledger, [former]) == BatchOutcome()
        await check(ledger, former.sale_id, [former])
        cancelled = changed(former, "cancelled")
        assert (await record(ledger, [cancelled])).recorded == 1
        await check(ledger, former.sale_id, [cancelled])


async def test_a_restock_counts_for_its_whole_batch_even_if_the_batch_is_split(
    ledger: Ledger,
) -> None:
    broken = accepted(2, accepted_at=BEYOND_POSTGRESQL)
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
    assert sale.paused, "the events have no settings of the sale"


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
    broken = accepted(accepted_at=BEYOND_POSTGRESQL)
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


async def test_consumers_that_record_versions_in_different_orders_count_them_once(
    ledger: Ledger,
) -> None:
    """Each has a part of the versions, and they share some."""
    last = []
    for attempt in range(10):
        first = [held(number, quantity=2) for number in range(60)]
        second = [changed(event, STATES[number % 3]) for number, event in enumerate(first)]
        await asyncio.gather(
            record(ledger, first),
            record(ledger, second[::-1]),
            record(ledger, [*second[30:], *first[:30]]),
            record(ledger, [*first[::-2], *second[::2]]),
        )
        last += second
        assert await counts(ledger) == counted(last), attempt
    await check(ledger, "default/phones", last)
