"""Work that is postponed to later turns of the event loop."""

import asyncio

from flashsale_api.turns import Turns


async def test_work_behind_a_failure_is_done() -> None:
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    turns, done = Turns(), asyncio.Event()

    def fail() -> None:
        raise ValueError

    turns.postpone(fail)
    turns.postpone(done.set)
    async with asyncio.timeout(60):
        await done.wait()
