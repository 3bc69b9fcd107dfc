"""One schedule from the sale's first unit to the last check."""

import asyncio
import itertools
import time
from collections.abc import Sequence

from tests.faults.check import Broken, Result, alive, check, declared, recovered
from tests.faults.crowd import Answer, Crowd
from tests.faults.schedule import SECONDS, Schedule
from tests.faults.world import History, Sale, World

_number = itertools.count()


class Failed(Exception):
    """A schedule in which a promise was broken, or something that is not to be.

    Its text is all of it: the schedule, the journal in seconds from the first request, and why.
    """

    def __init__(self, schedule: Schedule, journal: Sequence[Answer], why: str) -> None:
        began = min((answer.sent for answer in journal), default=0.0)
        lines = [f"  {answer.line(began)}" for answer in journal]
        super().__init__("\n".join([str(schedule), "JOURNAL:", *lines, f"BROKEN: {why}"]))


async def run(world: World, schedule: Schedule) -> Result:
    """Raises `Failed`."""
    # A sale of its own each time, also when the same seed runs twice in a world.
    item = f"phone-{schedule.seed}-{next(_number)}"
    sale = Sale(item, schedule.max_per_user, schedule.stock, most=schedule.stock)
    crowd = Crowd(
        [api.url for api in world.apis],
        item,
        seed=schedule.seed,
        users=schedule.users,
        max_per_user=schedule.max_per_user,
    )
    world.history = History()
    try:
        await world.redis.set_durability(always=schedule.always)
        await world.apply(sale)
        await recovered(world, crowd, item)
        crowd.journal.clear()
        coming = asyncio.create_task(crowd.run())
        began = time.monotonic()
        try:
            await world.suffer(schedule, sale)
            await asyncio.sleep(max(0.0, began + SECONDS - time.monotonic()))
            await world.redis.whole()
            seconds = await recovered(world, crowd, item)
            await declared(world, sale)
            alive(world)
        finally:
            crowd.stop()
            await coming
        result = await check(world, crowd, sale)
        result.recovery_seconds = seconds
        await world.delete(sale)
    except Broken as broken:
        raise Failed(schedule, crowd.journal, "\n".join(map(str, broken.args))) from None
    except Exception as error:
        raise Failed(schedule, crowd.journal, repr(error)) from error
    return result
