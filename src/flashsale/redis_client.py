"""Redis connections: redis-py's pool, and one pipelined link for the calls that must be quick.

redis-py opens the link's connection, with TLS, user and database as in the URL. After that this
module writes and reads its bytes. Each call is written directly behind the previous one, and
replies arrive in the order of the calls, so no caller waits for a free connection. Through
redis-py's pool a call costs twice as much, mostly for taking a connection and giving it back.
"""

import asyncio
import contextlib
import logging
import os
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import hiredis
from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as Disconnected
from redis.maint_notifications import MaintNotificationsConfig

from flashsale import tls

if TYPE_CHECKING:
    from flashsale.nodes import Nodes

Reply: TypeAlias = str | int | list["str | int | RedisError"]

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64

_INCOMPLETE: Final = object()


def connect(url: str) -> Redis:
    """Returns a client of `url` (`redis://…` or `rediss://…`) that never retries a call.

    A retry after a timeout would run a script again without the caller's knowledge. The client
    connects on its first call.
    """
    secured = {}
    if url.startswith("rediss:"):
        secured = {"ssl_exclude_verify_flags": [ssl.VERIFY_X509_STRICT]}  # see `flashsale.tls`
    pool = Pool.from_url(
        url,
        **_of_pool(),
        **secured,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=2,
        socket_connect_timeout=1,
    )
    if secured:
        pool.connection_class = TlsConnection
        pool.connection_kwargs["shared"] = []
    return Redis.from_pool(pool)


def neighbour(
    redis: Redis,
    host: str,
    port: int,
    prepare: Callable[[Any], Awaitable[None]] | None = None,
) -> Redis:
    """Returns a client of another server, with the same user, TLS and other options.

    `prepare` is called with each new connection, in the place of its `on_connect`.
    """
    pool = redis.connection_pool
    options = {**pool.connection_kwargs, "host": host, "port": port}
    if prepare is not None:
        options["redis_connect_func"] = prepare
    return Redis.from_pool(Pool(connection_class=pool.connection_class, **options, **_of_pool()))


