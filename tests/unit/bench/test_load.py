"""The benchmark counts every request, from the time at which it was due."""

from pathlib import Path

import msgspec

from bench.load import Plan, Run, Tally
from tests.support.fake_api import STALL_SECONDS, FakeApi


async def measure(api: FakeApi, *, connections: int, rate: float | None = None) -> Tally:
    async with api.serve():
        plan = Plan(
            urls=[api.url],
            items=["a", "b"],
            users="u",
            seconds=1.0 if rate else 0.3,
            connections=connections,
            rate=rate,
        )
        return await Run(plan).run()


async def test_requests_that_wait_for_a_stalled_answer_count_from_when_they_were_due() -> None:
    api = FakeApi(stalled=10)
    tally = await measure(api, connections=1, rate=200.0)

    assert tally.requests == len(api.bodies) == 200
    # A hundred requests were due during the stall. Half of them waited for half of it or longer.
    assert tally.p95 >= STALL_SECONDS * 1000 * 0.5


async def test_a_closed_loop_counts_each_answer_and_sends_each_buyer_once() -> None:
    api = FakeApi()
    tally = await measure(api, connections=4)

    assert 0 < tally.requests <= len(api.bodies)
    assert sum(tally.statuses.values()) == len(api.bodies)
    assert len(set(api.bodies)) == len(api.bodies)
    assert {b'"itemId":"a"' in body for body in api.bodies} == {True, False}


async def test_a_crowd_confirms_each_reservation_of_a_journal_once(tmp_path: Path) -> None:
    api = FakeApi()
    journal = tmp_path / "journal.json"
    journal.write_bytes(msgspec.json.encode([(f"id-{number}", 0.0) for number in range(60)]))
    async with api.serve():
        plan = Plan(
            urls=[api.url],
            items=["a"],
            users="u",
            seconds=0.5,
            connections=4,
            rate=100.0,
            confirm=str(journal),
            token="t",
        )
        tally = await Run(plan).run()

    assert tally.requests == 50
    paths = {b"/sales/a/reservations/id-%d/confirm" % number for number in range(50)}
    assert (set(api.paths), len(api.paths)) == (paths, 50)
    assert len({msgspec.json.decode(body)["orderRef"] for body in api.bodies}) == 50
