"""The cluster bus of Redis' nodes, with a proxy in front of each bus port.

A node that is cut off keeps its clients. The other nodes take it for dead, and it takes them.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from dev.stack.redis import RedisServer
from tests.support.proxy import Proxy

SENDER: Final = slice(40, 80)
"""The place of the sender's id in each message."""


class Bus:
    """The proxies. `serve` gives each server the port of its proxy to announce."""

    def __init__(self, servers: Sequence[RedisServer]) -> None:
        self._proxies = {server: _BusProxy(self, server.bus_port) for server in servers}
        self.cut_off: RedisServer | None = None
        """The node that no other node reaches, and that reaches none."""
        self.id_cut_off = b""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for server, proxy in self._proxies.items():
                await stack.enter_async_context(proxy.serve())
                server.options += (
                    "--cluster-announce-ip",
                    "127.0.0.1",
                    "--cluster-announce-bus-port",
                    str(proxy.port),
                )
            yield

    def cut(self, server: RedisServer, node_id: str) -> None:
        """Cut a node off, until `reconnect`."""
        self.cut_off, self.id_cut_off = server, node_id.encode()
        for proxy in self._proxies.values():
            proxy.cut_all()

    def reconnect(self) -> None:
        self.cut_off, self.id_cut_off = None, b""

    def carries(self, proxy: Proxy, message: bytes) -> bool:
        """Whether a message may pass the proxy of its receiver."""
        if self.cut_off is None:
            return True
        return self._proxies[self.cut_off] is not proxy and message[SENDER] != self.id_cut_off


class _BusProxy(Proxy):
    def __init__(self, bus: Bus, target_port: int) -> None:
        super().__init__(target_port)
        self._bus = bus

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begun: bytes = b""
    ) -> None:
        """Read the sender of the first message, before anything is forwarded."""
        try:
            message = begun + await reader.readexactly(SENDER.stop)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        if self._bus.carries(self, message):
            await super()._forward(reader, writer, message)
