"""Each recorded change of a reservation is announced. Needs PostgreSQL and Kafka."""

import asyncio

import msgspec
import pytest

from flashsale.schema import migrate
from flashsale_consumer.announcer import Announcer
from tests.support.announced import offsets, until_announced, until_offsets
from tests.support.consumer import Log, accepted, changed, held, running
from tests.support.eventually import until
from tests.support.ledgers import Ledger, migrate_to, opened
from tests.support.recorded import received


async def test_every_recorded_change_of_a_reservation_is_announced(
    ledger: Ledger, log: Log
) -> None:
    hold = held(quantity=2, user_id="ann")
    confirmed = changed(hold, "confirmed")
    async with running(ledger.url, log):
        for number, event in enumerate((hold, confirmed, changed(confirmed, "cancelled")), 1):
            await log.write(event)
            await until_offsets(ledger, number, number)
            view = await until_announced(ledger, log, 1)
            [message] = view.reservations.values()
            assert (message["state"], message["version"]) == (event.state, number)
            assert message["verdict"] == "recorded"
        await until_offsets(ledger, 3, 3)
    key = f"{hold.sale_id}/{hold.reservation_id}"
    assert view.ids == {f"{key}/{version}": 1 for version in (1, 2, 3)}
    assert len(view.partitions[key]) == 1
    assert message == {
        "saleId": "default/phones",
        "itemId": "phone",
        "reservationId": hold.reservation_id,
        "userId": "ann",
        "quantity": 2,
        "state": "cancelled",
        "version": 3,
        "verdict": "recorded",
        "orderRef": "order-1",
        "acceptedAt": "2026-11-27T12:00:00Z",
        "expiresAt": "2026-11-27T12:10:00Z",
        "confirmedAt": "2026-11-27T12:10:00Z",
        "recordedAt": message["recordedAt"],
    }


async def test_a_refused_reservation_is_announced_as_the_ledger_has_it(
    ledger: Ledger, log: Log
) -> None:
    oversold = [accepted(number, allocated=2, capacity=2) for number in range(3)]
    async with running(ledger.url, log):
        await log.write(*oversold, partition=0)
        view = await until_announced(ledger, log, 3)
        refused = view.reservations[f"default/phones/{oversold[2].reservation_id}"]
        assert (refused["verdict"], refused["state"]) == ("refused", "refused")
        assert [each["verdict"] for each in view.reservations.values()].count("recorded") == 2
        # More units are found, and the buyer's request is repeated. The version is the same.
        again = msgspec.structs.replace(oversold[2], allocated=3, capacity=3, revision=2)
        await log.write(again)
        await until_offsets(ledger, 4, 4)
        view = await until_announced(ledger, log, 3)
    identity = f"default/phones/{again.reservation_id}/1"
    assert view.reservations[identity[:-2]]["verdict"] == "recorded"
    assert set(view.ids) >= {identity, f"{identity}/refused"}


async def test_a_change_that_a_rebuild_did_not_find_is_not_announced(
    ledger: Ledger, log: Log
) -> None:
    hold = held()
    async with running(ledger.url, log):
        await log.write(hold)
        await until_announced(ledger, log, 1)
        await ledger.pool.execute("UPDATE sales SET rebuilt_revision = 2, revision = 2")
        await log.write(changed(hold, "confirmed"), held(1))
        view = await until_announced(ledger, log, 2)
        await until_offsets(ledger, 3, 3)
    assert [each["state"] for each in view.reservations.values()].count("refused") == 1
    assert view.reservations[f"default/phones/{hold.reservation_id}"]["state"] == "held"


async def test_units_that_a_rebuild_lost_are_announced_on_the_sale(
    ledger: Ledger, log: Log
) -> None:
    async with running(ledger.url, log):
        await log.write(accepted())
        await until_announced(ledger, log, 1)
        for revision, lost in ((7, 3), (9, 5)):
            await ledger.pool.execute(
                "UPDATE sales SET rebuilt_revision = $1, lost = $2", revision, lost
            )

            async def announced() -> bool:
                found: int = await ledger.pool.fetchval("SELECT announced_revision FROM sales")
                return found == revision  # noqa: B023 - of this step

            await until(announced, "the rebuild is announced")
    view = await received(log.bootstrap, log.engine)
    assert view.rebuilds == [
        {"saleId": "default/phones", "itemId": "phone", "revision": revision, "lost": lost}
        for revision, lost in ((7, 3), (9, 5))
    ]
    assert view.ids["default/phones/rebuilt/9"] == 1


async def test_a_restarted_consumer_announces_what_was_recorded_before(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first consumer is like one of the previous version, which announces nothing."""
    first, second = ([accepted(number) for number in range(500)] for _ in range(2))

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    await log.write(*first)
    with monkeypatch.context() as patch:
        patch.setattr(Announcer, "run", never)
        async with running(ledger.url, log):
            await ledger.until_has(*first)
    assert await offsets(ledger) == (500, 0)
    async with running(ledger.url, log):
        await log.write(*second)
        await until_announced(ledger, log, 1_000)
        await until_offsets(ledger, 1_000, 1_000)


async def test_reservations_of_before_the_first_announcing_version_are_not_announced(
    database_url: str, log: Log
) -> None:
    former, new = accepted(), accepted(1)
    async with opened(database_url) as ledger:
        await migrate_to(ledger.pool, 5)
        await log.write(former, partition=0)
        await ledger.pool.execute("INSERT INTO kafka_offsets VALUES ($1, 0, 1)", log.topic)
        await migrate(ledger.pool)
        # A consumer of the previous version, which is still running, begins with a partition.
        await log.write(accepted(2), partition=1)
        await ledger.pool.execute(
            "INSERT INTO kafka_offsets (topic, partition, next_offset) VALUES ($1, 1, 0)",
            log.topic,
        )
        async with running(ledger.url, log):
            await log.write(new, partition=0)
            view = await until_announced(ledger, log, 2)
    assert f"{former.sale_id}/{former.reservation_id}" not in view.reservations


async def test_two_consumers_announce_all_that_they_record(ledger: Ledger, log: Log) -> None:
    sold = [accepted(number) for number in range(3_000)]
    async with running(ledger.url, log) as one:
        await log.write(*sold[:1_000])
        async with running(ledger.url, log) as other:
            await log.write(*sold[1_000:2_000])
            await until(lambda: one.partitions() == other.partitions() == 6)
            await log.write(*sold[2_000:])
            await until_announced(ledger, log, len(sold))
            await until_offsets(ledger, 3_000, 3_000)
