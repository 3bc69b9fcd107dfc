"""The operator's composition root: it reads the settings and makes all parts."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Final

import kopf
from kopf._cogs.clients.errors import APINotFoundError  # kopf has no public name for it

from flashsale import kafka_clients, ledger, logs, monitoring, redis_client
from flashsale.errors import SettingsError
from flashsale.inventory import Inventory
from flashsale.settings import KAFKA_HELP, load
from flashsale.sockets import bound
from flashsale_operator.kubernetes import handlers
from flashsale_operator.kubernetes.client import Kube, KubeUnavailable, log_in
from flashsale_operator.kubernetes.controller import Clients, Controller
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import Queue
from flashsale_operator.kubernetes.rebuilds import Rebuilds
from flashsale_operator.kubernetes.resync import RETRY_SECONDS, Resync
from flashsale_operator.sales import offsets
from flashsale_operator.settings import Settings

log = logging.getLogger(__name__)

CONNECTIONS: Final = 8
# By default, kopf derives the identity from the user name, which a container may not have. Only
# operators with peering use it.
_IDENTITY: Final[Any] = "flashsale-operator"
DESCRIPTION: Final = """\
Makes the ledger and Redis match the FlashSale resources of a Kubernetes
cluster, and reports each sale in the resource's status and in Events.

In a pod it logs in by its service account, elsewhere by KUBECONFIG. It waits
for Redis, Kafka, PostgreSQL and the kube-apiserver if they are down. Two
operators at the same time are harmless.

HTTP: /healthz (the process is alive), /readyz (Redis, PostgreSQL and the
kube-apiserver have answered, belong to this engine and lack no requirement),
/metrics (Prometheus).
"""
ENVIRONMENT: Final = f"""\
environment:
{KAFKA_HELP}\
  FLASHSALE_REDIS_URL        redis://[user:password@]host:port/db (required)
  FLASHSALE_DATABASE_URL     the ledger, postgresql://user:password@host:port/db (required)
  FLASHSALE_NAMESPACES       namespaces to serve, separated by commas (default: all)
  FLASHSALE_ITEMS            prefixes of the items that namespaces may sell:
                             NAMESPACE=PREFIX[,NAMESPACE=PREFIX...] (default: no rule)
  FLASHSALE_LISTEN           address to serve HTTP on (default [::]:8082)
  FLASHSALE_KEEP_CLOSED_SECONDS
                             how long a closed sale keeps its keys in Redis, so that it can be
                             continued (default 3600)
  FLASHSALE_LOG_LEVEL        debug, info, warning or error (default info)
"""


def main() -> int:
    """Runs the operator until SIGTERM or SIGINT. Returns 2 for a wrong setting, 1 for a failure."""
    argparse.ArgumentParser(
        prog="python -m flashsale_operator",
        description=DESCRIPTION,
        epilog=ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        settings = load(Settings, os.environ)
        _configure_logs(settings)
        return asyncio.run(_run(settings))
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 1


def _configure_logs(settings: Settings) -> None:
    logs.configure(settings.log_level)
    # kopf logs every retry during an outage. The operator logs each change once.
    logging.getLogger("kopf").setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_no_repetition)


def _is_no_repetition(record: logging.LogRecord) -> bool:
    """Returns False for kopf's lines about retries and about the end of its watch.

    The operator logs both itself.
    """
    message = record.getMessage()
    return not record.name.startswith("kopf") or not (
        "will retry" in message or " has failed: " in message
    )


async def _run(settings: Settings) -> int:
    """Runs the operator until a signal. Returns the exit code of the process."""
    log_in()  # reports a wrong KUBECONFIG now
    kafka_clients.adapt_aiokafka()
    metrics = Metrics(settings.engine)
    async with AsyncExitStack() as stack:
        redis = redis_client.connect(settings.redis_url)
        stack.push_async_callback(redis.aclose)
        pool = await ledger.connect(settings.database_url, max_connections=CONNECTIONS)
        stack.callback(pool.terminate)
        kube = Kube(log_in)
        stack.push_async_callback(kube.close)

        queue = Queue()
        inventory = Inventory(redis, settings.engine)
        rebuilds = Rebuilds(inventory, pool, partial(offsets.spans, settings), queue, metrics)
        clients = Clients(kube, inventory, pool, metrics)
        controller = Controller(clients, queue, rebuilds, prefixes=settings.prefixes)
        resync = Resync(
            clients,
            controller,
            queue,
            rebuilds,
            served=settings.served,
            keep_closed=timedelta(seconds=settings.keep_closed_seconds),
        )
        await stack.enter_async_context(
            monitoring.serving(bound("LISTEN", settings.listen), _handlers(metrics, resync))
        )
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(controller.run()), group.create_task(resync.run())]

            async def close() -> None:
                for task in background:
                    task.cancel()
                await asyncio.wait(background)
                await rebuilds.close()

            registry = kopf.OperatorRegistry()
            handlers.register(registry, queue, log_in, partial(_until_served, kube), close)
            try:
                await kopf.operator(
                    registry=registry,
                    settings=_kopf_settings(settings),
                    standalone=True,
                    identity=_IDENTITY,
                    clusterwide=not settings.served,
                    namespaces=settings.served,
                )
            except APINotFoundError:
                log.error(  # noqa: TRY400 - kopf's traceback explains nothing
                    "the operator ends, because the FlashSale resource was deleted: install the "
                    "chart's CRD (crds.enabled). A restarted operator waits for it"
                )
                return 1
            except Exception as error:  # noqa: BLE001 - kopf raises what its watch met
                log.error(  # noqa: TRY400 - kopf's traceback explains nothing
                    "the operator ends, because it cannot watch the FlashSales: %s: %s. A "
                    "restarted operator continues",
                    type(error).__name__,
                    error,
                )
                return 1
            finally:
                await close()  # kopf cleans up only after a complete start
    return 0


async def _until_served(kube: Kube) -> None:
    """Waits until the cluster serves FlashSales. Meanwhile the resync reports the reason."""
    while True:
        with suppress(KubeUnavailable):
            if await kube.serves_flash_sales():
                return
        await asyncio.sleep(RETRY_SECONDS)


class _Backoffs:
    """Endless delays between retries, in seconds. kopf ends the process when they run out."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.5, 1, 2, 4)
        while True:
            yield 8


def _kopf_settings(settings: Settings) -> kopf.OperatorSettings:
    own = kopf.OperatorSettings()
    own.posting.enabled = False
    own.scanning.disabled = bool(settings.served)
    own.queueing.exit_timeout = 0.2
    own.networking.error_backoffs = _Backoffs()
    own.networking.request_timeout = 30
    own.networking.connect_timeout = 5
    own.watching.server_timeout = 240
    own.watching.client_timeout = 300
    own.watching.reconnect_backoff = 0.5
    return own


def _handlers(metrics: Metrics, resync: Resync) -> dict[str, monitoring.Handler]:
    async def healthz() -> monitoring.Answer:
        if resync.stuck:
            return monitoring.line("no resync has ended for minutes", 503)
        return monitoring.line("alive")

    async def readyz() -> monitoring.Answer:
        if resync.unready is not None:
            return monitoring.line(resync.unready, 503)
        return monitoring.line("ready")

    scrapes = monitoring.Scrapes(metrics.text)
    return {"/healthz": healthz, "/readyz": readyz, "/metrics": scrapes.answer}
