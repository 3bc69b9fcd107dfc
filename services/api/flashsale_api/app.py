"""The composition root: makes the clients and starts the background tasks."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flashsale import redis_client
from flashsale.errors import FlashsaleError, RedisUnavailable
from flashsale.inventory import Inventory
from flashsale.outbox import Outbox
from flashsale_api import responses
from flashsale_api.batcher import Batcher
from flashsale_api.engine import Engine
from flashsale_api.heartbeat import Heartbeat
from flashsale_api.metrics import Metrics
from flashsale_api.publisher import Publisher
from flashsale_api.reserve import RESERVE_PATH, Reserve
from flashsale_api.responses import Problem, problem_response
from flashsale_api.sales import Sales, SaleViews
from flashsale_api.settings import Settings
from flashsale_api.sweeper import Sweeper

if TYPE_CHECKING:
    from flashsale_api.spans import Spans

log = logging.getLogger(__name__)

FLUSH_SECONDS: Final = 10.0
"""How long a stopping pod tries to publish its accepted reservations.

Another pod's sweep publishes the rest.
"""


class UnsafeRedisError(FlashsaleError):
    """A setting of Redis endangers sales."""


class Application:
    """The ASGI application: `reserve` for POST /reserve, and Starlette for everything else.

    Starlette's middleware and routing would add a third to the cost of a bare request. For most
    requests `HttpProtocol` calls `reserve` directly, without ASGI.
    """

    def __init__(self, reserve: Reserve, rest: Starlette) -> None:
        self.reserve = reserve
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == RESERVE_PATH and scope["method"] == "POST":
            await self.reserve(scope, receive, send)
        else:
            await self._rest(scope, receive, send)


def create_app(
    settings: Settings,
    metrics: Metrics,
    on_failure: Callable[[BaseException], None],
    spans: "Spans | None" = None,
) -> Application:
    """Makes the application. Calls `on_failure` if a background task dies: the process must end."""
    pod_id = str(uuid.uuid4())
    redis = redis_client.connect(settings.redis_url)
    inventory = Inventory(redis, settings.engine)
    outbox = Outbox(redis, settings.engine)
    engine = Engine(settings.engine)
    publisher = Publisher(settings, outbox, metrics, engine, spans=spans)
    batcher = Batcher(inventory, publisher, metrics, engine, spans=spans)
    heartbeat = Heartbeat(pod_id, inventory, batcher, publisher, engine, metrics)
    sales = Sales(inventory, SaleViews(inventory))
    redis_checked = asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("check Redis", _check_redis(inventory, outbox, redis_checked)),
                ("publish", publisher.run()),
                ("settle", publisher.settle()),
                ("sweep", Sweeper(inventory, outbox, publisher, metrics, pod_id).run()),
                ("heartbeat", heartbeat.run()),
            )
        ]

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
            await batcher.close()
            if left := await publisher.flush(FLUSH_SECONDS):
                log.warning("%d accepted reservations remain for another pod's sweep", left)
            else:
                with contextlib.suppress(RedisUnavailable):
                    await heartbeat.stop()
            for task in tasks:
                task.remove_done_callback(ended)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await redis.aclose()

    async def healthz(_: Request) -> Response:
        return Response("ok\n", media_type="text/plain")

    async def readyz(_: Request) -> Response:
        if engine.conflict:
            return Response(f"{engine.conflict}\n", 503, media_type="text/plain")
        if redis_checked.is_set():
            return Response("ready\n", media_type="text/plain")
        return Response("Redis has not answered yet\n", 503, media_type="text/plain")

    description = (files("flashsale_api") / "openapi.json").read_bytes()

    async def openapi(_: Request) -> Response:
        return Response(description, media_type="application/json")

    reserve = Reserve(batcher, metrics, spans)
    rest = Starlette(
        routes=[
            # Starlette answers the other methods with 405.
            Route(RESERVE_PATH, reserve, methods=["POST"]),
            Route("/sales", sales.list),
            Route("/sales/{item_id}", sales.one),
            Route("/sales/{item_id}/reservations/{reservation_id}", sales.reservation),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/openapi.json", openapi),
        ],
        exception_handlers={HTTPException: _http_problem, Exception: _internal_problem},
        lifespan=lifespan,
    )
    # Otherwise Starlette redirects /sales/ to the host in the request's Host header.
    rest.router.redirect_slashes = False
    return Application(reserve, rest)


async def _check_redis(inventory: Inventory, outbox: Outbox, checked: asyncio.Event) -> None:
    """Waits for Redis and loads the scripts.

    Raises `UnsafeRedisError` if a setting of Redis endangers sales.
    """
    while True:
        try:
            mistake = await inventory.unsafe_setting()
            await inventory.load()
            await outbox.load()
        except RedisUnavailable as error:
            log.info("waiting for Redis: %s", error)
            await asyncio.sleep(1)
            continue
        if mistake:
            raise UnsafeRedisError(mistake)
        checked.set()
        return


async def _http_problem(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return problem_response(responses.of_status(error.status_code), headers=error.headers)


async def _internal_problem(_: Request, __: Exception) -> Response:
    return problem_response(Problem.INTERNAL_ERROR)
