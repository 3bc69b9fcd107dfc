"""`python -m flashsale_api`: run one API process."""

import argparse
import gc
import logging
import os
import sys
from typing import TYPE_CHECKING, Final

import uvicorn
from prometheus_client import start_http_server
from starlette.types import ASGIApp

from flashsale import logs, tracing
from flashsale.errors import FlashsaleError, SettingsError
from flashsale.settings import host_and_port, load
from flashsale_api.app import create_app
from flashsale_api.metrics import Metrics
from flashsale_api.protocol import HttpProtocol
from flashsale_api.settings import Settings

if TYPE_CHECKING:
    from flashsale_api.spans import Spans

_HELP: Final = """\
Answers POST /reserve from Redis and publishes accepted reservations to Kafka.

environment:
  FLASHSALE_ENGINE           name of the engine, the prefix of its topics, consumer group and
                             Redis keys (default flashsale)
  FLASHSALE_REDIS_URL        redis://[user:password@]host:port/db (required)
  FLASHSALE_KAFKA_BOOTSTRAP  host:port[,host:port...] (required)
  FLASHSALE_KAFKA_TLS        true or false (default false)
  FLASHSALE_KAFKA_CA_FILE    certificates to trust, in PEM (default: the system's)
  FLASHSALE_KAFKA_CERT_FILE  the client's certificate, in PEM (default: none)
  FLASHSALE_KAFKA_KEY_FILE   the certificate's key, in PEM and without a password
  FLASHSALE_KAFKA_USER       user (default: no authentication by password)
  FLASHSALE_KAFKA_PASSWORD   that user's password
  FLASHSALE_KAFKA_SASL_MECHANISM
                             SCRAM-SHA-512, SCRAM-SHA-256 or PLAIN (default SCRAM-SHA-512)
  FLASHSALE_LISTEN           address to serve buyers on (default 0.0.0.0:8080)
  FLASHSALE_METRICS_LISTEN   address to serve metrics on (default 0.0.0.0:9090)
  FLASHSALE_LOG_LEVEL        debug, info, warning or error (default info)
  OTEL_EXPORTER_OTLP_ENDPOINT and other OTEL_* variables: traces, see docs/operations.md
"""


def server_of(app: ASGIApp, host: str, port: int) -> uvicorn.Server:
    """Returns the server for buyers. Tests and benchmarks start other apps with it."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            loop="uvloop",
            http=HttpProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=4096,
            timeout_keep_alive=75,  # longer than that of load balancers, so that they close first
            timeout_graceful_shutdown=10,
        )
    )


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
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(settings.log_level)

    failed = False

    def on_failure(error: BaseException) -> None:
        nonlocal failed
        failed = server.should_exit = True
        # The message of one of our own errors is enough. It needs no traceback.
        known = isinstance(error, FlashsaleError)
        logging.getLogger("flashsale_api").critical(
            "the API stops: %s", error, exc_info=None if known else error
        )

    spans = _spans() if traced else None
    metrics = Metrics()
    host, port = host_and_port(settings.listen)
    app = create_app(settings, metrics, on_failure, spans)
    server = server_of(app, host, port)
    metrics_host, metrics_port = host_and_port(settings.metrics_listen)
    try:
        metrics_server, _ = start_http_server(metrics_port, metrics_host, metrics.registry)
    except OSError as error:
        print(f"FLASHSALE_METRICS_LISTEN cannot be served: {error}", file=sys.stderr)
        return 1
    # Objects made so far live as long as the process, and requests create no reference cycles.
    # Freezing the former and collecting rarely saves about 10 % of the CPU time.
    gc.freeze()
    gc.set_threshold(50_000)
    try:
        server.run()
    finally:
        metrics_server.shutdown()
        metrics_server.server_close()
        if spans is not None:
            spans.close()
    return 1 if failed else 0


def _spans() -> "Spans":
    # The SDK costs a third of a second and 10 MB, so import it only if tracing is on.
    from flashsale_api.spans import Spans  # noqa: PLC0415

    return Spans(tracing.Tracing("flashsale-api", os.environ))


if __name__ == "__main__":
    sys.exit(main())
