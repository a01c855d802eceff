"""API keys: a guard in front of every route, with the few open paths named here and nowhere else."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from server.errors import ApiError, error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from server.config import ServerConfig

OPEN_PATHS = frozenset({"/live", "/health"})


class ApiKeyMiddleware:
    """Answers 401 to whatever carries no accepted key. Denies by default: unknown paths are guarded."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app = app
        self._guarded = bool(config.api_keys)  # an empty key among them opens nothing
        self._keys = tuple(key.encode() for key in config.api_keys if key)
        self._open = OPEN_PATHS if config.metrics_require_key else OPEN_PATHS | {"/metrics"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._guarded or self._is_open(scope) or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await error_response(_unauthorized())(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["type"] == "http" and scope["path"] in self._open

    def _has_key(self, scope: Scope) -> bool:
        offered = _bearer(scope)
        accepted = False
        for key in self._keys:  # every key is compared, so that time tells nothing
            accepted |= hmac.compare_digest(key, offered)
        return accepted and bool(offered)


def _bearer(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, key = bytes(value).partition(b" ")
            return key.strip() if kind.lower() == b"bearer" else b""
    return b""


def _unauthorized() -> ApiError:
    return ApiError(
        401,
        "Missing or wrong API key: send 'Authorization: Bearer <key>'.",
        code="invalid_api_key",
        headers={"www-authenticate": 'Bearer realm="octavo"'},
    )
