"""The composition root. Only this module reads settings and makes clients."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from textwrap import dedent
from types import FrameType
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from flashsale import logs, settings, tracing
from flashsale.errors import SettingsError
from flashsale_consumer.metrics import CONTENT_TYPE, Metrics
from flashsale_consumer.settings import Settings
from flashsale_consumer.worker import Worker

log = logging.getLogger(__name__)

GRACE_SECONDS: Final = 5
DESCRIPTION: Final = """\
    Records reservation events from Kafka in the ledger (PostgreSQL).

    The consumer migrates the ledger and creates the topics ENGINE.reservations and
    ENGINE.reservations.dlq if they are missing. It reads as a member of the consumer
    group ENGINE-ledger. Each partition has one reader, so consumers beyond the number
    of partitions are idle. Kafka and PostgreSQL may be down at the start or later.

    The ledger has the id of its engine. The consumer records nothing while the consumer
    group belongs to an engine with another id.

    It serves /healthz (the process is alive), /readyz (the ledger is migrated, the
    group is joined, and both belong to this engine) and /metrics (for Prometheus).
"""
ENVIRONMENT: Final = """\
    environment:
      FLASHSALE_ENGINE           name of the engine, the prefix of its topics, consumer
                                 group and Redis keys (default flashsale)
      FLASHSALE_KAFKA_BOOTSTRAP  Kafka's brokers, host:port[,host:port…]
      FLASHSALE_KAFKA_TLS        true or false (default false)
      FLASHSALE_KAFKA_CA_FILE    certificates to trust, in PEM (default: the system's)
      FLASHSALE_KAFKA_CERT_FILE  the client's certificate, in PEM (default: none)
      FLASHSALE_KAFKA_KEY_FILE   the certificate's key, in PEM and without a password
      FLASHSALE_KAFKA_USER       user (default: no authentication by password)
      FLASHSALE_KAFKA_PASSWORD   that user's password
      FLASHSALE_KAFKA_SASL_MECHANISM
                                 SCRAM-SHA-512, SCRAM-SHA-256 or PLAIN (default SCRAM-SHA-512)
      FLASHSALE_DATABASE_URL     the ledger, postgresql://user:password@host:port/db
      FLASHSALE_LISTEN           address to serve HTTP on (default 0.0.0.0:8081)
      FLASHSALE_LOG_LEVEL        debug, info, warning or error (default info)
      OTEL_EXPORTER_OTLP_ENDPOINT and other OTEL_* variables: traces, see docs/operations.md
"""


def create_app(worker: Worker, worker_died: Callable[[], None]) -> Starlette:
    """Make the HTTP app that runs the worker in its lifespan.

    The app calls `worker_died` if the worker fails. Nothing else would end the process.
    """

    def ended(task: asyncio.Task[None]) -> None:
        log.critical("the worker died", exc_info=None if task.cancelled() else task.exception())
        worker_died()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(worker.run())
        task.add_done_callback(ended)
        yield
        task.remove_done_callback(ended)
        task.cancel()
        await asyncio.wait([task])

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def readyz(_: Request) -> Response:
        if worker.joined and not worker.conflict:
            return PlainTextResponse("ready\n")
        return await problem(_, HTTPException(503, worker.conflict or None))

    async def prometheus(_: Request) -> Response:
        return Response(worker.metrics.text(), media_type=CONTENT_TYPE)

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", prometheus),
        ],
        exception_handlers={HTTPException: problem, Exception: problem},
        lifespan=lifespan,
    )


async def problem(_: Request, error: Exception) -> Response:
    """Answer an error with a problem document (RFC 9457) of the generic type."""
    raised = error if isinstance(error, HTTPException) else HTTPException(500)
    status, title = raised.status_code, HTTPStatus(raised.status_code).phrase
    document = {"type": "about:blank", "title": title, "status": status}
    if raised.detail != title:
        document["detail"] = raised.detail
    return JSONResponse(
        document,
        status,
        headers=raised.headers,
        media_type="application/problem+json",
    )


def main() -> int:
    """Run the consumer until SIGTERM or SIGINT. Returns the exit code of the process."""
    argparse.ArgumentParser(
        prog="flashsale_consumer",
        description=dedent(DESCRIPTION),
        epilog=dedent(ENVIRONMENT),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        own = settings.load(Settings, os.environ)
        host, port = settings.host_and_port(own.listen)
        traced = tracing.wanted(os.environ)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(own.log_level)
    # uvicorn shuts down gracefully and then raises the signal again for these handlers.
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, _exit)

    died = False

    def worker_died() -> None:
        nonlocal died
        died = server.should_exit = True

    spans = None
    if traced:
        # Import the SDK only if it is needed. It takes a third of a second and 10 MB.
        from flashsale_consumer.spans import Spans  # noqa: PLC0415

        spans = Spans(tracing.Tracing("flashsale-consumer", os.environ))
    app = create_app(Worker(own, Metrics(), spans=spans), worker_died)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            loop="uvloop",
            ws="none",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )
    try:
        server.run()
    finally:
        if spans is not None:
            spans.close()
    return 1 if died else 0


def _exit(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler's signature
    sys.exit(0)
