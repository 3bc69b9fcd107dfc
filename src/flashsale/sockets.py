"""Listening sockets. `[::]` is every address of IPv4 and IPv6, because servers differ on that."""

import errno
import socket
from typing import Final

from flashsale.settings import PREFIX, host_and_port

BACKLOG: Final = 4096
BUFFER_BYTES: Final = 128 * 1024
"""Usual size of each of the kernel's buffers of a connection. A pod's memory limit counts them."""
_NO_IPV6: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def bound(variable: str, listen: str, buffer_bytes: int = BUFFER_BYTES) -> list[socket.socket]:
    """Returns a listening socket per address of the `Listen` setting of a variable.

    A connection has buffers of `buffer_bytes` in the kernel, also before it is accepted.

    A machine without IPv6 listens on IPv4 alone if the address is `[::]`. Raises `OSError` with a
    line that names the variable.
    """
    try:
        listeners = _bound(*host_and_port(listen))
    except OSError as error:
        raise OSError(f"{PREFIX}{variable} cannot be served: {error}") from error
    for listener in listeners:
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            listener.setsockopt(socket.SOL_SOCKET, buffer, buffer_bytes)
    return listeners


def _bound(host: str, port: int) -> list[socket.socket]:
    if host == "::":
        return [_everywhere(port)]
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = {(family, address[0]) for family, *_, address in found}
    return [
        socket.create_server((str(each), port), family=family, backlog=BACKLOG)
        for family, each in sorted(addresses)
    ]


def _everywhere(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
        except OSError as error:
            if error.errno not in _NO_IPV6:
                raise
    return socket.create_server(("0.0.0.0", port), backlog=BACKLOG)  # noqa: S104 - as asked
