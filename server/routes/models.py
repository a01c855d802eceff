"""GET /v1/models and /v1/models/{id}: one model, under each of its names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.responses import Response

from server.delivery import json_response
from server.openapi import described
from server.wire.responses import Model, ModelList

if TYPE_CHECKING:
    from server.service import Service


def models_router(service: Service) -> APIRouter:
    router = APIRouter()

    def served(name: str) -> Model:
        return Model(id=name, created=service.created_s, max_model_len=service.max_model_len)

    @router.get("/v1/models", **described(None, ModelList))
    async def list_models() -> Response:
        return json_response(ModelList(data=[served(name) for name in service.model_names]))

    @router.get("/v1/models/{model_id:path}", **described(None, Model))
    async def get_model(model_id: str) -> Response:
        service.check_model(model_id)
        return json_response(served(model_id))

    return router
