"""Starlette applications, which answer the requests that no handler answers directly."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan

from flashsale_api.responses import Headers, Problem, plain, render


def rest_app(
    routes: Sequence[Route], description: str, lifespan: Lifespan[Starlette] | None = None
) -> Starlette:
    """Returns an application with `routes` and the file `description` at /openapi.json.

    It answers errors as problems, too.
    """
    text = (files("flashsale_api") / description).read_bytes()

    async def openapi(_: Request) -> Response:
        return Response(text, media_type="application/json")

    app = Starlette(
        routes=[*routes, Route("/openapi.json", openapi)],
        exception_handlers={HTTPException: _http_problem, Exception: _internal_problem},
        lifespan=lifespan,
    )
    # Otherwise Starlette redirects /sales/ to the host in the request's Host header.
    app.router.redirect_slashes = False
    return app


def starlette_response(
    status: int, headers: Headers, body: bytes, more: Mapping[str, str] | None = None
) -> Response:
    """Returns an answer as Starlette's response, with `more` headers."""
    made = Response(body, status, more)
    made.raw_headers.extend(headers)
    return made


def problem_response(problem: Problem, detail: str | None = None) -> Response:
    """Returns a problem as Starlette's response."""
    return starlette_response(*render(problem, detail))


async def _http_problem(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return starlette_response(*plain(_of_status(error.status_code)), error.headers)


async def _internal_problem(_: Request, __: Exception) -> Response:
    return problem_response(Problem.INTERNAL_ERROR)


def _of_status(status: int) -> Problem:
    """Returns the problem for a status that Starlette raised."""
    match status:
        case HTTPStatus.NOT_FOUND:
            return Problem.NOT_FOUND
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return Problem.METHOD_NOT_ALLOWED
        case _ if status < 500:
            return Problem.MALFORMED_REQUEST
        case _:
            return Problem.INTERNAL_ERROR
