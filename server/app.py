"""The HTTP application: routes around one Service, inside the middleware that guards them all."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from server.auth import ApiKeyMiddleware
from server.errors import install_error_handlers
from server.middleware import CallMiddleware
from server.openapi import install_openapi
from server.routes.chat import chat_router
from server.routes.completions import completions_router
from server.routes.debug import debug_router
from server.routes.models import models_router
from server.routes.operations import operations_router
from server.routes.tokens import tokens_router

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from fastapi import FastAPI

    from server.service import Service

EXPOSED_HEADERS = (
    "x-request-id",
    "x-octavo-ignored-fields",
    "retry-after",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
)
ROUTERS = (
    completions_router,
    chat_router,
    models_router,
    tokens_router,
    operations_router,
    debug_router,
)


def create_app(service: Service) -> FastAPI:
    """The application. It answers at once; the engine behind it may become ready later."""
    app = FastAPIOffline(
        title="Octavo",
        version=service.version,
        redoc_url=None,
        static_url="/docs/assets",
        swagger_ui_parameters={"validatorUrl": None},  # else it asks a host of its own
        redirect_slashes=False,
        lifespan=lambda app: _beside(service.report_throughput(), service.check_template()),
    )
    for router in ROUTERS:
        app.include_router(router(service))
    install_error_handlers(app)
    install_openapi(app)
    _surround(app, service)
    return app


def _surround(app: FastAPI, service: Service) -> None:
    """The innermost first: each add_middleware wraps what is there."""
    config = service.config.server
    app.add_middleware(ApiKeyMiddleware, config=config)
    if config.cors_allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_allow_origins,
            allow_methods=config.cors_allow_methods,
            allow_headers=config.cors_allow_headers,
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(CallMiddleware, metrics=service.metrics)


@asynccontextmanager
async def _beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` while the application does, and no longer."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
