"""A process that runs schedules one after the other, on servers of its own."""

import asyncio
import multiprocessing
import shutil
import signal
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from dev.stack.errors import StackError
from tests.faults.run import Failed, run
from tests.faults.schedule import Redis, Schedule
from tests.faults.table import Outcome
from tests.faults.world import World, opened


class Worker:
    """The process. It sends one Outcome per schedule, or a StackError if a server fails to start.

    It keeps its servers in `folder` until a schedule needs another kind of Redis or has failed. A
    failure is saved next to that folder.
    """

    def __init__(self, folder: Path) -> None:
        self.redis: Redis | None = None
        """The kind of Redis of the last schedule."""
        self.tokens = False
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, folder), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, made: Schedule) -> None:
        """Let the process run a schedule. It must be free."""
        self.redis, self.tokens = made.redis, made.tokens
        self.connection.send(made)

    def end(self) -> None:
        """End the process with its servers. A free one ends gracefully."""
        self.connection.close()
        self._process.join(5)
        self._process.terminate()
        self._process.join()


def _work(connection: Connection, folder: Path) -> None:
    # Ctrl-C is for the process that prints the table.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        asyncio.run(_all(connection, folder))
    except (EOFError, BrokenPipeError):
        pass  # no more schedules
    except StackError as error:
        connection.send(error)


async def _all(connection: Connection, folder: Path) -> None:
    made: Schedule = await asyncio.to_thread(connection.recv)
    while True:
        kind = made.redis
        async with opened(folder, kind) as world:
            outcome: Outcome | None = None
            while made.redis is kind and not (outcome and outcome.failure):
                outcome = await _one(world, made)
                connection.send(outcome)
                made = await asyncio.to_thread(connection.recv)


async def _one(world: World, made: Schedule) -> Outcome:
    began = time.monotonic()
    outcome = Outcome.of(made)
    try:
        outcome.result = await run(world, made)
    except Failed as failed:
        outcome.failure = str(failed)
        if failed.__cause__ is not None:
            outcome.failure += "\n" + "".join(traceback.format_exception(failed.__cause__))
        _keep(world, outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def _keep(world: World, outcome: Outcome) -> None:
    """Save the failure with the logs of all processes."""
    kept = world.folder.parent / f"seed-{outcome.seed}-{outcome.redis}"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "failed.txt").write_text(f"{outcome.failure}\n")
    for log in world.folder.rglob("*.log"):
        # Kafka's partitions are files of this name, too.
        if not log.stem.isdigit():
            shutil.copy(log, kept / f"{log.parent.name}.log")
    outcome.failure += f"\nSaved with the logs in {kept}"
