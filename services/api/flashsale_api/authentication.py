"""Names the user of a request. A gateway's header or a verified token can name it.

Without either, the API trusts its callers, and the body names the user.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, TypeAlias

from flashsale.fields import USER_ID
from flashsale_api.metrics import Metrics
from flashsale_api.responses import RequestHeaders
from flashsale_api.settings import Settings

UNAUTHENTICATED: Final = "send one header Authorization: Bearer <token>"
"""Why a request without a bearer token is refused."""

Identified: TypeAlias = Callable[[str, str], None]
"""Takes the user and "", or "" and the reason why the user is unknown.

Both are empty if this pod cannot tell now.
"""


class Authentication(ABC):
    """Names the users of requests."""

    @property
    def problem(self) -> str:
        """Why this pod cannot name users yet, or nothing."""
        return ""

    @abstractmethod
    def identify(self, headers: RequestHeaders, then: Identified) -> None:
        """Calls `then` exactly once, immediately or later."""

    async def run(self) -> None:
        """Works in the background until it is cancelled."""
        await asyncio.get_running_loop().create_future()


class GatewayHeader(Authentication):
    """Trusts a header that the gateway sets, and that it removes from the requests of buyers."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._key = name.lower().encode()

    def identify(self, headers: RequestHeaders, then: Identified) -> None:
        found = [value for name, value in headers if name == self._key]
        if len(found) != 1:
            then("", f"the gateway must send the header {self._name} once")
        elif USER_ID.match(user := found[0].decode("latin-1")):
            then(user, "")
        else:
            then("", f"the header {self._name} is not a userId")


def bearer_token(headers: RequestHeaders) -> bytes:
    """Returns the bearer token of a request (RFC 6750), or nothing unless there is exactly one."""
    found = [value for name, value in headers if name == b"authorization"]
    scheme, _, token = found[0].partition(b" ") if len(found) == 1 else (b"", b"", b"")
    return token.strip(b" ") if scheme.lower() == b"bearer" else b""


def of_settings(settings: Settings, metrics: Metrics) -> Authentication | None:
    """Returns the authentication of the settings, or nothing if the callers are trusted."""
    if settings.user_header:
        return GatewayHeader(settings.user_header)
    if settings.jwks_url:
        # Cryptography costs a tenth of a second and 15 MB, so import it only if it is needed.
        from flashsale_api.tokens import Keys, Tokens  # noqa: PLC0415

        keys = Keys(settings.jwks_url, metrics)
        return Tokens(keys, settings.jwt_issuer, settings.jwt_audience)
    return None
