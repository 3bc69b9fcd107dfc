"""`python -m tests.faults.losses`: measure the losses and the downtime per failure of Redis."""

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

import asyncpg

from dev.progress import ending_quietly
from dev.verdict import quiet
from flashsale import redis_client
from flashsale.keys import ItemKeys
from tests.faults.check import await_ready, await_recovery
from tests.faults.crowd import Crowd
from tests.faults.world import Sale, World, opened
from tests.support.paths import ROOT

FOLDER: Final = ROOT / ".local" / "faults" / "losses"
BUYING_SECONDS: Final = 4.0
LAG_SECONDS: Final = 1.0

Fails = Callable[[World], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Case:
    """A failure of Redis.

    With `apis_too`, both APIs are killed at the same moment. With `without_kafka`, Kafka is down
    during the seconds before.
    """

    name: str
    always: bool
    fails: Fails
    apis_too: bool = False
    without_kafka: bool = False

    @property
    def others(self) -> str:
        return ("killed too" if self.apis_too else "alive") + (
            ", Kafka away" if self.without_kafka else ""
        )


@dataclass(frozen=True, slots=True)
class Loss:
    """Reservations that were answered 202 before the failure.

    Redis has lost the `forgotten` ones. The `lost` ones are not in the ledger either, after the
    rebuild. `closed_seconds` count from the failure until both APIs sell again.
    """

    promised: int
    forgotten: int
    lost: int
    closed_seconds: float


_PROMOTED: Final = f"a promoted replica that lags {LAG_SECONDS:.0f} s"
_FAILURES: Final[tuple[tuple[str, bool, Fails], ...]] = (
    ("`always`, power cut", True, lambda world: world.redis.lose_power()),
    ("`everysec`, kill -9 of the process", False, lambda world: world.redis.kill(0.0)),
    ("`everysec`, power cut", False, lambda world: world.redis.lose_power()),
    (_PROMOTED, True, lambda world: world.redis.promote()),
)
CASES: Final = tuple(
    Case(name, always, fails, *others)
    for name, always, fails in _FAILURES
    for others in ((False, False), (True, False), (False, True), (True, True))
)
_number = itertools.count()


async def lose(world: World, case: Case) -> Loss:
    """Let Redis fail while a crowd buys, and count the losses."""
    item = f"loss-{next(_number)}"
    sale = Sale(item, max_per_user=5, stock=100_000, highest_stock=100_000)
    crowd = Crowd(
        [api.url for api in world.apis], item, seed=next(_number), users=5_000, max_per_user=5
    )
    await world.redis.set_durability(always=case.always)
    await world.apply(sale)
    await await_recovery(world, crowd, item)
    buying = asyncio.create_task(crowd.run())
    await asyncio.sleep(BUYING_SECONDS / 2)
    if case.without_kafka:
        await asyncio.to_thread(world.kafka.pause)
    await asyncio.sleep(BUYING_SECONDS / 2)
    if case.name == _PROMOTED:
        await world.redis.leave_behind(LAG_SECONDS)
    killed = world.apis if case.apis_too else ()
    kills = (asyncio.to_thread(api.kill) for api in killed)
    began, until = time.monotonic(), time.time()
    await asyncio.gather(case.fails(world), *kills)
    kept = await _kept(world, item)
    for api in killed:
        await asyncio.to_thread(api.start)
    if case.without_kafka:
        await asyncio.to_thread(world.kafka.resume)
    await world.redis.await_health()
    await await_recovery(world, crowd, item)
    closed = time.monotonic() - began
    crowd.stop()
    await buying
    await await_ready(world, sale)
    await quiet(world.addresses, [item])
    rows = await _rows(world, sale)
    promised = {answer.reservation_id for answer in crowd.journal if answer.status == 202}
    before = {
        answer.reservation_id
        for answer in crowd.journal
        if answer.status == 202 and answer.received <= until
    }
    await world.delete(sale)
    return Loss(len(before), len(before - kept), len(promised - rows), closed)


async def _kept(world: World, item: str) -> set[str]:
    """Return the reservation ids that the restarted Redis has before its rebuild."""
    client = redis_client.connect(world.addresses.redis_url)
    try:
        return {key async for key, _ in client.hscan_iter(ItemKeys.of(item).reservations)}
    finally:
        await client.aclose()


async def _rows(world: World, sale: Sale) -> set[str]:
    connection = await asyncpg.connect(world.postgres.url)
    try:
        found = await connection.fetch(
            "SELECT reservation_id FROM reservations WHERE sale_id = $1 AND state <> 'refused'",
            sale.sale_id,
        )
    finally:
        await connection.close()
    return {str(row["reservation_id"]) for row in found}


def main() -> int:
    """Print the table of docs/operations.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.losses", description=__doc__)
    parser.add_argument(
        "--trials", type=int, default=5, help="the number of trials per failure (default: 5)"
    )
    trials = parser.parse_args().trials
    if trials < 1:
        parser.error("--trials: must be at least 1")
    asyncio.run(_measure(trials))
    return 0


async def _measure(trials: int) -> None:
    lines = []
    async with opened(FOLDER) as world:
        for case in CASES:
            losses = []
            for trial in range(trials):
                losses.append(await lose(world, case))
                print(f"{case.name}, APIs {case.others}, {trial + 1}: {losses[-1]}", flush=True)
            lines.append(
                f"| {case.name} | {case.others} | {_span(loss.promised for loss in losses)} "
                f"| {_span(loss.forgotten for loss in losses)} | "
                f"{_span(loss.lost for loss in losses)} | "
                f"{_span(round(loss.closed_seconds) for loss in losses)} s |"
            )
    print(
        "\n| failure of Redis | APIs | answered 202 before | forgotten by Redis | lost | downtime |"
    )
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


def _span(numbers: Iterable[int]) -> str:
    values = sorted(numbers)
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
