"""API keys: a guard in front of every route, with the few open paths named here and nowhere else.

A key also says who the tenant is: by its name, never by itself.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from server.errors import ApiError, error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from server.config import ServerConfig

OPEN_PATHS = frozenset({"/live", "/health", "/ping"})
ADMIN_PATHS = frozenset({"/debug/scheduler"})  # under the admin key, if there is one; no API key opens them


class ApiKeyMiddleware:
    """Answers 401 to whatever carries no accepted key. Denies by default: unknown paths are guarded."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app = app
        self._guarded = bool(config.api_keys)  # an empty key among them opens nothing
        self._names = {
            key.encode(): name for key, name in zip(config.api_keys, key_names(config), strict=True) if key
        }
        self._admin_key = config.admin_key.encode()
        self._open = OPEN_PATHS if config.metrics_require_key else OPEN_PATHS | {"/metrics"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await error_response(_unauthorized())(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if self._admin_key and scope["path"] in ADMIN_PATHS:
            return hmac.compare_digest(self._admin_key, _bearer(scope))
        if not self._guarded or (scope["type"] == "http" and scope["path"] in self._open):
            return True
        tenant = self._tenant(_bearer(scope))
        if tenant is None:
            return False
        scope.setdefault("state", {})["tenant"] = tenant
        return True

    def _tenant(self, offered: bytes) -> str | None:
        tenant = None
        for key, name in self._names.items():  # every key is compared, so that time tells nothing
            if hmac.compare_digest(key, offered):
                tenant = name
        return tenant


def key_names(config: ServerConfig) -> tuple[str, ...]:
    """What the tenants of the API keys are called: as configured, else by a hash that gives no key away."""
    return config.api_key_names or tuple(
        f"key-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}" for key in config.api_keys
    )


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
