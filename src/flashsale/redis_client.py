"""One connection to Redis for the calls that must be quick: each is written behind the last.

redis-py makes the connection, with all that its URL says (TLS, user, database); from then on the
bytes are ours. Answers come in the order of the calls, so nobody waits for a connection. By
redis-py's own way a call costs twice as much, most of it for taking a connection and giving it
back.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

Reply: TypeAlias = str | int

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64

_END: Final = b"\r\n"


def connect(url: str) -> "Redis":
    """Returns a client of `url` (`redis://…` or `rediss://…`) that never retries a call.

    A retry after a timeout would run a script again without the caller's knowledge. The client
    connects on its first call.
    """
    pool = Pool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=1,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=2,
        socket_connect_timeout=1,
        # Otherwise some providers push unsolicited messages, and redis-py does not notice a
        # closed connection until it is used.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )
    return Redis.from_pool(pool)


class Pool(BlockingConnectionPool):
    """redis-py's pool, and beside it one `Link`: made when it is needed, ended with the pool."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - redis-py's own
        super().__init__(**options)
        self._connecting = asyncio.Lock()
        self._link: Link | None = None

    async def link(self) -> "Link":
        """The link, open; raises what redis-py does if it cannot be made."""
        if self._link is None or self._link.closed:
            async with self._connecting:
                if self._link is None or self._link.closed:
                    self._link = await self._linked()
        return self._link

    async def disconnect(self, inuse_connections: bool = True) -> None:
        if self._link is not None:
            self._link.close()
        await super().disconnect(inuse_connections)

    async def _linked(self) -> "Link":
        connection: Any = self.make_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        # The connection would complain of a writer that nobody closed.
        writer, connection._writer = connection._writer, None
        return Link(writer)


class Link(asyncio.Protocol):
    """A connection of which the answers are awaited in order; once closed it stays so."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._transport = cast("asyncio.Transport", writer.transport)
        self._transport.set_protocol(self)
        self._asked: deque[asyncio.Future[Reply]] = deque()
        self._received = bytearray()

    @property
    def closed(self) -> bool:
        """Whether it is of no use any more."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Ends it at once, for all that wait for an answer."""
        self._transport.abort()

    async def ask(self, *words: str | int) -> Reply:
        """The answer to a command, a string or a number.

        Raises `ResponseError` if Redis refuses it, `ConnectionError` (redis-py's) if the answer
        does not come. A caller that stops waiting ends the connection: it may be dead, and whoever
        comes next is not to wait for it.
        """
        if self.closed:
            raise Disconnected("the connection ended")
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self._transport.write(_packed(words))
        try:
            return await answer
        except asyncio.CancelledError:
            self.close()
            raise

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            for reply in self._replies():
                answer = self._asked.popleft()
                if answer.done():
                    continue  # cancelled: the link is closing
                if isinstance(reply, RedisError):
                    answer.set_exception(reply)
                else:
                    answer.set_result(reply)
        except (ValueError, IndexError) as error:
            log.warning("Redis answered what was not asked for: %s", error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(Disconnected(f"the connection ended: {exc or 'closed'}"))

    def _replies(self) -> Iterator[Reply | RedisError]:
        """The replies that are whole (the RESP types of scripts' results), taken off the buffer."""
        received, begin = self._received, 0
        while (end := received.find(_END, begin)) >= 0:
            kind, text = received[begin : begin + 1], received[begin + 1 : end].decode()
            if kind == b"$" and text != "-1":
                start, end = end + 2, end + 2 + int(text)
                if len(received) < end + 2:
                    break
                yield received[start:end].decode()
            elif kind == b":":
                yield int(text)
            elif kind == b"+":
                yield text
            elif kind == b"-":
                yield NoScriptError(text) if text.startswith("NOSCRIPT") else ResponseError(text)
            else:
                raise ValueError(f"a reply of type {bytes(kind)!r}")
            begin = end + 2
        del received[:begin]


def _packed(words: Sequence[str | int]) -> bytes:
    """A command as RESP has it."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        encoded = str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(encoded), encoded))
    return b"".join(parts)
