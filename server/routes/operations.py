"""What operators and probes ask: alive, ready, version, metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.delivery import json_response
from server.errors import unavailable
from server.service import NOT_READY_RETRY_S, Service


def operations_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/live", response_model=None)
    async def live() -> Response:
        """The process answers. Restart it only when this fails."""
        return json_response({"status": "alive"})

    @router.get("/health", response_model=None, responses={503: {"description": "Not ready"}})
    async def health() -> Response:
        """Requests are served. 503 while loading, draining, or when the engine makes no progress."""
        reason = service.why_not_ready()
        if reason is not None:
            raise unavailable(f"Not ready: {reason}.", NOT_READY_RETRY_S, reason)
        return json_response({"status": "ready"})

    # SageMaker's name for it
    router.add_api_route(
        "/ping", health, methods=["GET", "POST"], response_model=None, include_in_schema=False
    )

    @router.get("/version", response_model=None)
    async def version() -> Response:
        return json_response({"version": service.version})

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        service.note_ready()
        return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    return router
