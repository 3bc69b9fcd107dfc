"""The composition root. Only this module reads settings and makes clients."""

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Final

import uvloop

from flashsale import logs, lookups, monitoring, settings, tracing
from flashsale.errors import SettingsError
from flashsale.sockets import bound
from flashsale_consumer.metrics import Metrics
from flashsale_consumer.settings import Settings
from flashsale_consumer.worker import Worker

log = logging.getLogger(__name__)

DESCRIPTION: Final = """\
Records reservation events from Kafka in the ledger (PostgreSQL).

After each commit it announces the reservations in the topic ENGINE.recorded, which
order services read.

The consumer migrates the ledger and creates the topics ENGINE.reservations,
ENGINE.reservations.dlq and ENGINE.recorded if they are missing. It reads as a member
of the consumer group ENGINE-ledger. Each partition has one reader, so consumers beyond
the number of partitions are idle. Kafka and PostgreSQL may be down at the start or
later.

The ledger has the id of its engine. The consumer records nothing while the consumer
group belongs to an engine with another id.

It serves /healthz (the process is alive), /readyz (the ledger is migrated, the
group is joined, both belong to this engine, and no server lacks a requirement)
and /metrics (for Prometheus).
"""
ENVIRONMENT: Final = f"""\
environment:
{settings.KAFKA_HELP}\
  FLASHSALE_KAFKA_PARTITIONS partitions of the topics that it creates (default 12)
  FLASHSALE_DATABASE_URL     the ledger, postgresql://user:password@host:port/db (required)
  FLASHSALE_LISTEN           address to serve HTTP on (default [::]:8081)
  FLASHSALE_LOG_LEVEL        debug, info, warning or error (default info)
  OTEL_EXPORTER_OTLP_ENDPOINT and other OTEL_* variables: traces, see docs/operations.md
"""


def handlers(worker: Worker) -> dict[str, monitoring.Handler]:
    """Returns the answers of the HTTP server by path."""

    async def healthz() -> monitoring.Answer:
        return monitoring.line("alive")

    async def readyz() -> monitoring.Answer:
        if worker.joined and not worker.conflict:
            return monitoring.line("ready")
        return monitoring.line(worker.problem, 503)

    scrapes = monitoring.Scrapes(worker.metrics.text)
    return {"/healthz": healthz, "/readyz": readyz, "/metrics": scrapes.answer}


def main() -> int:
    """Runs the consumer until SIGTERM or SIGINT. Returns the exit code of the process."""
    argparse.ArgumentParser(
        prog="flashsale_consumer",
        description=DESCRIPTION,
        epilog=ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        own = settings.load(Settings, os.environ)
        traced = tracing.wanted(os.environ)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        listening = bound("LISTEN", own.listen)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    logs.configure(own.log_level)
    lookups.share_threads()
    # Few objects survive a batch. A search per 700 objects would take a tenth of the CPU time.
    gc.freeze()
    gc.set_threshold(50_000)
    spans = None
    if traced:
        # Import the SDK only if it is needed. It takes a third of a second and 10 MB.
        from flashsale_consumer.spans import Spans  # noqa: PLC0415

        try:
            spans = Spans(tracing.Tracing("flashsale-consumer", os.environ))
        except SettingsError as error:
            print(error, file=sys.stderr)
            return 2
    try:
        return uvloop.run(_run(Worker(own, Metrics(own.engine), spans=spans), listening))
    finally:
        if spans is not None:
            spans.close()


async def _run(worker: Worker, listeners: Sequence[socket.socket]) -> int:
    """Runs the worker until a signal. Returns the exit code of the process."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with monitoring.serving(listeners, handlers(worker)):
        working = asyncio.create_task(worker.run())
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait([working, stopped], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            error = None if working.cancelled() else working.exception()
            log.critical("the worker died", exc_info=error)
            return 1
        working.cancel()
        await asyncio.wait([working])
        return 0
