"""The operator's composition root: it alone reads the settings and makes what it consists of."""

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from itertools import chain, repeat
from textwrap import dedent
from typing import Any, Final

import kopf
from aiohttp import web

from flashsale import ledger, logs, redis_client
from flashsale.errors import SettingsError
from flashsale.inventory import Inventory
from flashsale.settings import host_and_port, load
from flashsale_operator.kubernetes import handlers
from flashsale_operator.kubernetes.client import Kube, log_in
from flashsale_operator.kubernetes.controller import Clients, Key, Rounds
from flashsale_operator.kubernetes.metrics import CONTENT_TYPE, Metrics
from flashsale_operator.kubernetes.queue import Tending
from flashsale_operator.kubernetes.rebuilds import Rebuilds
from flashsale_operator.kubernetes.resync import Sweep
from flashsale_operator.sales import offsets
from flashsale_operator.settings import Settings

log = logging.getLogger(__name__)

STUCK_SECONDS: Final = 180.0
"""A pass ends in seconds, well or not: without one for this long the process hangs."""
CONNECTIONS: Final = 8
# Kopf would make one of the user's name, and in a container the user has none. It tells operators
# apart that know of one another, which `standalone` ones do not.
_IDENTITY: Final[Any] = "flashsale-operator"
DESCRIPTION: Final = """\
    Makes Redis agree with the FlashSale resources of a Kubernetes cluster, by way
    of the ledger, and tells in their status and Events how the sales go.

    In a pod it is known by its service account, elsewhere by KUBECONFIG. Redis,
    Kafka, PostgreSQL and the kube-apiserver may come and go. Two operators at once
    are harmless.

    Over HTTP: /healthz (the process is alive), /metrics (Prometheus).
"""
ENVIRONMENT: Final = """\
    environment:
      FLASHSALE_REDIS_URL            redis://[user:password@]host:port/db
      FLASHSALE_KAFKA_BOOTSTRAP      Kafka's brokers, host:port[,host:port...]
      FLASHSALE_KAFKA_TLS            true or false (default false)
      FLASHSALE_KAFKA_CA_FILE        certificates to trust, in PEM (default: the system's)
      FLASHSALE_KAFKA_USER           who it is to Kafka, by SCRAM-SHA-512 (default: nobody)
      FLASHSALE_KAFKA_PASSWORD       that user's password
      FLASHSALE_DATABASE_URL         the ledger, postgresql://user:password@host:port/db
      FLASHSALE_NAMESPACES           namespaces to serve, by commas (default: all)
      FLASHSALE_LISTEN               where to serve HTTP, host:port (default 0.0.0.0:8082)
      FLASHSALE_KEEP_CLOSED_SECONDS  how long a closed sale keeps its keys in Redis, so
                                     that it can be continued (default 3600)
      FLASHSALE_LOG_LEVEL            debug, info, warning or error (default info)
"""


def main() -> int:
    """Runs the operator until SIGTERM or SIGINT; 2 for a wrong setting, 1 for a failure."""
    argparse.ArgumentParser(
        prog="python -m flashsale_operator",
        description=dedent(DESCRIPTION),
        epilog=dedent(ENVIRONMENT),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        settings = load(Settings, os.environ)
        _configure_logs(settings)
        asyncio.run(_run(settings))
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"FLASHSALE_LISTEN cannot be served: {error}", file=sys.stderr)
        return 1
    return 0


def _configure_logs(settings: Settings) -> None:
    logs.configure(settings.log_level)
    # It logs every try while a server is away; the operator logs each change, once.
    logging.getLogger("kopf").setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.name.startswith("kopf") and "will retry" in record.getMessage())


async def _run(settings: Settings) -> None:
    log_in().as_ssl_context()  # what is wrong with it is said now
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        redis = redis_client.connect(settings.redis_url)
        stack.push_async_callback(redis.aclose)
        pool = await ledger.connect(settings.database_url, max_connections=CONNECTIONS)
        stack.callback(pool.terminate)
        kube = Kube(log_in)
        stack.push_async_callback(kube.close)

        stock = Inventory(redis)
        tending = Tending(lambda: rounds, metrics)
        rebuilds = Rebuilds(
            redis,
            pool,
            partial(offsets.spans, settings),
            lambda sale_id: tending.wake(Key(*sale_id.split("/", 1))),
        )
        clients = Clients(kube, stock, pool, metrics)
        rounds = Rounds(clients, rebuilds)
        sweep = Sweep(
            clients,
            rounds,
            tending,
            served=settings.served,
            keep_closed=timedelta(seconds=settings.keep_closed_seconds),
        )
        await stack.enter_async_context(_serving(settings.listen, metrics, sweep))
        registry = kopf.OperatorRegistry()

        async def close() -> None:
            await tending.close()
            await rebuilds.close()

        handlers.register(registry, tending.wake, log_in, close)
        async with asyncio.TaskGroup() as group:
            sweeping = group.create_task(sweep.run())
            await kopf.operator(
                registry=registry,
                settings=_kopf_settings(settings),
                standalone=True,
                identity=_IDENTITY,
                clusterwide=not settings.served,
                namespaces=settings.served,
            )
            sweeping.cancel()


class _Endless:
    """Delays between tries, in seconds: kopf ends the process when there are no more."""

    def __iter__(self) -> Iterator[float]:
        return chain((0.5, 1, 2, 4), repeat(8))


def _kopf_settings(settings: Settings) -> kopf.OperatorSettings:
    own = kopf.OperatorSettings()
    own.posting.enabled = False
    own.scanning.disabled = bool(settings.served)
    own.queueing.exit_timeout = 0.2
    own.networking.error_backoffs = _Endless()
    own.networking.request_timeout = 30
    own.networking.connect_timeout = 5
    own.watching.server_timeout = 240
    own.watching.client_timeout = 300
    own.watching.reconnect_backoff = 0.5
    return own


@asynccontextmanager
async def _serving(listen: str, metrics: Metrics, sweep: Sweep) -> AsyncIterator[None]:
    async def healthz(_: web.Request) -> web.Response:
        if time.monotonic() - sweep.ended > STUCK_SECONDS:
            return web.Response(status=503, text="no pass has ended for minutes\n")
        return web.Response(text="alive\n")

    async def prometheus(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/metrics", prometheus)
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        host, port = host_and_port(listen)
        await web.TCPSite(runner, host, port).start()
        yield
    finally:
        await runner.cleanup()
