"""GET /debug/scheduler: who runs, who waits and why, for whoever holds the admin key."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from engine.client import EngineDead
from scheduler.snapshot import MAX_SEQUENCES
from server.delivery import json_response
from server.errors import ApiError, unavailable
from server.openapi import described
from server.service import NOT_READY_RETRY_S
from server.wire.debug import SchedulerState, state_of

if TYPE_CHECKING:
    from server.service import Service

INSPECTION_TIMEOUT_S = 5.0  # an engine answers between two steps


def debug_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/debug/scheduler", **described(None, SchedulerState))
    async def scheduler(
        limit: Annotated[int, Query(ge=0, le=MAX_SEQUENCES)] = MAX_SEQUENCES,
    ) -> Response:
        """Levels, sequences, pages and costs, at most `limit` sequences and tenants. Needs the admin key."""
        if not service.config.server.admin_key:
            raise ApiError(404, "/debug/scheduler is off: it needs admin_key.", code="unknown_route")
        return json_response(await _inspect(service, limit))

    return router


async def _inspect(service: Service, limit: int) -> SchedulerState:
    ready = service.client.ready
    if ready is None:
        raise unavailable("The model is loading.", NOT_READY_RETRY_S, "loading")
    try:
        async with asyncio.timeout(INSPECTION_TIMEOUT_S):
            return state_of(await service.client.inspect(limit), ready.costs)
    except TimeoutError:
        message = f"The engine did not answer within {INSPECTION_TIMEOUT_S:g} s."
        raise unavailable(message, NOT_READY_RETRY_S, "stalled") from None
    except EngineDead as error:
        raise unavailable(f"The engine was lost: {error}.", NOT_READY_RETRY_S, "loading") from None
