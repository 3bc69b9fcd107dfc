"""An API on loopback that accepts every request, for tests of the clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final, Self

STALL_SECONDS: Final = 0.5


class FakeApi:
    """Answers each request with 202 and the number of the request as the reservation id.

    The answer to request number `stalled` takes `STALL_SECONDS`. Request number `dropped` gets no
    answer: its connection is closed. Requests are numbered from 1.
    """

    def __init__(self, *, stalled: int | None = None, dropped: int | None = None) -> None:
        self._stalled = stalled
        self._dropped = dropped
        self._port = 0
        self._connections: list[asyncio.Task[None]] = []
        self.bodies: list[bytes] = []
        self.paths: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Self]:
        """Listen until the end of the context, and until every client has disconnected."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = server.sockets[0].getsockname()[1]
        async with server:
            yield self
            await asyncio.gather(*self._connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.append(asyncio.create_task(self._answer(reader, writer)))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.paths.append(head.split(b" ")[1])
                size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.bodies.append(await reader.readexactly(size))
                number = len(self.bodies)
                if number == self._dropped:
                    break
                if number == self._stalled:
                    await asyncio.sleep(STALL_SECONDS)
                body = b'{"reservationId":"%d"}' % number
                # In two parts, because an answer can arrive in parts.
                writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-le")
                await asyncio.sleep(0)
                writer.write(b"ngth: %d\r\n\r\n%b" % (len(body), body))
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
