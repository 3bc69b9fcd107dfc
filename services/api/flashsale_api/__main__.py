"""`python -m flashsale_api`: one API process."""

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
Answers POST /reserve from Redis and publishes what it accepts to Kafka.

environment:
  FLASHSALE_REDIS_URL        redis://[user:password@]host:port/db (required)
  FLASHSALE_KAFKA_BOOTSTRAP  host:port[,host:port...] (required)
  FLASHSALE_KAFKA_TLS        true or false (false)
  FLASHSALE_KAFKA_CA_FILE    certificates to trust, in PEM (the system's)
  FLASHSALE_KAFKA_USER       who it is to Kafka, by SCRAM-SHA-512 (nobody)
  FLASHSALE_KAFKA_PASSWORD   that user's password
  FLASHSALE_LISTEN           host:port for buyers (0.0.0.0:8080)
  FLASHSALE_METRICS_LISTEN   host:port for Prometheus (0.0.0.0:9090)
  FLASHSALE_LOG_LEVEL        debug, info, warning or error (info)
  OTEL_EXPORTER_OTLP_ENDPOINT and other OTEL_* variables: traces, see docs/operations.md
"""


def server_of(app: ASGIApp, host: str, port: int) -> uvicorn.Server:
    """The server of buyers, as it is set up for this API."""
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
            timeout_keep_alive=75,  # above what load balancers keep: they close first
            timeout_graceful_shutdown=10,
        )
    )


def main() -> int:
    """Runs the API until SIGTERM; exit code 2 for a wrong setting, 1 for a failure."""
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
        # An error that explains itself needs no traceback.
        known = isinstance(error, FlashsaleError)
        logging.getLogger("flashsale_api").critical(
            "the API ends: %s", error, exc_info=None if known else error
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
    # Collections have no business with what was made so far, nor often with what requests leave:
    # nothing of that goes in circles, and they took a tenth of the time.
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
    # With them comes the SDK: a third of a second and 10 MB that the others need not spend.
    from flashsale_api.spans import Spans  # noqa: PLC0415

    return Spans(tracing.Tracing("flashsale-api", os.environ))


if __name__ == "__main__":
    sys.exit(main())
