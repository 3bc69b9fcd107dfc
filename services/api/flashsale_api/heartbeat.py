"""The pod's heartbeat in Redis, and the gauges of the servers that the pod depends on."""

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from flashsale import heartbeat
from flashsale.errors import RedisUnavailable
from flashsale.inventory import Inventory
from flashsale.reservations import Outcome
from flashsale_api.calls import Failure
from flashsale_api.engine import Engine
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher

log = logging.getLogger(__name__)

T = TypeVar("T")


class Pulse:
    """Knows whether the server of an item has a valid heartbeat of this pod, and took its report.

    A rebuild takes a pod without one for dead, and does not wait for its events. Such a pod
    therefore accepts nothing and answers no order, although it may still reach the server.
    """

    def __init__(self, inventory: Inventory) -> None:
        """`inventory` is that of the requests, which knows the servers of items."""
        self._inventory = inventory
        self._valid_until: dict[str, float] = {}
        self._answering: Collection[str] = ()
        self._refused: Collection[str] = ()
        self.unheard = False
        """Whether a request was refused because its server did not answer the last heartbeat."""

    def answered(self, names: Collection[str]) -> None:
        """Notes which servers answered when the pod last tried to send a heartbeat."""
        self._answering = names

    def sent(self, sent: heartbeat.Sent, sampled: float) -> None:
        """Notes who took a heartbeat. `sampled` is the loop's time of its sample."""
        self._valid_until |= dict.fromkeys(sent.servers, sampled + heartbeat.EXPIRY_SECONDS)
        self._refused = sent.refused

    @property
    def begun(self) -> bool:
        """Whether a server has ever taken a heartbeat."""
        return bool(self._valid_until)

    def refusal(self, item_id: str) -> Outcome | Failure | None:
        """Returns the outcome of an item's requests, or None if the pod may accept them."""
        if item_id in self._refused:
            return Failure.REDIS_UNAVAILABLE
        name = self._inventory.node_of(item_id)
        if asyncio.get_running_loop().time() < self._valid_until.get(name, 0.0):
            return None
        if name in self._answering:
            return Outcome.FENCED
        if not self.unheard:
            # The heartbeat may know a new primary. A refused request gets no `MOVED` that names it.
            self._inventory.nodes.look_soon()
        self.unheard = True
        return Failure.REDIS_UNAVAILABLE


