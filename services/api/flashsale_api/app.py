"""The composition root: makes the clients and starts the background tasks."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flashsale import redis_client, redis_facts, requirements
from flashsale.errors import RedisUnavailable, UnmetRequirement
from flashsale.inventory import Inventory
from flashsale.nodes import Nodes
from flashsale.outbox import Outbox
from flashsale.requirements import Checks
from flashsale_api import authentication
from flashsale_api.batcher import Batcher
from flashsale_api.engine import Engine
from flashsale_api.expiry import Expiry
from flashsale_api.heartbeat import Heartbeat, Pulse
from flashsale_api.metrics import Metrics
from flashsale_api.orders import OrderPort, Orders
from flashsale_api.page import PAGE_PATH, Page
from flashsale_api.publisher import Publisher
from flashsale_api.reserve import RESERVE_PATH, Reserve
from flashsale_api.responses import Handler, not_allowed
from flashsale_api.rest import rest_app
from flashsale_api.sales import SALES_PATH, Sales
from flashsale_api.settings import Settings
from flashsale_api.sweeper import Sweeper
from flashsale_api.transitions import Transitions

if TYPE_CHECKING:
    from flashsale_api.servers import OrderServer
    from flashsale_api.spans import Spans

log = logging.getLogger(__name__)

FLUSH_SECONDS: Final = 10.0
"""How long a stopping pod tries to publish its accepted reservations.

