"""Exceptions become HTTP answers: by the one table from exception to status, as RFC 9457 problems."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from service import errors
from service.api.protocols.protocol import Refusal
from service.api.protocols.registry import protocol_of
from service.contract.errors import BadMedia, InputError, MediaTooLarge, UnsupportedMedia
from service.errors import InputFailed, IsthmusError, Overloaded, RateLimited, words_of
from service.schemas.inputs import location

# The code of the problem that the request at hand was answered with, for the metrics.
reason: ContextVar[str | None] = ContextVar("reason", default=None)

# The nearest class in an exception's ancestry decides.
STATUS: Mapping[type[Exception], tuple[int, str]] = {
    errors.InvalidRequest: (422, "invalid_request"),
    errors.MalformedRequest: (400, "malformed_request"),
    errors.Unauthenticated: (401, "unauthenticated"),
    errors.Forbidden: (403, "forbidden"),
    errors.CrossOrigin: (403, "cross_origin"),
    errors.Misdirected: (421, "unknown_host"),
    RateLimited: (429, "rate_limited"),
    errors.NotFound: (404, "not_found"),
    errors.BodyTooLarge: (413, "body_too_large"),
    errors.UnsupportedBody: (415, "unsupported_body"),
    Overloaded: (429, "overloaded"),
    errors.NotReady: (503, "not_ready"),
    errors.DiskFull: (503, "disk_full"),
    errors.DeadlineExceeded: (504, "deadline_exceeded"),
    InputError: (422, InputError.code),
    UnsupportedMedia: (415, UnsupportedMedia.code),
    MediaTooLarge: (413, MediaTooLarge.code),
    BadMedia: (422, BadMedia.code),
    errors.InferenceFailed: (500, errors.InferenceFailed.code),
    errors.FetchDisabled: (422, errors.FetchDisabled.code),
    errors.FetchRefused: (422, errors.FetchRefused.code),
    errors.FetchFailed: (422, errors.FetchFailed.code),
    # The disk is full, or descriptors are used up: the request is valid, and may be sent again.
    OSError: (503, "not_ready"),
    Exception: (500, "internal_error"),
}

_OF_HTTP = {
    400: ("malformed_request", "the request cannot be read"),
    404: ("route_not_found", "there is no such route"),
    405: ("method_not_allowed", "this route does not take that method"),
    408: ("request_timeout", "the body did not come in time"),
    413: ("body_too_large", "the body is too large"),
    429: ("overloaded", "too many large bodies are being read"),
}


def status_and_code(error: Exception) -> tuple[int, str]:
    """Return the HTTP status and the stable code of an exception, from STATUS and from nowhere else."""
    if isinstance(error, InputFailed):
        return status_and_code(error.cause)
    status, code = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    return status, getattr(error, "code", None) or code


def problem(
    path: str,
    status: int,
    code: str,
    detail: str,
    *,
    index: int | None = None,
    errors: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an RFC 9457 problem; on a protocol's paths an error in its own form, because its clients read that."""
    reason.set(code)
    body: dict[str, Any]
    if (protocol := protocol_of(path)) is not None:
        field = ".".join(str(part) for part in errors[0]["loc"]) if errors else None
        message = f"{detail}: {field}: {errors[0]['msg']}" if errors else detail
        body = protocol.error(Refusal(status, code, message, field))
        media_type = "application/json"
    else:
        title = HTTPStatus(status).phrase
        body = {"type": "about:blank", "title": title, "status": status, "code": code, "detail": detail}
        if index is not None:
            body["index"] = index
        if errors:
            body["errors"] = list(errors)
        media_type = "application/problem+json"
    return Response(orjson.dumps(body), status, headers=headers, media_type=media_type)


def respond(path: str, error: Exception) -> Response:
    """Return the response for any exception."""
    status, code = status_and_code(error)
    detail = str(error) if isinstance(error, IsthmusError | InputError) else "the server failed on this request"
    headers = {}
    if isinstance(error, Overloaded | RateLimited):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="isthmus"'
    elif isinstance(error, errors.DiskFull):
        headers["Connection"] = "close"  # the rest of an upload is not read
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "1"
    index = error.index if isinstance(error, InputFailed) else None
    return problem(path, status, code, detail, index=index, headers=headers)


async def _own_error(request: Request, error: Exception) -> Response:
    return respond(request.url.path, error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, detail = _OF_HTTP.get(error.status_code, ("http_error", "the request cannot be read"))
    protocol = protocol_of(request.url.path)
    if error.status_code == 404 and protocol and protocol.name not in request.state.services.settings.protocols:
        detail = f"the protocol {protocol.name} is off on this server: ISTHMUS_PROTOCOLS lists those that are on"
    headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
    return problem(request.url.path, error.status_code, code, detail, headers=headers)


def _allowed(request: Request) -> str:
    """Return the methods that any route takes for this path; Starlette knows those of one route."""
    routes = request.app.routes

    def taken(method: str) -> bool:
        return any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)

    methods = [method for method in ("DELETE", "GET", "PATCH", "POST", "PUT") if taken(method)]
    if "GET" in methods:
        methods.insert(methods.index("GET") + 1, "HEAD")
    return ", ".join(methods)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if any(problem["type"] == "json_invalid" for problem in problems):
        return problem(request.url.path, 400, "malformed_request", "the body is not valid JSON")
    # At most 20, without the offending input.
    readable = [{"loc": location(error), "msg": words_of(error)} for error in problems[:20]]
    return problem(request.url.path, 422, "invalid_request", "the request is not valid", errors=readable)


def install(app: FastAPI) -> None:
    """Register the handlers. `middleware.Context` logs and answers any other exception."""
    app.add_exception_handler(IsthmusError, _own_error)
    app.add_exception_handler(InputError, _own_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
