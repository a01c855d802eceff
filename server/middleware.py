"""What surrounds every request: its id, its count, its log line, and a last resort.

Pure ASGI: nothing here buffers a stream. From the outside in: CallMiddleware > CORS > ApiKeyMiddleware >
routes.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect

from server import logs
from server.errors import INTERNAL, error_response

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from server.metrics import Metrics

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
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
    ended: bool = False  # the last byte was handed on
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
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                call.ended = True

        try:
            await self.app(routed, receive, send_with_id)
        except ClientDisconnect:
            pass  # it left while it sent its body: nobody's fault, and counted as such
        except Exception:
            logs.logger.exception("request failed", extra={"fields": {"request": call.request_id}})
            if not call.started:
                with suppress(ClientDisconnect):
                    await error_response(INTERNAL)(scope, receive, send_with_id)
            else:
                call.status, call.ended = INTERNAL.status, True
        finally:
            self._record(scope, routed, call, time.monotonic() - began)

    def _record(self, scope: Scope, routed: Scope, call: Call, seconds: float) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        status = call.status if call.ended else CLIENT_LEFT
        self._metrics.count_http(_template(routed), method, status)
        level = logging.DEBUG if routed["path"] in QUIET_PATHS else logging.INFO
        path = logs.sanitise(scope["path"])
        fields = {"status": status, "seconds": round(seconds, 4), **call.fields}
        logs.log(level, "request", request=call.request_id, method=method, path=path, **fields)


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
