"""A TCP proxy that can cut a connection between a request and its reply, and change its target."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Proxy:
    """Forwards bytes both ways; `cut_replies` says how many replies to a word to swallow.

    New connections go to `target_port` as it is then.
    """

    def __init__(self, target_port: int = 0) -> None:
        self.target_port = target_port
        self._connections: set[asyncio.StreamWriter] = set()
        self._word = b""
        self.left_to_cut = 0
        self.port = 0

    def cut_replies(self, word: bytes, times: int) -> None:
        """Lets the next requests with `word` through and breaks the connection at the reply."""
        self._word, self.left_to_cut = word, times

    def cut_all(self) -> None:
        """Breaks every connection, whatever is on its way."""
        for writer in tuple(self._connections):
            writer.transport.abort()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Proxy"]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.close()
            return
        self._connections.add(writer)
        cut = asyncio.Event()

        async def requests() -> None:
            while data := await reader.read(65536):
                if self.left_to_cut and self._word in data:
                    self.left_to_cut -= 1
                    cut.set()
                up_writer.write(data)

        async def replies() -> None:
            while data := await up_reader.read(65536):
                if cut.is_set():
                    return
                writer.write(data)

        tasks = {asyncio.create_task(requests()), asyncio.create_task(replies())}
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, ConnectionError):
                await task
        self._connections.discard(writer)
        up_writer.close()
        writer.close()
