"""Which certificates the engine's clients accept, and when they read them again.

They accept those that Python 3.12 and most tools accept. From Python 3.13 on, a default context
also refuses a certificate that does not name the key of its issuer, among other formal rules of
RFC 5280. The brokers of Strimzi and the authority of an EKS cluster can have such certificates,
and both work with clients in other languages. The chain, the signatures, the validity and the name
of the server are always verified.
"""

import logging
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeAlias

from flashsale.errors import FlashsaleError

log = logging.getLogger(__name__)

Stamp: TypeAlias = tuple[tuple[int, int, int], ...]


def relaxed(context: ssl.SSLContext) -> ssl.SSLContext:
    """Returns the same context, without the formal rules."""
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def stamp(files: Iterable[str | None]) -> Stamp:
    """Returns a value that changes with each file that is given. Raises `OSError`."""
    found = [Path(name).stat() for name in files if name]
    return tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in found)


class RenewedContext(ssl.SSLContext):
    """Makes each connection with the present certificates, because they can be renewed.

    Clients of Redis, Kafka and Kubernetes keep one context as long as they live. asyncio and uvloop
    make each connection by `wrap_bio`.
    """

    def __new__(cls, *_: object) -> Self:
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def __init__(
        self, read: Callable[[], ssl.SSLContext], changed: Callable[[], object] = object
    ) -> None:
        """`read` makes a context. It is called again when the value of `changed` is another one.

        By default, it is called for each connection. If it or `changed` fails then with an
        `OSError` or an error of the engine, it logs that, and the former certificates are used.
        """
        self._read, self._changed = read, changed
        self._seen: object = None
        with suppress(OSError):  # `read` has the better message
            self._seen = changed()
        self._latest = read()

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:  # noqa: ANN401 - ssl's
        return self._present().wrap_bio(*arguments, **options)

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:  # noqa: ANN401 - ssl's
        return self._present().wrap_socket(*arguments, **options)

    def _present(self) -> ssl.SSLContext:
        try:
            seen = self._changed()
            if seen != self._seen:
                self._latest = self._read()
                self._seen = seen
        except (OSError, FlashsaleError) as error:
            log.warning("the new certificates cannot be used, so the former ones are: %s", error)
        return self._latest