Another pod's sweep publishes the rest.
"""

CHECK_SECONDS: Final = 10.0
"""How often a pod checks a Redis that lacks a requirement."""
RETRY_SECONDS: Final = 1.0
"""How often a pod that starts tries to reach Redis."""


class Application:
    """The endpoints for buyers, which `HttpProtocol` calls directly, and Starlette for the rest.

    Starlette's middleware and routing would cost more than the answer to most requests.
    """

    def __init__(self, reserve: Reserve, sales: Sales, rest: Starlette) -> None:
        self._reserve = reserve.begin
        self._sales = sales
        self._page = Page(sales.all_sales).handle
        self._rest = rest

    def direct(self, method: bytes, path: bytes) -> Handler | None:
        """Returns the handler of a request, or nothing if it takes the ASGI path."""
        if path == RESERVE_PATH:
            return self._reserve if method == b"POST" else not_allowed("POST")
        if path == SALES_PATH or path.startswith(SALES_PATH + b"/"):
            handler = self._sales.handler(path)
            if handler is None or method in {b"GET", b"HEAD"}:
                return handler
            return not_allowed("GET, HEAD")
        if path == PAGE_PATH:
            return self._page if method in {b"GET", b"HEAD"} else not_allowed("GET, HEAD")
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._rest(scope, receive, send)


def create_app(  # noqa: PLR0915 - the composition root
    settings: Settings,
    metrics: Metrics,
    on_failure: Callable[[BaseException], None],
    spans: "Spans | None" = None,
    order_server: "OrderServer | None" = None,
) -> Application:
    """Makes the application. Calls `on_failure` if a background task dies: the process must end.

    The application also runs `order_server`, if there is one.
    """
    pod_id = str(uuid.uuid4())
    # Reads cannot delay reservations, and no request delays the heartbeat, sweep or settle.
    redis, redis_of_reads, redis_of_outbox = clients = [
        redis_client.connect(settings.redis_url) for _ in range(3)
    ]
    inventory = Inventory(redis, settings.engine)
    outbox = Outbox(redis_of_outbox, settings.engine)
    engine = Engine(settings.engine)
    pulse = Pulse(inventory)
    publisher = Publisher(settings, outbox, metrics, engine, spans=spans)
    batcher = Batcher(inventory, publisher, metrics, engine, refusal=pulse.refusal, spans=spans)
    confirmations, cancellations = (
        Transitions(inventory, publisher, metrics, engine, verb, refusal=pulse.refusal)
        for verb in ("confirm", "cancel")
    )
    callers = batcher, confirmations, cancellations

    def called_items() -> set[str]:
        return {item_id for caller in callers for item_id in caller.called_items()}

    heartbeat = Heartbeat(
        pod_id,
        Inventory(redis_client.connect(settings.redis_url), settings.engine),
        called_items=called_items,
        publisher=publisher,
        engine=engine,
        metrics=metrics,
        pulse=pulse,
    )
    background = Inventory(redis_of_outbox, settings.engine)
    sweeper = Sweeper(background, outbox, publisher, metrics, known=engine.items, pod_id=pod_id)
    expiry = Expiry(background, publisher, metrics, engine, pod_id=pod_id)
    orders = OrderPort(
        Orders(inventory, confirmations, cancellations, metrics, engine, refusal=pulse.refusal),
        settings.order_tokens.split(","),
        metrics,
    )
    buyers = authentication.of_settings(settings, metrics)
    sales = Sales(Inventory(redis_of_reads, settings.engine), engine, buyers)
    redis_check = RedisCheck(inventory, outbox)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("check Redis", redis_check.run()),
                ("publish", publisher.run()),
                ("settle", publisher.settler.run()),
                ("sweep", sweeper.run()),
                ("expire holds", expiry.run()),
                ("heartbeat", heartbeat.run()),
                *(("watch Redis", Nodes.of_client(client).watch()) for client in clients),
                *([("authentication", buyers.run())] if buyers else []),
            )
        ]
        serving = asyncio.create_task(order_server.serve(orders)) if order_server else None
        tasks += [serving] if serving else []

        def ended(task: asyncio.Task[None]) -> None:
            if task.cancelled():
                on_failure(RuntimeError(f"{task.get_name()} was cancelled"))
            elif error := task.exception():
                on_failure(error)

        for task in tasks:
            task.add_done_callback(ended)
        try:
            yield
        finally:
            if order_server and serving:
                order_server.stop()
                await asyncio.wait([serving])
            await asyncio.gather(*(caller.close() for caller in callers))
            if left := await publisher.flush(FLUSH_SECONDS):
                log.warning("%d accepted reservations remain for another pod's sweep", left)
            else:
                with contextlib.suppress(RedisUnavailable):
                    await heartbeat.stop()
            for task in tasks:
                task.remove_done_callback(ended)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for client in clients:
                await client.aclose()

    async def healthz(_: Request) -> Response:
        return Response("ok\n", media_type="text/plain")

    async def readyz(_: Request) -> Response:
        problem = engine.conflict or redis_check.problem or (buyers.problem if buyers else "")
        if not problem and not pulse.begun:
            problem = "Redis has no heartbeat of this pod yet"
        status = 503 if problem else 200
        return Response(f"{problem or 'ready'}\n", status, media_type="text/plain")

    reserve = Reserve(batcher, metrics, spans, buyers, trust_traceparent=settings.trust_traceparent)
    routes = [Route("/healthz", healthz), Route("/readyz", readyz)]
    return Application(reserve, sales, rest_app(routes, "openapi.json", lifespan))


class RedisCheck:
    """Waits until Redis answers and meets the requirements."""

    def __init__(self, inventory: Inventory, outbox: Outbox) -> None:
        self._inventory = inventory
        self._outbox = outbox
        self.problem = "Redis has not answered yet"
        """Why this pod is not ready, or nothing. After that, the operator reports problems."""

    async def run(self) -> None:
        """Checks Redis and loads the scripts, again and again until both succeed."""
        checks = Checks(log)
        while True:
            try:
                facts = await redis_facts.read(self._inventory.redis, self._inventory.engine)
                checks.require(requirements.REDIS, *facts)
                await self._inventory.load()
                await self._outbox.load()
            except UnmetRequirement as error:
                if self.problem != str(error):
                    log.error("%s", error)  # noqa: TRY400 - a traceback adds nothing
                self.problem = str(error)
                await asyncio.sleep(CHECK_SECONDS)
            except RedisUnavailable as error:
                problem = f"waiting for Redis: {error}"
                if self.problem != problem:
                    log.info("%s", problem)
                self.problem = problem
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self.problem = ""
                return