class Heartbeat:
    """Sends the heartbeat of a pod from a thread of its own.

    With thousands of busy connections, a turn of the pod's event loop can take most of a second. A
    heartbeat needs several turns for its round trips, so it makes them in another loop. It waits
    for only one turn of the pod's loop, which counts the events.
    """

    def __init__(  # noqa: PLR0913 - the parts that a heartbeat reports
        self,
        pod_id: str,
        inventory: Inventory,
        *,
        called_items: Callable[[], Iterable[str]],
        publisher: Publisher,
        engine: Engine,
        metrics: Metrics,
        pulse: Pulse,
    ) -> None:
        """`inventory` has connections that no request uses. `run` closes them."""
        self._pod_id = pod_id
        self._inventory = inventory
        self._called_items = called_items
        self._publisher = publisher
        self._engine = engine
        self._metrics = metrics
        self._pulse = pulse
        self._logged: set[str] = set()
        """The servers that take no heartbeat, while others do, and whose cause is logged."""
        self._thread: _LoopThread | None = None
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Writes the heartbeat and the gauges every `INTERVAL_SECONDS` until it is cancelled."""
        self._thread = _LoopThread()
        try:
            await self._thread.run(self._beat_forever(asyncio.get_running_loop()))
        finally:
            await self._thread.close(self._inventory.redis.aclose())

    async def stop(self) -> None:
        """Removes the heartbeat of a pod that has nothing left to publish. No beat follows."""
        if self._thread is not None:
            await self._thread.run(self._retire(asyncio.get_running_loop()))

    async def _retire(self, main: asyncio.AbstractEventLoop) -> None:
        await self._turn.acquire()
        # A report that cannot be removed stays. A rebuild would wait for an older count.
        await self._beat(main)
        redis, engine = self._inventory.redis, self._inventory.engine
        await heartbeat.retire(redis, self._pod_id, await self._inventory.index.items(), engine)

    async def _beat_forever(self, main: asyncio.AbstractEventLoop) -> None:
        loop = asyncio.get_running_loop()
        failing = False
        while True:
            begun = loop.time()
            try:
                async with self._turn:
                    await self._beat(main)
                if failing:
                    log.info("Redis takes heartbeats again")
                failing = False
            except RedisUnavailable as error:
                self._metrics.redis_up.set(0)
                await _called_in(main, self._measure)
                if not failing:
                    log.warning("cannot send a heartbeat: %s", error)
                failing = True
            await asyncio.sleep(begun + heartbeat.INTERVAL_SECONDS - loop.time())

    async def _beat(self, main: asyncio.AbstractEventLoop) -> None:
        """Writes one heartbeat, in two round trips. Raises `RedisUnavailable`."""
        begun = asyncio.get_running_loop().time()
        if self._pulse.unheard:
            # The pod's loop may know a new primary, which no heartbeat would meet.
            self._inventory.nodes.look_soon()
            self._pulse.unheard = False
        # Read the clocks first, because a heartbeat must not claim to be younger than its count.
        sampled, engine_id = await asyncio.gather(
            self._inventory.clocks(), self._inventory.index.engine_id(), return_exceptions=True
        )
        if isinstance(sampled, BaseException):
            self._pulse.answered(())
            raise sampled
        self._pulse.answered(sampled)
        if isinstance(engine_id, BaseException) and (
            self._inventory.nodes.single or not isinstance(engine_id, RedisUnavailable)
        ):
            raise engine_id
        # If only the node of the id is away, the pod keeps the id that it knows.
        known = None if isinstance(engine_id, BaseException) else engine_id
        # The pod's loop counts, because a thread could look between a reply and its events.
        counts = await _called_in(main, lambda: self._count(known))
        redis, engine = self._inventory.redis, self._inventory.engine
        sent = await heartbeat.beat(redis, self._pod_id, counts, sampled, engine)
        self._pulse.sent(sent, begun)
        away = {node.name for node in await self._inventory.nodes.all()} - sent.servers
        self._metrics.redis_up.set(not away)
        self._log(away, sent.servers)

    def _log(self, away: set[str], heard: set[str]) -> None:
        """Logs once why a server takes no heartbeat. The pod refuses the requests of its sales."""
        failures = self._inventory.nodes.failures
        self._logged &= away
        for name in sorted(away - self._logged):
            if why := failures.get(name):
                log.warning("cannot send a heartbeat to %s: %s", name, why)
                self._logged.add(name)
        for name in heard:
            failures.pop(name, None)

    def _measure(self) -> None:
        self._metrics.unacknowledged.set(self._publisher.unacknowledged)
        self._metrics.kafka_up.set(self._publisher.connected)

    def _count(self, engine_id: str | None) -> dict[str, int]:
        """Returns the unacknowledged events of each item that may have some."""
        self._measure()
        if engine_id is not None:
            self._engine.found_in_redis(engine_id)
        counts = dict.fromkeys(self._called_items(), 0)
        return counts | self._publisher.unacknowledged_by_item()


class _LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` in the thread, and cancels it if the caller is cancelled."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Ends the thread, after its tasks and then `last`."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)
            await last

        await self.run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _called_in(loop: asyncio.AbstractEventLoop, function: Callable[[], T]) -> T:
    """Calls a function in the loop of another thread."""
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(function())
        except Exception as error:  # noqa: BLE001 - the caller handles every error
            result.set_exception(error)

    loop.call_soon_threadsafe(call)
    return await asyncio.wrap_future(result)
