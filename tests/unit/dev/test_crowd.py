"""The crowd's client, on an API that stalls and drops connections."""

import asyncio

import pytest

from dev.crowd import Client, percentile, stampede
from dev.journal import Attempt
from tests.support.eventually import until
from tests.support.fake_api import STALL_SECONDS, FakeApi

ATTEMPT = Attempt("user", {"userId": "user", "itemId": "item", "quantity": 1})


async def test_a_broken_connection_is_an_entry_without_status_and_is_opened_again() -> None:
    async with FakeApi(dropped=2).serve() as api:
        client = Client(api.url)
        entries = [await client.send(ATTEMPT) for _ in range(3)]
        client.close()
    assert [entry.status for entry in entries] == [202, 0, 202]
    assert [entry.outcome for entry in entries] == ["202", "no answer", "202"]


async def test_a_buyer_who_stops_waiting_does_not_get_that_answer_later() -> None:
    async with FakeApi(stalled=1).serve() as api:
        client = Client(api.url)
        sending = asyncio.create_task(client.send(ATTEMPT))
        await until(lambda: api.bodies, "the request has arrived")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sending, STALL_SECONDS / 10)
        again = await client.send(ATTEMPT)
        client.close()
    assert again.answer == {"reservationId": "2"}


async def test_an_api_that_is_down_gives_no_answer() -> None:
    api = FakeApi()
    async with api.serve():
        pass
    entry = await Client(api.url).send(ATTEMPT)
    assert (entry.status, entry.answer) == (0, {})


async def test_only_attempts_with_a_key_are_sent_again() -> None:
    keyed = Attempt(ATTEMPT.user_id, ATTEMPT.body, "key")
    for attempt, statuses in ((keyed, [0, 202]), (ATTEMPT, [0])):
        async with FakeApi(dropped=1).serve() as api:
            journal = await stampede([api.url], [attempt], connections=1, tries=3)
        assert [entry.status for entry in journal.entries] == statuses


@pytest.mark.parametrize(
    ("percent", "value"), [(50, 50.0), (95, 95.0), (99, 99.0), (100, 100.0), (1, 1.0)]
)
def test_a_percentile_is_one_of_the_values(percent: float, value: float) -> None:
    assert percentile((float(number) for number in range(100, 0, -1)), percent) == value


def test_the_percentile_of_no_values_is_zero() -> None:
    assert percentile([], 95) == 0.0
