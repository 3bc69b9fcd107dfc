"""The recording transaction on a real PostgreSQL."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashsale.events import Event
from flashsale_consumer import recorder
from flashsale_consumer.recorder import LedgerRewound, Log, Outcome
from tests.support.consumer import BEYOND_POSTGRESQL, Book, accepted

TOPIC = "reservations"
FOREVER = Log(0, 1_000_000)


def released(event: Event, **changes: object) -> Event:
    return msgspec.structs.replace(event, state="released", version=event.version + 1, **changes)


async def place(book: Book, logs: dict[int, Log]) -> dict[int, int]:
    async with book.pool.acquire() as connection, connection.transaction():
        return await recorder.place(connection, TOPIC, logs)


async def record(
    book: Book,
    events: Sequence[Event],
    *,
    at: dict[int, int] | None = None,
    to: dict[int, int] | None = None,
) -> Outcome:
    async with book.pool.acquire() as connection, connection.transaction():
        return await recorder.record(connection, TOPIC, at or {}, to or {}, events)


@dataclass
class Redis:
    """A sale as Redis decides it, and the events of what it decided."""

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
            # Sold again only once Kafka has the release.
            self.released += event.quantity


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(random=st.randoms(use_true_random=False), allocated=st.integers(0, 12))
async def test_any_order_and_repetition_gives_what_redis_decided(
    book: Book, random: Random, allocated: int
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
        outcome = await record(book, delivered[:size])
        assert (outcome.refused, outcome.broken) == ([], [])
        delivered = delivered[size:]

    last = {event.reservation_id: event for event in redis.events}  # in the order of versions
    assert await book.rows(sale_id) == {
        key: (event.state, event.version, event.quantity) for key, event in last.items()
    }
    if redis.events:
        sale = await book.sale(sale_id)
        assert sale.accepted == redis.accepted
        assert sale.released == redis.released
        assert sale.capacity == max(event.capacity for event in redis.events)


async def test_an_event_recorded_again_changes_nothing(book: Book) -> None:
    events = [accepted(number) for number in range(10)]
    assert (await record(book, events)).recorded == 10
    before = await book.sale(), await book.rows()
    assert (await record(book, events)).recorded == 0
    assert (await book.sale(), await book.rows()) == before


async def test_a_release_that_arrives_first_is_what_stays(book: Book) -> None:
    event = accepted(quantity=3)
    await record(book, [released(event)])
    await record(book, [event])
    sale = await book.sale()
    assert (sale.accepted, sale.released) == (3, 3)
    assert await book.rows() == {event.reservation_id: ("released", 2, 3)}


async def test_a_released_reservation_stays_released(book: Book) -> None:
    event = released(accepted())
    await record(book, [event])
    later = msgspec.structs.replace(event, state="accepted", version=9)
    assert await record(book, [later]) == Outcome()
    assert await book.rows() == {event.reservation_id: ("released", 2, 1)}


async def test_a_unit_sold_again_may_arrive_before_its_release(book: Book) -> None:
    first = accepted(0, allocated=1, capacity=1)
    again = accepted(1, allocated=1, capacity=2)
    for event in (first, again, released(first, capacity=1)):
        assert (await record(book, [event])).recorded == 1
    sale = await book.sale()
    assert (sale.accepted, sale.released, sale.capacity) == (2, 1, 2)


async def test_what_exceeds_the_capacity_is_refused_and_the_rest_lands(book: Book) -> None:
    oversold = [accepted(number, allocated=3, capacity=3) for number in range(5)]
    other = [accepted(number, sale_id="default/watches", item_id="watch") for number in range(5)]
    outcome = await record(book, [*reversed(oversold), *other])
    assert {event.reservation_id for event, _ in outcome.refused} == {
        event.reservation_id for event in oversold[3:]
    }
    assert outcome.recorded == 8
    sale = await book.sale()
    assert (sale.accepted, sale.capacity) == (3, 3)
    states = {key: row[0] for key, row in (await book.rows()).items()}
    assert states == {
        event.reservation_id: "accepted" if number < 3 else "refused"
        for number, event in enumerate(oversold)
    }
    assert await book.has(*other)


async def test_a_refused_reservation_stays_refused_while_it_does_not_fit(book: Book) -> None:
    event = accepted(allocated=0, capacity=0)
    assert [each for each, _ in (await record(book, [event])).refused] == [event]
    for later in (event, released(event, capacity=0)):
        assert await record(book, [later]) == Outcome()
    assert await book.rows() == {event.reservation_id: ("refused", 1, 1)}
    sale = await book.sale()
    assert (sale.accepted, sale.released) == (0, 0)


async def test_a_refused_reservation_that_is_accepted_again_is_recorded(book: Book) -> None:
    """Redis was rebuilt without it, and its buyer came again with the same key."""
    first, other = accepted(0, allocated=1, capacity=1), accepted(1, allocated=1, capacity=1)
    assert (await record(book, [first])).recorded == 1
    assert [each for each, _ in (await record(book, [other])).refused] == [other]
    again = msgspec.structs.replace(other, capacity=2, revision=2)
    assert (await record(book, [again, first])).recorded == 1
    assert await record(book, [again, other]) == Outcome()
    assert await book.has(first, again)
    sale = await book.sale()
    assert (sale.accepted, sale.capacity) == (2, 2)


async def test_what_a_rebuild_did_not_see_is_refused_when_it_comes(book: Book) -> None:
    known, late = accepted(0, revision=4), accepted(1, revision=4)
    await record(book, [known])
    await book.pool.execute("UPDATE sales SET rebuilt_revision = 5, revision = 5")
    after = accepted(2, revision=5)
    outcome = await record(book, [known, late, after])
    assert (outcome.recorded, [each for each, _ in outcome.refused]) == (1, [late])
    assert "rebuilt without it" in outcome.refused[0][1]
    assert await record(book, [late, known]) == Outcome()
    assert {key: row[0] for key, row in (await book.rows()).items()} == {
        known.reservation_id: "accepted",
        late.reservation_id: "refused",
        after.reservation_id: "accepted",
    }
    assert (await book.sale()).accepted == 2


async def test_a_restock_counts_for_its_whole_batch_even_if_that_is_divided(book: Book) -> None:
    broken = accepted(2, occurred_at=BEYOND_POSTGRESQL)
    events = [accepted(0, capacity=1), accepted(1, capacity=1), broken, accepted(3, capacity=3)]
    outcome = await record(book, events)
    assert (outcome.recorded, outcome.refused) == (3, [])


async def test_a_sale_that_the_ledger_lost_is_added_from_its_newest_event(book: Book) -> None:
    await record(
        book,
        [
            accepted(0, allocated=5, capacity=5, revision=1),
            accepted(1, allocated=9, capacity=9, revision=3),
            accepted(2, allocated=7, capacity=7, revision=2),
        ],
    )
    sale = await book.sale()
    assert (sale.item_id, sale.allocated, sale.capacity) == ("phone", 9, 9)
    assert (sale.revision, sale.accepted) == (3, 3)


async def test_a_known_sale_keeps_what_its_manifest_says(book: Book) -> None:
    await book.pool.execute(
        "INSERT INTO sales (sale_id, item_id, allocated, revision, capacity, max_per_user)"
        " VALUES ('default/phones', 'phone', 10, 7, 10, 2)"
    )
    await record(book, [accepted(allocated=4, capacity=4, revision=5)])
    sale = await book.sale()
    assert (sale.allocated, sale.revision, sale.capacity, sale.max_per_user) == (10, 7, 10, 2)


async def test_what_breaks_on_its_own_data_is_named_and_the_rest_lands(book: Book) -> None:
    good = [accepted(number) for number in range(20)]
    broken = accepted(occurred_at=BEYOND_POSTGRESQL)
    outcome = await record(book, [*good[:7], broken, *good[7:]])
    assert [event for event, _ in outcome.broken] == [broken]
    assert outcome.recorded == 20
    assert await book.has(*good)
    assert broken.reservation_id not in await book.rows()


async def test_two_consumers_that_record_the_same_events_count_them_once(book: Book) -> None:
    sales = [f"default/sale-{number}" for number in range(5)]
    for attempt in range(10):
        events = [
            accepted(attempt * 100 + number, sale_id=sales[number % 5]) for number in range(100)
        ]
        outcomes = await asyncio.gather(
            record(book, events), record(book, events[::-1]), record(book, events[50:])
        )
        assert sum(outcome.recorded for outcome in outcomes) == 100
    assert sum([(await book.sale(sale_id)).accepted for sale_id in sales]) == 1_000


async def test_offsets_move_with_the_events_and_never_back(book: Book) -> None:
    assert await place(book, {0: FOREVER, 1: FOREVER}) == {0: 0, 1: 0}
    at = {0: 0, 1: 0}
    await record(book, [accepted(0)], at=at, to={0: 5})
    await record(book, [accepted(1)], at=at, to={0: 3, 1: 2})  # by one that lost its partitions
    assert await place(book, {0: FOREVER, 1: FOREVER}) == {0: 5, 1: 2}


async def test_a_ledger_that_lost_its_last_transactions_is_noticed(book: Book) -> None:
    await place(book, {0: FOREVER, 1: FOREVER})
    await record(book, [], at={0: 0, 1: 0}, to={0: 10, 1: 10})
    await book.pool.execute("UPDATE kafka_offsets SET next_offset = 7 WHERE partition = 1")
    with pytest.raises(LedgerRewound, match=r"reservations/1 .* up to 10.* up to 7"):
        await record(book, [accepted()], at={0: 10, 1: 10}, to={0: 11})
    await book.pool.execute("DELETE FROM kafka_offsets")
    with pytest.raises(LedgerRewound):
        await record(book, [accepted()], at={0: 10}, to={0: 11})
    assert await book.rows() == {}


async def test_a_stored_offset_beyond_the_end_means_a_new_topic(
    book: Book, caplog: pytest.LogCaptureFixture
) -> None:
    await place(book, {0: FOREVER, 1: FOREVER})
    await record(book, [], at={0: 0, 1: 0}, to={0: 10, 1: 10})
    assert await place(book, {0: Log(0, 9), 1: Log(0, 10)}) == {0: 0, 1: 10}
    assert await place(book, {0: FOREVER, 1: FOREVER}) == {0: 0, 1: 10}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_events_that_kafka_deleted_unread_are_reported(
    book: Book, caplog: pytest.LogCaptureFixture
) -> None:
    await place(book, {0: Log(0, 0)})
    assert await place(book, {0: Log(40, 50)}) == {0: 40}
    assert "deleted 40 events" in caplog.text
