"""Raw connections, and the bytes of requests to the API."""

import asyncio
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dev.services import ApiServer
from flashsale_api.limits import REQUEST_SECONDS

DEADLINE_SECONDS: Final = 9 * REQUEST_SECONDS
TE: Final = b"Transfer-Encoding: chunked\r\n"
JSON: Final = b"Content-Type: application/json\r\n"
POST: Final = b"POST /reserve HTTP/1.1\r\nHost: x\r\n" + JSON
CHUNKED: Final = POST + TE + b"\r\n"
GET: Final = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass(slots=True)
class Wire:
    """A connection to a server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def status(self) -> int:
        """Read the next answer. Return its status, or 0 if the connection was closed."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                return 0
            status = int(head.split(b" ", 2)[1])
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    await self.reader.readexactly(int(line.partition(b":")[2]))
        return status

    async def rest(self) -> bytes:
        """Read until the server closes the connection."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            try:
                return await self.reader.read(-1)
            except ConnectionError:
                return b""

    def stop_reading(self) -> None:
        self.writer.transport.pause_reading()  # type: ignore[attr-defined] # it is a Transport

    async def rest_or_silence(self) -> None:
        """Read until the server closes the connection or has nothing more to send."""
        try:
            async with asyncio.timeout(1):
                while await self.reader.read(65_536):
                    pass
        except (TimeoutError, ConnectionError):
            return


@asynccontextmanager
async def connection(server: ApiServer | int) -> AsyncIterator[Wire]:
    """Connect to an API process, or to a port of this machine."""
    port = server if isinstance(server, int) else server.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


def reset(wire: Wire) -> None:
    """Close a connection with a reset, as a process that is killed with unread bytes does."""
    own = wire.writer.get_extra_info("socket")
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.writer.transport.abort()


@contextmanager
def stopped(api: ApiServer) -> Iterator[None]:
    """Let the process stand still. Afterwards, it finds all events in one turn of its loop."""
    assert api.pid is not None
    os.kill(api.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(api.pid, signal.SIGCONT)


def resident(api: ApiServer) -> int:
    """Return the resident memory of the process, in bytes."""
    return _memory(api, "VmRSS:")


def peak(api: ApiServer) -> int:
    """Return the largest resident memory that the process had since `forget_peak`, in bytes."""
    return _memory(api, "VmHWM:")


def forget_peak(api: ApiServer) -> None:
    Path(f"/proc/{api.pid}/clear_refs").write_text("5", "ascii")


def _memory(api: ApiServer, field: str) -> int:
    status = Path(f"/proc/{api.pid}/status").read_text("ascii")
    return int(status.partition(field)[2].split()[0]) * 1024


def body_for(item: str) -> bytes:
    return b'{"userId":"ann","itemId":"%b","quantity":1}' % item.encode()


def reserve(item: str, more: bytes = b"", body: bytes | None = None) -> bytes:
    """Make a valid request, with `more` headers. It takes a unit."""
    body = body_for(item) if body is None else body
    return POST + more + b"Content-Length: %d\r\n\r\n" % len(body) + body
