"""Runs one schedule, from declaring its sale to the last check."""

import asyncio
import functools
import itertools
import time
from collections.abc import Sequence

from tests.faults.bystander import Bystander, bystander_of
from tests.faults.check import (
    Broken,
    Result,
    await_ready,
    await_recovery,
    check,
    check_alive,
)
from tests.faults.crowd import Answer, Crowd
from tests.faults.orders import Call, Shop
from tests.faults.redis_shards import RedisShards
from tests.faults.schedule import SECONDS, Schedule
from tests.faults.world import TOKEN, History, Sale, World

_number = itertools.count()


class Failed(Exception):
    """A schedule failed: a promise was broken, or an error occurred.

    The text has the schedule, the journal in seconds since the first request, and the reason.
    """

    def __init__(self, schedule: Schedule, answers: Sequence[Answer | Call], reason: str) -> None:
        journal = sorted(answers, key=lambda each: each.sent)
        began = min((each.sent for each in journal), default=0.0)
        lines = [f"  {answer.line(began)}" for answer in journal]
        super().__init__("\n".join([str(schedule), "JOURNAL:", *lines, f"BROKEN: {reason}"]))


async def run(world: World, schedule: Schedule) -> Result:
    """Run a schedule. Raises Failed if a promise is broken or an error occurs."""
    # Each run has its own sale, even if a seed runs twice in one world.
    item = f"phone-{schedule.seed}-{next(_number)}"
    stock, limit = schedule.stock, schedule.max_per_user
    sale = Sale(item, limit, stock, highest_stock=stock, hold_seconds=schedule.hold_seconds)
    shop = Shop(
        [api.orders_url for api in world.apis],
        TOKEN,
        item,
        seed=schedule.seed,
        deleted=schedule.deletes,
    )
    token_of = functools.cache(world.issuer.token) if schedule.tokens else None
    crowd = Crowd(
        [api.url for api in world.apis],
        item,
        seed=schedule.seed,
        users=schedule.users,
        max_per_user=limit,
        shop=shop if schedule.hold_seconds else None,
        token_of=token_of,
    )
    world.history = History()
    bystander = None
    if isinstance(world.redis, RedisShards):
        bystander = Bystander([api.url for api in world.apis], bystander_of(item), token_of)
    try:
        await world.prepare(schedule, item)
        await world.apply(sale)
        await await_recovery(world, crowd, item)
        if bystander:
            await world.apply(bystander.sale)
            await await_ready(world, bystander.sale)
            watching = asyncio.create_task(bystander.run())
        crowd.journal.clear()
        buying = asyncio.create_task(crowd.run())
        began = time.monotonic()
        try:
            await world.inflict(schedule, sale, crowd)
            await asyncio.sleep(max(0.0, began + SECONDS - time.monotonic()))
            await world.redis.await_health()
            seconds = await await_recovery(world, crowd, item)
            await await_ready(world, sale)
            check_alive(world)
        finally:
            crowd.stop()
            await buying
            await shop.close()
            if bystander:
                bystander.stop()
                await watching
        result = await check(world, crowd, shop, sale)
        result.recovery_seconds = seconds
        if bystander:
            result.bystander = bystander.check(schedule)
            await world.delete(bystander.sale)
        await world.delete(sale)
    except Broken as broken:
        journal: list[Answer | Call] = [*crowd.journal, *shop.journal]
        reasons = [*broken.args, *([bystander] if bystander else [])]
        raise Failed(schedule, journal, "\n".join(map(str, reasons))) from None
    except Exception as error:
        raise Failed(schedule, [*crowd.journal, *shop.journal], repr(error)) from error
    return result