def _of_pool() -> dict[str, Any]:
    return {
        "max_connections": MAX_CONNECTIONS,
        "timeout": 1,
        # Otherwise some providers push unsolicited messages, and redis-py does not notice a
        # closed connection until it is used.
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def location(redis: Redis) -> tuple[str, int, int]:
    """Returns the server's host, port and database."""
    options = redis.connection_pool.connection_kwargs
    host, port, db = (options.get(name) for name in ("host", "port", "db"))
    return str(host).lower(), port or 6379, db or 0


def address(redis: Redis) -> str:
    """Returns the server's address as host:port/db, without user and password."""
    return "{}:{}/{}".format(*location(redis))


class TlsConnection(SSLConnection):
    """Connects with the present certificates, because their files can be renewed.

    redis-py reads them only once per connection object, and its pool reuses these objects. Reading
    takes long, so the connections of a client and its neighbours share a context.
    """

    def __init__(self, *, shared: list[tls.RenewedContext], **options: Any) -> None:  # noqa: ANN401
        """`shared` is empty until the first connection has read the files."""
        super().__init__(**options)
        self._shared = shared

    def _connection_arguments(self) -> Mapping[str, object]:
        own = self.ssl_context
        if not self._shared:
            files = own.ca_certs, own.certfile, own.keyfile, os.environ.get("SSL_CERT_FILE")
            self._shared.append(tls.RenewedContext(self._read, partial(tls.stamp, files)))
        [own.context] = self._shared
        return super()._connection_arguments()

    def _read(self) -> ssl.SSLContext:
        self.ssl_context.context = None
        return self.ssl_context.get()


class Pool(BlockingConnectionPool):
    """redis-py's pool plus one `Link`, which opens on first use and closes with the pool."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - redis-py's own
        super().__init__(**options)
        self._connecting = asyncio.Lock()
        self._link: Link | None = None
        self.nodes: Nodes | None = None
        """The nodes of the cluster that this server belongs to. They close with the pool."""

    async def link(self) -> "Link":
        """Returns the open link. Raises redis-py's errors if it cannot connect."""
        if self._link is None or self._link.closed:
            async with self._connecting:
                if self._link is None or self._link.closed:
                    self._link = await self._new_link()
        return self._link

    def close_link(self) -> None:
        """Closes the link at once, if there is one. Calls in flight fail."""
        if self._link is not None:
            self._link.close()

    async def renew(self) -> None:
        """Closes the connections except the link. New ones go where the address leads.

        A connection in use closes after its call.
        """
        idle = [*self._available_connections]
        self._available_connections.clear()
        await self.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
        await asyncio.gather(*(each.disconnect() for each in idle), return_exceptions=True)

    async def disconnect(self, inuse_connections: bool = True) -> None:
        self.close_link()
        if self.nodes is not None:
            await self.nodes.close()
        # A busy process can notice the end of a connection too late. It is closed nevertheless.
        with contextlib.suppress(RedisError):
            await super().disconnect(inuse_connections)

    async def _new_link(self) -> "Link":
        connection: Any = self.make_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        # Otherwise the connection would warn of an unclosed writer when it is collected.
        writer, connection._writer = connection._writer, None
        return Link(writer)


class Link(asyncio.Protocol):
    """A connection that carries many calls at once. After it closes, it cannot be used again."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._transport = cast("asyncio.Transport", writer.transport)
        self._transport.set_protocol(self)
        self._asked: deque[asyncio.Future[Reply]] = deque()
        self._reader = hiredis.Reader(
            protocolError=ValueError,
            replyError=_refusal,
            encoding="utf-8",
            notEnoughData=_INCOMPLETE,
        )

    @property
    def closed(self) -> bool:
        """Whether the connection has closed or is closing."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Closes the connection at once. Calls in flight fail."""
        self._transport.abort()

    async def ask(self, *words: str | int) -> Reply:
        """Sends a command and returns its reply: a string, an integer, or a list of them.

        A list can have errors too. Of a list of nothing but errors, the first is raised.

        Raises `ResponseError` if Redis refuses the command, and redis-py's `ConnectionError` if no
        reply arrives. A caller that stops waiting closes the connection, because it may be dead
        and the next caller must not wait for it.
        """
        if self.closed:
            raise Disconnected("the connection ended")
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self._transport.write(hiredis.pack_command(cast("Any", words)))
        try:
            return await answer
        except asyncio.CancelledError:
            self.close()
            raise

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                self._deliver(reply)
        except (TypeError, ValueError, IndexError) as error:
            log.warning("unexpected reply from Redis: %s", error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(Disconnected(f"the connection ended: {exc or 'closed'}"))

    def _deliver(self, reply: object) -> None:
        """Hands a reply to its call. Raises `TypeError` for a type that no script returns."""
        parts: list[Any] = reply if isinstance(reply, list) and reply else [reply]
        kinds = set(map(type, parts))
        if not all(issubclass(kind, (str, int, RedisError)) for kind in kinds):
            raise TypeError(f"type {type(reply).__name__}")
        answer = self._asked.popleft()
        if answer.done():
            return  # cancelled: the link is closing
        if all(issubclass(kind, RedisError) for kind in kinds):
            answer.set_exception(parts[0])
        else:
            answer.set_result(cast("Reply", reply))


def _refusal(text: str) -> RedisError:
    code, _, rest = text.partition(" ")
    match code:
        case "NOSCRIPT":
            return NoScriptError(text)
        case "ASK":
            return AskError(rest)
        case "MOVED":
            return MovedError(rest)
        case "READONLY":
            return ReadOnlyError(rest)
        case "CLUSTERDOWN":
            return ClusterDownError(text)
    return ResponseError(text)
