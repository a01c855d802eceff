"""The OpenAPI document of routes that read their bodies themselves and answer msgspec values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from server.wire import debug, requests, responses

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pydantic import BaseModel

COMPONENT = "#/components/schemas/{}"
ERRORS = {
    "4XX": "The request is at fault; `param` names the field.",
    "5XX": "The server is at fault, or busy: see Retry-After.",
}
REQUESTS: tuple[type[BaseModel], ...] = (
    requests.CompletionRequest,
    requests.ChatRequest,
    requests.TokenizeTextRequest,
    requests.TokenizeChatRequest,
    requests.DetokenizeRequest,
)
ANSWERS: tuple[type[msgspec.Struct], ...] = (
    responses.Completion,
    responses.ChatCompletion,
    responses.Tokens,
    responses.Text,
    responses.TokenizerInfo,
    responses.ModelList,
    responses.Model,
    responses.ErrorEnvelope,
    debug.SchedulerState,
)


def described(
    body: type[BaseModel] | tuple[type[BaseModel], ...] | None, answer: type[msgspec.Struct]
) -> dict[str, Any]:
    """Arguments of a route decorator that document its body, or the bodies it may have, and its answers."""
    extra: dict[str, Any] = {}
    if body is not None:
        bodies = body if isinstance(body, tuple) else (body,)
        extra["requestBody"] = {"required": True, "content": _json(*(each.__name__ for each in bodies))}
    failures = {
        status: {"description": text, "content": _json("ErrorEnvelope")} for status, text in ERRORS.items()
    }
    success = {"description": "Success", "content": _json(answer.__name__)}
    return {"openapi_extra": extra, "responses": {200: success, **failures}, "response_model": None}


def install_openapi(app: FastAPI) -> None:
    """Add the schemas that the routes refer to."""

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(_schemas())
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _schemas() -> dict[str, Any]:
    _, of_requests = models_json_schema(
        [(model, "validation") for model in REQUESTS], ref_template=COMPONENT.format("{model}")
    )
    _, of_answers = msgspec.json.schema_components(ANSWERS, ref_template=COMPONENT.format("{name}"))
    return {**of_requests["$defs"], **of_answers}


def _json(*names: str) -> dict[str, Any]:
    references = [{"$ref": COMPONENT.format(name)} for name in names]
    return {"application/json": {"schema": references[0] if len(names) == 1 else {"anyOf": references}}}
