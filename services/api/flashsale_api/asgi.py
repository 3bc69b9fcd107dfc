"""Calls the ASGI application for the requests without a handler, such as health checks."""

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Message

from flashsale_api import responses
from flashsale_api.reserve import MAX_BODY_BYTES
from flashsale_api.responses import Handler, Problem, RequestHeaders, Respond

log = logging.getLogger(__name__)


def handler(app: ASGIApp, head: dict[str, Any], tasks: set[asyncio.Task[None]]) -> Handler:
    """Returns a handler that calls `app` in one of the server's `tasks`.

    `head` is the part of the ASGI scope that differs between requests.
    """
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "scheme": "http",
        "root_path": "",
        **head,
    }

    def handle(
        headers: RequestHeaders,  # noqa: ARG001 - the scope has them
        body: bytes | bytearray,
        respond: Respond,
    ) -> None:
        if len(body) > MAX_BODY_BYTES:
            respond(*responses.plain(Problem.BODY_TOO_LARGE))
            return
        task = asyncio.create_task(_call(app, scope, bytes(body), respond))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return handle


async def _call(app: ASGIApp, scope: dict[str, Any], body: bytes, respond: Respond) -> None:
    """Calls an ASGI application whose answer is sent as a whole."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status, headers, parts = 500, list[tuple[bytes, bytes]](), list[bytes]()

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message.get("headers", []))
            return
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            kept = tuple(each for each in headers if each[0].lower() != b"content-length")
            respond(status, kept, b"".join(parts))

    try:
        await app(scope, receive, send)
    except Exception:  # after any error, the client needs an answer
        log.exception("the application failed")
    respond(*responses.plain(Problem.INTERNAL_ERROR))  # has no effect after an answer
