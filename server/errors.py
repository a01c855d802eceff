"""One error envelope, OpenAI's, for every status.

ApiError is raised by routes, admission and validation; everything else that can go wrong (unknown
route, wrong method, a bug) is turned into the same envelope by the handlers below.
"""

from __future__ import annotations

import http
import re
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import Response

from engine.checkpoint import CheckpointError
from server.logs import sanitise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

# The `type` clients see for a status; SDKs themselves go by the status.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}
MAX_MESSAGE_CHARS = 2000


class ApiError(Exception):
    """An answer other than success. `param` is the path of the field at fault, as `messages.0.role`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message[:MAX_MESSAGE_CHARS]
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def envelope(self) -> dict[str, Any]:
        """The body: {"error": {"message", "type", "param", "code"}}."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400, whose message names the field as well: many clients show nothing else."""
    if param is not None and not re.search(rf"(?<!\w){re.escape(param)}(?!\w)", message):
        message = f"{param}: {message}"
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, retry_after_s: int, code: str) -> ApiError:
    """A 503 that says when to come back."""
    return ApiError(503, message, code=code, headers={"retry-after": str(retry_after_s)})


# Never raised: an exception that is raised again and again keeps the frames of every time.
INTERNAL = ApiError(500, "The server had an error while processing the request.", code="internal_error")


class _ErrorResponse(Response):
    """The envelope. Whoever answers with it, the request's line in the log says what was wrong."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(
            msgspec.json.encode(error.envelope()), error.status, error.headers, "application/json"
        )
        named = {"code": error.code, "param": error.param}
        self._named = {name: sanitise(value) for name, value in named.items() if value is not None}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = scope.get("state", {}).get("call")
        if call is not None:
            call.fields |= self._named
        await super().__call__(scope, receive, send)


def error_response(error: ApiError) -> Response:
    return _ErrorResponse(error)


def install_error_handlers(app: FastAPI) -> None:
    """Exceptions of routes and of the router become envelopes; bugs are caught by the middleware."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(CheckpointError)
    async def unreadable_text(request: Request, error: CheckpointError) -> Response:
        """A vocabulary may hold rules that some text makes its library give up on."""
        return error_response(invalid(f"The model's vocabulary cannot read this: {error}", code="unreadable"))

    @app.exception_handler(RequestValidationError)
    async def bad_parameters(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return error_response(invalid(str(first["msg"]), param or None))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(_from_http(request, error))


def _from_http(request: Request, error: HTTPException) -> ApiError:
    messages = {
        404: f"Unknown route: {request.method[:16]} {request.url.path[:200]}",
        405: f"Method {request.method[:16]} is not allowed for {request.url.path[:200]}",
    }
    codes = {404: "unknown_route", 405: "method_not_allowed"}
    status = error.status_code
    message = messages.get(status) or str(error.detail) or http.HTTPStatus(status).phrase
    headers = dict(error.headers or {})
    if "GET" in headers.get("Allow", ""):
        headers["Allow"] += ", HEAD"  # see CallMiddleware
    return ApiError(status, message, code=codes.get(status), headers=headers)
