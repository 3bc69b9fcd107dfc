"""Errors over HTTP: `application/problem+json` (RFC 9457)."""

from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response


async def problem(_: Request, error: Exception) -> Response:
    """The answer to a request that has no other; its type says no more than its status."""
    raised = error if isinstance(error, HTTPException) else HTTPException(500)
    status = raised.status_code
    return JSONResponse(
        {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status},
        status,
        headers=raised.headers,
        media_type="application/problem+json",
    )
