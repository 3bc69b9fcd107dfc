"""`python -m flashsale_api`: run one API process."""

import argparse
import gc
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING, Final

import uvicorn
import uvloop

from flashsale import logs, lookups, tracing
from flashsale.errors import FlashsaleError, SettingsError
from flashsale.monitoring import Scrapes, serving
from flashsale.settings import KAFKA_HELP, host_and_port, load
from flashsale.sockets import bound
from flashsale_api import descriptors
from flashsale_api.app import create_app
from flashsale_api.limits import SOCKET_BYTES
from flashsale_api.metrics import Metrics
from flashsale_api.servers import OrderServer, server_of
from flashsale_api.settings import Settings

if TYPE_CHECKING:
    from flashsale_api.spans import Spans

_HELP: Final = f"""\
Answers POST /reserve from Redis and publishes accepted reservations to Kafka.

environment:
{KAFKA_HELP}\
  FLASHSALE_REDIS_URL        redis://[user:password@]host:port/db (required)
  FLASHSALE_LISTEN           address to serve buyers on (default [::]:8080)
  FLASHSALE_ORDERS_LISTEN    address to serve the shop's order service on (default [::]:8083)
  FLASHSALE_ORDER_TOKENS     the order service's token, or two with a comma between them during a
                             rotation (default: none, and its address is not served)
  FLASHSALE_USER_HEADER      header in which a gateway names the user (default: none, and the body
                             names the user)
  FLASHSALE_JWKS_URL         address of the keys for bearer tokens whose sub is the user (default:
                             none)
  FLASHSALE_JWT_ISSUER       iss of these tokens, required with FLASHSALE_JWKS_URL
  FLASHSALE_JWT_AUDIENCE     aud of these tokens, required with FLASHSALE_JWKS_URL
  FLASHSALE_METRICS_LISTEN   address to serve metrics on (default [::]:9090)
  FLASHSALE_TRUST_TRACEPARENT
                             true if a gateway sets the header traceparent of buyers: then the
                             caller decides whether a request is traced (default false)
  FLASHSALE_LOG_LEVEL        debug, info, warning or error (default info)
  OTEL_EXPORTER_OTLP_ENDPOINT and other OTEL_* variables: traces, see docs/operations.md
"""


def main() -> int:
    """Runs the API until SIGTERM. Returns 2 for a wrong setting, 1 for a failure, otherwise 0."""
    argparse.ArgumentParser(
        prog="python -m flashsale_api",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        settings = load(Settings, os.environ)
        traced = tracing.wanted(os.environ)
        logs.configure(settings.log_level)
        lookups.share_threads()
        spans = _spans() if traced else None
        listening = bound("LISTEN", settings.listen, SOCKET_BYTES)
        metrics_listeners = bound("METRICS_LISTEN", settings.metrics_listen)
        order_server = (
            OrderServer(settings.orders_listen, lambda: server.should_exit)
            if settings.order_tokens
            else None
        )
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    descriptors.set_limit()

    failed = False

    def on_failure(error: BaseException) -> None:
        nonlocal failed
        failed = server.should_exit = True
        # The message of one of our own errors is enough. It needs no traceback.
        known = isinstance(error, FlashsaleError)
        logging.getLogger("flashsale_api").critical(
            "the API stops: %s", error, exc_info=None if known else error
        )

    metrics = Metrics(settings.engine)
    app = create_app(settings, metrics, on_failure, spans, order_server)
    server = server_of(app, *host_and_port(settings.listen))
    # Objects made so far live as long as the process, and requests create no reference cycles.
    # Freezing the former and collecting rarely saves about 10 % of the CPU time.
    gc.freeze()
    gc.set_threshold(50_000)
    try:
        uvloop.run(_serve(server, listening, metrics, metrics_listeners))
    finally:
        if spans is not None:
            spans.close()
    return 1 if failed else 0


async def _serve(
    server: uvicorn.Server,
    listeners: list[socket.socket],
    metrics: Metrics,
    metrics_listeners: list[socket.socket],
) -> None:
    async with serving(metrics_listeners, {"/metrics": Scrapes(metrics.text).answer}):
        await server.serve(listeners)


def _spans() -> "Spans":
    # The SDK costs a third of a second and 10 MB, so import it only if tracing is on.
    from flashsale_api.spans import Spans  # noqa: PLC0415

    return Spans(tracing.Tracing("flashsale-api", os.environ))


if __name__ == "__main__":
    sys.exit(main())
