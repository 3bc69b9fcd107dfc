"""The heads of requests: rules that the parser does not check, and the removal of Upgrade."""

from typing import Final

import httptools

from flashsale_api.responses import RequestHeaders

_VERSIONS: Final = frozenset(["1.0", "1.1"])
_OF_AN_UPGRADE: Final = (b"upgrade", b"http2-settings")


class BadRequest(Exception):
    """A request that breaks a rule of HTTP, with the status and the reason of the answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def check(headers: RequestHeaders, version: str) -> bool:
    """Returns whether the client waits for 100 Continue. Raises `BadRequest`."""
    expects_100, hosts = False, 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding" and value.lower() != b"chunked":
            raise BadRequest(501, "The only supported Transfer-Encoding is chunked.")
        elif name == b"expect" and value.lower() == b"100-continue":
            expects_100 = version != "1.0"  # whose clients know no interim answer
    if version not in _VERSIONS:
        raise BadRequest(400, "The version of HTTP must be 1.1 or 1.0.")
    if hosts > 1 or (hosts == 0 and version != "1.0"):
        raise BadRequest(400, "The request needs one Host.")
    return expects_100


def path_and_query(url: bytes) -> tuple[bytes, bytes]:
    """Splits the target of a request. Raises `BadRequest`, or the parser's error."""
    if b"#" in url:
        raise BadRequest(400, "A request has no fragment.")
    path, _, query = url.partition(b"?")
    if not path.startswith(b"/"):
        path = httptools.parse_url(url).path or b"/"
    return path, query


def size(url: bytes, headers: RequestHeaders) -> int:
    """Returns the bytes of a head, without its first line's method and version."""
    return len(url) + sum(len(name) + len(value) + 4 for name, value in headers)


def without_upgrade(method: bytes, url: bytes, version: str, headers: RequestHeaders) -> bytes:
    """Returns a head without the fields that ask for another protocol."""
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    for name, value in headers:
        kept = value
        if name in _OF_AN_UPGRADE:
            continue
        if name == b"connection":
            options = [option.strip() for option in value.split(b",")]
            kept = b", ".join(option for option in options if option.lower() not in _OF_AN_UPGRADE)
        lines.append(b"%b: %b" % (name, kept))
    return b"\r\n".join([*lines, b"", b""])
