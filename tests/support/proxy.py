"""A TCP proxy that can break a connection before a reply, rename a word, and change its target."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self


class Proxy:
    """Forwards bytes in both directions. New connections go to the current `target_port`."""

    def __init__(self, target_port: int = 0) -> None:
        self.target_port = target_port
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._word = b""
        self.left_to_cut = 0
        self._kept_back = b""
        self._renamed = b"", b""
        self.port = 0

    def cut_replies(self, word: bytes, times: int) -> None:
        """Forward the next `times` requests with `word`, but break the connection at the reply."""
        self._word, self.left_to_cut = word, times

    def keep_back(self, word: bytes) -> None:
        """Break the connection at each request with `word`, without forwarding it."""
        self._kept_back = word

    def rename(self, word: bytes, other: bytes) -> None:
        """Replace a word in requests and replies, by one of the same length."""
        self._renamed = word, other

    def cut_all(self) -> None:
        """Break every connection."""
        for writer in self._connections.values():
            writer.transport.abort()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Self]:
        """Listen until the end of the context. Then break and close all connections."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut_all()
            await asyncio.gather(*self._connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = asyncio.current_task()
        assert own is not None
        self._connections[own] = writer
        try:
            await self._forward(reader, writer)
        finally:
            del self._connections[own]
            writer.close()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begun: bytes = b""
    ) -> None:
        """Forward `begun`, which has been read already, and then all bytes."""
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            return
        up_writer.write(begun)
        cut = asyncio.Event()

        async def requests() -> None:
            while data := await reader.read(65536):
                if self._kept_back and self._kept_back in data:
                    return
                if self.left_to_cut and self._word in data:
                    self.left_to_cut -= 1
                    cut.set()
                up_writer.write(data.replace(*self._renamed))

        async def replies() -> None:
            while data := await up_reader.read(65536):
                if cut.is_set():
                    return
                writer.write(data.replace(*self._renamed))

        tasks = {asyncio.create_task(requests()), asyncio.create_task(replies())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up_writer.close()
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError, ConnectionError):
                    await task
