"""The baseline: an app that does nothing, on the API's own server with the API's settings.

It reads the body and answers 202 with as many bytes as a reservation has.
"""

import os
import sys
from typing import Final

from starlette.types import Receive, Scope, Send

from flashsale.settings import host_and_port
from flashsale.sockets import bound
from flashsale_api.limits import SOCKET_BYTES
from flashsale_api.servers import server_of

_BODY: Final = b'{"reservationId":"' + b"x" * 180 + b'"}'
_HEADERS: Final = [
    (b"content-type", b"application/json"),
    (b"location", b"/sales/baseline/reservations/00000000-0000-7000-8000-000000000000"),
    (b"content-length", b"%d" % len(_BODY)),
]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Give the same answer to every request."""
    if scope["type"] == "lifespan":
        for word in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{word}.complete"})
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 202, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _BODY})


if __name__ == "__main__":
    listen = os.environ["FLASHSALE_LISTEN"]
    server_of(app, *host_and_port(listen)).run(bound("LISTEN", listen, SOCKET_BYTES))
    sys.exit()
