"""Listening on IPv4, IPv6 and both."""

import errno
import socket
from contextlib import ExitStack

import pytest

from flashsale.sockets import bound


def answers(listening: list[socket.socket], host: str) -> bool:
    port = listening[0].getsockname()[1]
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("listen", "ipv4", "ipv6"),
    [("[::]:0", True, True), ("0.0.0.0:0", True, False), ("[::1]:0", False, True)],
)
def test_an_address_listens_on_its_families(listen: str, ipv4: bool, ipv6: bool) -> None:
    with ExitStack() as stack:
        listening = [stack.enter_context(each) for each in bound("LISTEN", listen)]
        assert (answers(listening, "127.0.0.1"), answers(listening, "::1")) == (ipv4, ipv6)


@pytest.mark.parametrize("where", ["family", "address"])
def test_a_machine_without_ipv6_listens_on_ipv4(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "family":
        monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    else:
        create = socket.create_server

        def refuse(address: tuple[str, int], **options: object) -> socket.socket:
            if address[0] == "::":
                raise OSError(errno.EADDRNOTAVAIL, "no IPv6")
            return create(address, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "create_server", refuse)
    with ExitStack() as stack:
        listening = [stack.enter_context(each) for each in bound("LISTEN", "[::]:0")]
        assert answers(listening, "127.0.0.1")


def test_the_error_for_an_occupied_address_names_the_variable() -> None:
    with ExitStack() as stack:
        [first] = [stack.enter_context(each) for each in bound("LISTEN", "[::]:0")]
        with pytest.raises(OSError, match=r"FLASHSALE_LISTEN cannot be served: .* in use"):
            bound("LISTEN", f"[::]:{first.getsockname()[1]}")


def test_an_address_of_ipv6_alone_that_is_occupied_is_an_error() -> None:
    """To listen on IPv4 alone would hide the mistake."""
    with (
        socket.create_server(("::", 0), family=socket.AF_INET6) as first,
        pytest.raises(OSError, match="in use"),
    ):
        bound("LISTEN", f"[::]:{first.getsockname()[1]}")
