"""The HTTP servers of a process: one for buyers, and one for the shop's order service."""

import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final, Literal

import uvicorn
from starlette.types import ASGIApp

from flashsale.settings import host_and_port
from flashsale.sockets import BACKLOG, bound
from flashsale_api.limits import SOCKET_BYTES
from flashsale_api.protocol import HttpProtocol, OrderProtocol

log = logging.getLogger(__name__)

ACCEPTED: Final = 8
"""Clients that a turn of the event loop accepts per address.

libuv accepts one per descriptor of a listening socket. A busy process has only tens of turns per
second, so a crowd of new clients, and a health check behind it, would wait for many seconds. A turn
reads up to 48 times, so a higher number could use up `descriptors.SPARE` before the clients are
counted.
"""


def server_of(app: ASGIApp, host: str, port: int) -> uvicorn.Server:
    """Returns the server for buyers. Benchmarks start other apps with it."""
    return _Server(_config(app, host, port, "on", HttpProtocol))


class _ListeningServer(uvicorn.Server):
    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves on `sockets`, which it closes at the end."""
        if sockets is not None:
            sockets = [each.dup() for each in sockets * (ACCEPTED - 1)] + sockets
        await super().serve(sockets)


class _Server(_ListeningServer):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Stops the server, and at a second Ctrl-C at once.

        uvicorn would also raise the signal again at the end. The process would not send its last
        spans, and would not exit with 0.
        """
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


class OrderServer:
    """Serves the order port in the loop of the buyers' server, until one of them stops."""

    def __init__(self, listen: str, stopping: Callable[[], bool]) -> None:
        """Listens at once. `stopping` says whether the buyers' server stops. Raises `OSError`."""
        self._listeners = bound("ORDERS_LISTEN", listen, SOCKET_BYTES)
        self._address = host_and_port(listen)
        self._stopping = stopping
        self._stopped = False

    async def serve(self, app: ASGIApp) -> None:
        """Returns after `stop`, or when the buyers' server stops, and calls are answered."""
        log.info("the order port listens on %s:%d", *self._address)
        config = _config(app, *self._address, "off", OrderProtocol)
        await _Attached(config, lambda: self._stopped or self._stopping()).serve(self._listeners)

    def stop(self) -> None:
        self._stopped = True


class _Attached(_ListeningServer):
    def __init__(self, config: uvicorn.Config, stopping: Callable[[], bool]) -> None:
        super().__init__(config)
        self._stopping = stopping

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to the buyers' server."""
        yield

    async def on_tick(self, counter: int) -> bool:
        return self._stopping() or await super().on_tick(counter)


def _config(
    app: ASGIApp,
    host: str,
    port: int,
    lifespan: Literal["on", "off"],
    protocol: type[HttpProtocol],
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        workers=1,  # otherwise uvicorn reads WEB_CONCURRENCY
        loop="uvloop",
        http=protocol,
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,  # longer than that of load balancers, so that they close first
        timeout_graceful_shutdown=10,
    )
