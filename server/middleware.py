"""What surrounds every request: its id, its count, its log line, a last resort, and the body limit.

Pure ASGI: nothing here buffers a body or a stream. From the outside in:
CallMiddleware > CORS > ApiKeyMiddleware > BodyLimitMiddleware > routes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server import logs
from server.errors import INTERNAL, ApiError, error_response

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from server.metrics import Metrics

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
LINGER_S = 0.5  # how long a refused body is still read
CLIENT_LEFT = 499  # in the log and the metrics; nobody receives it
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
# Logged at debug level: probes come every second
QUIET_PATHS = frozenset({"/health", "/live", "/metrics", "/ping"})
UNROUTED_PATHS = frozenset({"/docs", "/openapi.json"})  # routes that leave no template in the scope


@dataclass(slots=True)
class Call:
    """One HTTP request as the log sees it; routes add fields."""

    request_id: str
    status: int = CLIENT_LEFT
    started: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


def call_of(request: Request) -> Call:
    call: Call = request.state.call
    return call


class CallMiddleware:
    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = Call(_request_id(scope))
        scope.setdefault("state", {})["call"] = call
        routed = _as_routed(scope)
        began = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.started, call.status = True, message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", call.request_id.encode())]
            await send(message)

        try:
            await self.app(routed, receive, send_with_id)
        except Exception:
            logs.logger.exception("request failed", extra={"fields": {"request": call.request_id}})
            if not call.started:
                await error_response(INTERNAL)(scope, receive, send_with_id)
        finally:
            self._record(scope, routed, call, time.monotonic() - began)

    def _record(self, scope: Scope, routed: Scope, call: Call, seconds: float) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.count_http(_template(routed), method, call.status)
        level = logging.DEBUG if routed["path"] in QUIET_PATHS else logging.INFO
        path = logs.sanitise(scope["path"])
        fields = {"status": call.status, "seconds": round(seconds, 4), **call.fields}
        logs.log(level, "request", request=call.request_id, method=method, path=path, **fields)


class BodyTooLarge(Exception):
    """The body grew over the limit while it was read."""


class BodyLimitMiddleware:
    """Refuses a body over the limit: by its announced length at once, else while it is arriving."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _announced_length(scope) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise BodyTooLarge
            return message

        try:
            await self.app(scope, counted, send)
        except BodyTooLarge:  # only a reader of the body raises it, so no answer has begun
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, then read on a little: closing on unread bytes would reset the connection, and the
        client might never see the answer."""

        async def send_and_linger(message: Message) -> None:
            if message["type"] == "http.response.body":
                await send({**message, "more_body": True})
                await _discard(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await error_response(self._too_large())(scope, receive, send_and_linger)

    def _too_large(self) -> ApiError:
        message = f"The body is larger than {self._max_bytes} bytes."
        return ApiError(413, message, code="body_too_large", headers={"connection": "close"})


async def _discard(receive: Receive) -> None:
    """Drop what arrives until the body ends, for LINGER_S at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body", False):
                pass


def _announced_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 20 else 2**63
    return 0


def _request_id(scope: Scope) -> str:
    """The client's own id if it is short and plain, else a fresh one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return bytes(value).decode()
    return uuid.uuid4().hex


def _as_routed(scope: Scope) -> Scope:
    """What is routed in its place: slashes at the end of a path mean nothing, and HEAD is GET, of whose
    answer the HTTP server, which keeps the method as it came, withholds the body."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}


def _template(scope: Scope) -> str:
    """The route's template, so that the number of label values is the number of routes."""
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path
    return scope["path"] if scope["path"] in UNROUTED_PATHS else "other"
