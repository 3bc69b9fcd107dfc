"""HTTP requests to processes on this machine, past any proxy of the environment."""

import http.client
import urllib.request
from typing import Final, cast

_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, timeout_seconds: float) -> http.client.HTTPResponse:
    """Return the response to a GET request. Raises OSError, for example HTTPError."""
    return cast("http.client.HTTPResponse", _DIRECT.open(url, timeout=timeout_seconds))
